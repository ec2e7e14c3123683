//! Who owns which layers: pure arithmetic over what machines reported and what headers say.
//!
//! Knows neither MPI nor files nor number formats. The split is exact: first the smallest possible
//! time of the slowest stage, then, among the splits that reach it, the most even one.

mod cost;
mod split;
mod table;

pub use cost::{ModelCost, Work};
pub use split::split;

use std::ops::Range;

use crate::error::{Error, Result};

/// What the planner knows of one rank.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Node {
    /// MPI rank.
    pub rank: usize,
    /// Host name.
    pub host: String,
    /// Bytes that this rank may use.
    pub memory: u64,
    /// Arithmetic rate in FLOP/s, measured.
    pub flops: f64,
    /// Rate at which weights are read, in bytes/s.
    pub read_rate: f64,
}

/// One stage of the pipeline: a contiguous slice of decoder layers on one rank.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Stage {
    /// The rank that runs it.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// The decoder layers it owns.
    pub layers: Range<usize>,
    /// Micro-batches that walk through a layer before the next layer is loaded.
    pub group: usize,
    /// Source bytes of its tensors.
    pub bytes_read: u64,
    /// Output bytes of its tensors.
    pub bytes_written: u64,
    /// Expected peak of memory in bytes: the layers at work, hidden states of a group, buffers.
    pub peak_memory: u64,
    /// Memory it may use.
    pub memory: u64,
    /// Expected busy time in seconds.
    pub seconds: f64,
}

/// The whole plan, the same on every rank.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// Stages in the order in which hidden states pass.
    pub stages: Vec<Stage>,
    /// Expected wall time in seconds, from the first layer to the last byte.
    pub seconds: f64,
}

impl Plan {
    /// The stage that `rank` runs.
    pub fn stage(&self, rank: usize) -> &Stage {
        self.stages.iter().find(|stage| stage.rank == rank).expect("every rank runs one stage")
    }

    /// The position of `rank`'s stage.
    pub fn position(&self, rank: usize) -> usize {
        self.stages.iter().position(|stage| stage.rank == rank).expect("every rank runs one stage")
    }

    /// The rank that owns a layer.
    pub fn owner(&self, layer: usize) -> usize {
        self.stages.iter().find(|stage| stage.layers.contains(&layer)).expect("stages cover all layers").rank
    }
}

/// Assigns contiguous slices to ranks in rank order.
///
/// `counts` are the layers by rank that the user asked for.
///
/// # Errors
/// Exit code 4: more ranks than layers, counts that do not add up, a rank whose memory can't hold what
/// its slice needs.
pub fn plan(nodes: &[Node], model: &ModelCost, work: &Work, counts: Option<&[usize]>) -> Result<Plan> {
    let layers = model.layers();
    if nodes.len() > layers {
        return Err(Error::plan(format!(
            "{} ranks for {layers} layers: a rank would have nothing to do",
            nodes.len()
        ))
        .fix(format!("start at most {layers} ranks")));
    }
    let counts = match counts {
        Some(counts) => checked_counts(counts, nodes.len(), layers)?.to_vec(),
        None => split(nodes, model, work)?,
    };
    let mut first = 0;
    let mut stages = Vec::with_capacity(nodes.len());
    for (node, count) in nodes.iter().zip(counts) {
        let slice = first..first + count;
        first = slice.end;
        stages.push(stage(node, slice, nodes.len(), model, work)?);
    }
    let slowest = stages.iter().map(|stage| stage.seconds).fold(0.0, f64::max);
    let others: f64 = stages.iter().map(|stage| stage.seconds).sum::<f64>() - slowest;
    // The pipeline fills and drains once: each other stage adds the time of its first group.
    let fill = others * stages[0].group as f64 / work.micro_batches.max(1) as f64;
    Ok(Plan { stages, seconds: slowest + fill })
}

fn checked_counts(counts: &[usize], ranks: usize, layers: usize) -> Result<&[usize]> {
    let total: usize = counts.iter().sum();
    let listed = counts.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    if counts.len() != ranks {
        return Err(Error::plan(format!(
            "--layers-per-rank {listed} names {} ranks, the job has {ranks}",
            counts.len()
        ))
        .fix(format!("give {ranks} numbers that add up to {layers}")));
    }
    if total != layers || counts.contains(&0) {
        return Err(Error::plan(format!(
            "--layers-per-rank {listed} covers {total} layers, the model has {layers}"
        ))
        .fix(format!("give {ranks} positive numbers that add up to {layers}")));
    }
    Ok(counts)
}

