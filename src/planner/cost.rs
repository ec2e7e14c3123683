//! What a slice costs: bytes, operations, memory, time.

use std::ops::Range;

use super::Node;

/// Sizes of a model's parts, from headers alone. Bytes unless said otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    /// Source bytes of each decoder layer.
    pub layer_source: Vec<u64>,
    /// Output bytes of each decoder layer.
    pub layer_output: Vec<u64>,
    /// Bytes of what the first stage owns besides layers (embedding), the same in the output.
    pub head: u64,
    /// Bytes of what the last stage owns besides layers (norm, lm_head), the same in the output.
    pub tail: u64,
    /// Bytes of one token's hidden state.
    pub hidden_row: u64,
    /// Bytes of one token's intermediate results inside a layer.
    pub workspace_row: u64,
    /// FLOPs of one layer's linears for one token.
    pub flops_per_token: f64,
}

/// What is to be done, whatever the machines.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Calibration tokens.
    pub tokens: u64,
    /// Micro-batches that they are packed into.
    pub micro_batches: usize,
    /// Tokens of the largest micro-batch.
    pub micro_batch_tokens: u64,
    /// Whether the forward pass is needed at all (weight-only schemes need none).
    pub calibrates: bool,
}

/// Groups that a stage's micro-batches are cut into for each stage of the pipeline. More groups shorten
/// the bubble, (S-1)/(G+S-1), and map each layer's weights more often.
const GROUPS_PER_STAGE: usize = 4;

/// Libraries, code, thread stacks, MPI's buffers: what a rank needs before the first layer.
const FIXED_MEMORY: u64 = 64 << 20;

impl Work {
    /// Micro-batches that walk together: all of them on one rank, a share that keeps every rank of a
    /// pipeline busy otherwise.
    pub fn group(&self, ranks: usize) -> usize {
        let groups = if ranks == 1 { 1 } else { ranks * GROUPS_PER_STAGE };
        self.micro_batches.div_ceil(groups).max(1)
    }

    /// Expected busy seconds of `node` with `slice`: arithmetic or reading, whichever takes longer.
    pub fn seconds(&self, node: &Node, slice: &Range<usize>, model: &ModelCost) -> f64 {
        let flops = if self.calibrates {
            self.tokens as f64 * model.flops_per_token * slice.len() as f64
        } else {
            0.0
        };
        let bytes = model.source_bytes(slice) + model.output_bytes(slice);
        (flops / node.flops).max(bytes as f64 / node.read_rate)
    }
}

impl ModelCost {
    /// Decoder layers.
    pub fn layers(&self) -> usize {
        self.layer_source.len()
    }

    fn ends(&self, slice: &Range<usize>) -> u64 {
        let head = if slice.start == 0 { self.head } else { 0 };
        let tail = if slice.end == self.layers() { self.tail } else { 0 };
        head + tail
    }

    /// Source bytes of a slice, with the embedding or the tail where it lands.
    pub fn source_bytes(&self, slice: &Range<usize>) -> u64 {
        self.layer_source[slice.clone()].iter().sum::<u64>() + self.ends(slice)
    }

    /// Output bytes of a slice.
    pub fn output_bytes(&self, slice: &Range<usize>) -> u64 {
        self.layer_output[slice.clone()].iter().sum::<u64>() + self.ends(slice)
    }

    /// Expected peak: three layers' weights (being read, at work, being quantized), one layer's output, the group's
    /// hidden states, one micro-batch's intermediate results. The embedding and the tail are copied
    /// before and after, so they compete with layers rather than add to them.
    pub fn peak_memory(&self, slice: &Range<usize>, group: usize, work: &Work) -> u64 {
        let largest = |bytes: &[u64]| bytes[slice.clone()].iter().copied().max().unwrap_or(0);
        let layers = 3 * largest(&self.layer_source) + largest(&self.layer_output);
        let states = if work.calibrates {
            (group as u64 * self.hidden_row + self.workspace_row) * work.micro_batch_tokens
        } else {
            0
        };
        FIXED_MEMORY + layers.max(self.ends(slice)) + states
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{model, node, work};

    #[test]
    fn the_embedding_counts_where_it_lands() {
        let model = model(4);
        assert_eq!(model.source_bytes(&(0..2)), (2 << 20) + (1 << 21));
        assert_eq!(model.source_bytes(&(2..4)), (2 << 20) + (1 << 10));
        assert_eq!(model.source_bytes(&(0..4)), (4 << 20) + (1 << 21) + (1 << 10));
    }

    #[test]
    fn memory_holds_a_few_layers_whatever_the_slice() {
        let model = model(100);
        assert_eq!(model.peak_memory(&(1..3), 2, &work()), model.peak_memory(&(1..90), 2, &work()));
    }

    #[test]
    fn one_rank_walks_everything_at_once_and_several_take_turns() {
        assert_eq!(work().group(1), 10);
        assert_eq!(work().group(2), 2);
        assert_eq!(work().group(9), 1);
    }

    #[test]
    fn the_slower_of_disk_and_arithmetic_counts() {
        let model = model(4);
        assert_eq!(work().seconds(&node(0, 0, 1e9), &(0..4), &model), 40.0);
        let reading = work().seconds(&node(0, 0, 1e15), &(0..4), &model);
        assert!((0.005..0.02).contains(&reading), "{reading}");
    }
}