fn stage(node: &Node, slice: Range<usize>, ranks: usize, model: &ModelCost, work: &Work) -> Result<Stage> {
    let group = work.group(ranks);
    let peak_memory = model.peak_memory(&slice, group, work);
    if peak_memory > node.memory {
        return Err(Error::plan(format!(
            "rank {} ({}) needs {} for layers {}..{} and may use {}",
            node.rank,
            node.host,
            crate::units::binary(peak_memory),
            slice.start,
            slice.end,
            crate::units::binary(node.memory),
        ))
        .fix("raise --memory-per-rank, shorten --calib-max-tokens, or leave this rank out"));
    }
    Ok(Stage {
        rank: node.rank,
        host: node.host.clone(),
        group,
        bytes_read: model.source_bytes(&slice),
        bytes_written: model.output_bytes(&slice),
        peak_memory,
        memory: node.memory,
        seconds: work.seconds(node, &slice, model),
        layers: slice,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    pub(super) fn node(rank: usize, memory: u64, flops: f64) -> Node {
        Node { rank, host: format!("host{rank}"), memory, flops, read_rate: 1e9 }
    }

    pub(super) fn model(layers: usize) -> ModelCost {
        ModelCost {
            layer_source: vec![1 << 20; layers],
            layer_output: vec![1 << 18; layers],
            head: 1 << 21,
            tail: 1 << 10,
            hidden_row: 64,
            workspace_row: 640,
            flops_per_token: 1e6,
        }
    }

    pub(super) fn work() -> Work {
        Work { tokens: 10_000, micro_batches: 10, micro_batch_tokens: 1000, calibrates: true }
    }

    fn counts(plan: &Plan) -> Vec<usize> {
        plan.stages.iter().map(|stage| stage.layers.len()).collect()
    }

    #[test]
    fn slices_are_contiguous_and_cover_every_layer() {
        let nodes: Vec<Node> = (0..4).map(|rank| node(rank, 1 << 30, 1e9)).collect();
        let plan = plan(&nodes, &model(30), &work(), None).unwrap();
        assert_eq!(plan.stages[0].layers.start, 0);
        assert!(plan.stages.windows(2).all(|pair| pair[0].layers.end == pair[1].layers.start));
        assert_eq!(plan.stages[3].layers.end, 30);
        assert_eq!(counts(&plan).iter().max(), Some(&8));
        assert_eq!(counts(&plan).iter().min(), Some(&7));
    }

    #[test]
    fn given_counts_are_kept() {
        let nodes: Vec<Node> = (0..3).map(|rank| node(rank, 1 << 30, 1e9)).collect();
        let plan = plan(&nodes, &model(30), &work(), Some(&[3, 20, 7])).unwrap();
        assert_eq!(counts(&plan), [3, 20, 7]);
        assert_eq!(plan.owner(3), 1);
    }

    #[test]
    fn impossible_splits_say_the_numbers() {
        let nodes: Vec<Node> = (0..3).map(|rank| node(rank, 1 << 30, 1e9)).collect();
        for (layers, given, words) in [
            (2, None, vec!["3 ranks", "2 layers"]),
            (30, Some(vec![10, 10]), vec!["2 ranks", "has 3"]),
            (30, Some(vec![10, 10, 9]), vec!["29", "30"]),
            (30, Some(vec![15, 15, 0]), vec!["15,15,0"]),
        ] {
            let error = plan(&nodes, &model(layers), &work(), given.as_deref()).unwrap_err();
            assert_eq!(error.exit, ExitCode::Plan);
            assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
        }
    }

    #[test]
    fn a_rank_that_is_too_small_is_named() {
        let nodes = [node(0, 1 << 30, 1e9), node(1, 1 << 20, 1e9)];
        let error = plan(&nodes, &model(8), &work(), Some(&[4, 4])).unwrap_err();
        assert!(error.to_string().contains("rank 1 (host1)"), "{error}");
    }
}
