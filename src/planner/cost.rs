//! What a slice costs on a machine: bytes, memory, time.

use std::ops::Range;

use super::Node;

/// Sizes of a model's parts, from headers alone. Bytes unless said otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    /// Source bytes of each decoder layer.
    pub layer_source: Vec<u64>,
    /// Bytes of each decoder layer's weights in the dtype that is computed in.
    pub layer_loaded: Vec<u64>,
    /// Output bytes of each decoder layer.
    pub layer_output: Vec<u64>,
    /// Bytes of what the first stage owns besides layers (embedding), the same in the output.
    pub head: u64,
    /// Bytes of the embedding in memory.
    pub head_loaded: u64,
    /// Bytes of what the last stage owns besides layers (norm, lm_head), the same in the output.
    pub tail: u64,
    /// Bytes of one token's hidden state.
    pub hidden_row: u64,
    /// Bytes of one token's intermediate results inside a layer.
    pub workspace_row: u64,
    /// What each decoder layer has to compute.
    pub operations: Vec<Operations>,
    /// Bytes of each layer's statistics and of solving for its codes, where the method needs them: then all
    /// micro-batches pass a layer before the next, and their hidden states wait in memory.
    pub statistics: Option<Vec<u64>>,
    /// The same model under methods that need less memory, by their names on the command line.
    pub lighter: Vec<(String, ModelCost)>,
}

/// Floating-point operations of one layer, an addition and a multiplication counted apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operations {
    /// Of the linears, for one token.
    pub token: f64,
    /// Of attention, for a token and one that it sees.
    pub pair: f64,
    /// Tokens that a token sees at most, itself included; none where it sees all before it.
    pub window: Option<usize>,
    /// Of the statistics, for one token.
    pub statistics: f64,
    /// Of choosing codes, for the whole layer.
    pub solving: f64,
}

impl Operations {
    /// Of the forward pass over all documents.
    pub fn forward(&self, work: &Work) -> f64 {
        work.tokens as f64 * self.token + work.pairs(self.window) as f64 * self.pair
    }
}

/// What is to be done, whatever the machines.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// Calibration documents.
    pub documents: usize,
    /// Calibration tokens.
    pub tokens: u64,
    /// Pairs of a token and one that it sees, itself included, for each window that layers of the model have.
    pub pairs: Vec<(Option<usize>, u64)>,
    /// Micro-batches that they are packed into.
    pub micro_batches: usize,
    /// Tokens of the largest micro-batch.
    pub micro_batch_tokens: u64,
    /// Whether the forward pass is needed at all (weight-only schemes need none).
    pub calibrates: bool,
    /// Whether there is a directory for hidden states that have no room in memory.
    pub spills: bool,
}

/// Where a stage's weights and hidden states are while groups of micro-batches pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The whole slice stays loaded: every weight is read once.
    Resident,
    /// A few layers at a time: every weight is loaded once a group.
    Streamed,
    /// The same, with the hidden states in files or, where a card has memory of its own, in its host's memory: they
    /// are read before every layer and written behind it.
    Spilled,
}

/// Time in femtoseconds, so that sums are exact and equal machines tie exactly.
pub type Time = u128;

/// Femtoseconds of a second.
pub const SECOND: f64 = 1e15;

/// Expected time of one stage, multiplied by the number of groups so that it stays whole. The stages' times
/// make the job's: every stage ends its `tail` after its own `fill` and all before it, and the largest `rest`
/// comes on top.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// From the arrival of a group's hidden states to their arrival at the next stage.
    pub fill: Time,
    /// What else passing hidden states on takes, in the stage or on its link, whichever is slower.
    pub rest: Time,
    /// What follows when the last group has been passed on.
    pub tail: Time,
}

/// How long the pieces of a stage's work take, over all micro-batches and all of its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Hidden states alone.
    pub forward: Time,
    /// Hidden states with statistics.
    pub statistics: Time,
    /// Choosing codes.
    pub solving: Time,
    /// Reading the slice.
    pub read: Time,
    /// Loading it again.
    pub again: Time,
    /// Writing what it became.
    pub write: Time,
    /// Hidden states on their way to the next stage; none behind the last.
    pub link: Time,
    /// Hidden states to files and back at every layer, where they have no room in memory.
    pub spill: Time,
}

/// A contiguous slice of decoder layers with what its place brings along. Bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// The layers.
    pub layers: Range<usize>,
    /// To be read from the source.
    pub source: u64,
    /// To be written.
    pub output: u64,
    loaded: u64,
    head_loaded: u64,
    tail: u64,
    largest_loaded: u64,
    largest_output: u64,
    largest_statistics: u64,
    /// What its layers compute, and how many of them compute the same.
    operations: Vec<(Operations, Time)>,
}

/// Libraries, code, thread stacks, MPI's buffers: what a rank needs before the first layer.
const FIXED_MEMORY: u64 = 64 << 20;

/// Micro-batches whose hidden states are being computed, wait for the disk, or are being written.
const IN_FLIGHT: u64 = 4;

/// Micro-batches whose hidden states are copied from another stage, or to it, or wait for their turn.
const CROSSING: u64 = 2;

/// Bytes/s at which weights come from the page cache to where arithmetic happens.
const CACHE_RATE: f64 = 2e10;

/// Bytes/s at which output is taken to be written: there is nothing to measure before there is an output.
const WRITE_RATE: f64 = 1e9;

impl Work {
    /// Sizes of groups to choose from, all micro-batches at once first, each half of the one before.
    pub fn group_sizes(&self) -> Vec<usize> {
        let mut sizes = vec![self.micro_batches.max(1)];
        while let Some(&size @ 2..) = sizes.last() {
            sizes.push(size.div_ceil(2));
        }
        sizes
    }

    /// The same with as many of the documents, of the same lengths on average.
    pub fn with_documents(&self, documents: usize) -> Work {
        let share =
            |amount: u64| (amount as u128 * documents as u128).div_ceil(self.documents as u128) as u64;
        Work {
            documents,
            tokens: share(self.tokens),
            pairs: self.pairs.iter().map(|&(window, pairs)| (window, share(pairs))).collect(),
            micro_batches: share(self.micro_batches as u64) as usize,
            micro_batch_tokens: self.micro_batch_tokens.min(share(self.tokens)),
            ..self.clone()
        }
    }

    /// Pairs of a token and one that it sees through a window.
    pub fn pairs(&self, window: Option<usize>) -> u64 {
        self.pairs.iter().find(|(known, _)| *known == window).map_or(0, |(_, pairs)| *pairs)
    }

    /// Groups of `group` micro-batches.
    pub fn groups(&self, group: usize) -> usize {
        self.micro_batches.div_ceil(group).max(1)
    }
}

impl ModelCost {
    /// Decoder layers.
    pub fn layers(&self) -> usize {
        self.layer_source.len()
    }

    /// A slice, with the embedding or the tail where it lands.
    pub fn slice(&self, layers: Range<usize>) -> Slice {
        let of = |bytes: &[u64]| bytes[layers.clone()].iter().sum::<u64>();
        let largest = |bytes: &[u64]| bytes[layers.clone()].iter().copied().max().unwrap_or(0);
        let (head, head_loaded) = if layers.start == 0 { (self.head, self.head_loaded) } else { (0, 0) };
        let tail = if layers.end == self.layers() { self.tail } else { 0 };
        Slice {
            source: of(&self.layer_source) + head + tail,
            output: of(&self.layer_output) + head + tail,
            loaded: of(&self.layer_loaded),
            head_loaded,
            tail,
            largest_loaded: largest(&self.layer_loaded),
            largest_output: largest(&self.layer_output),
            largest_statistics: self.statistics.as_ref().map_or(0, |bytes| largest(bytes)),
            operations: self.operations_of(&layers),
            layers,
        }
    }
}

impl ModelCost {
    /// What layers compute, and how many of them compute the same.
    fn operations_of(&self, layers: &Range<usize>) -> Vec<(Operations, Time)> {
        let mut kinds: Vec<(Operations, Time)> = vec![];
        for operations in &self.operations[layers.clone()] {
            match kinds.iter_mut().find(|(known, _)| known == operations) {
                Some((_, count)) => *count += 1,
                None => kinds.push((*operations, 1)),
            }
        }
        kinds
    }
}

impl Slice {
    /// Expected peak of memory where `node` computes. Streamed: three layers (being read, at work, being quantized;
    /// with statistics the last two are one) and a layer's output; the tail is copied by itself. Resident: all of the
    /// slice and a layer's output. A card with memory of its own holds neither embedding nor tail: its host gathers the
    /// one's rows and copies the other. Besides: a group's hidden states, one micro-batch's intermediate results, and
    /// what comes from the embedding or another stage and goes to the next. Spilled: a few micro-batches' hidden states,
    /// on their way and back.
    pub fn peak_memory(&self, node: &Node, mode: Mode, group: usize, model: &ModelCost, work: &Work) -> u64 {
        let layers = if model.statistics.is_some() { 2 } else { 3 };
        let (copied, tail) = if node.is_apart() { (0, 0) } else { (self.head_loaded + self.tail, self.tail) };
        let weights = match mode {
            Mode::Resident => self.loaded + copied + self.largest_output,
            Mode::Streamed | Mode::Spilled => (layers * self.largest_loaded + self.largest_output).max(tail),
        };
        let states = match &model.statistics {
            _ if !work.calibrates => 0,
            None => (group as u64 * model.hidden_row + model.workspace_row) * work.micro_batch_tokens,
            Some(_) => {
                // All of them in the sweep over a layer.
                let all = if mode == Mode::Spilled { 0 } else { work.tokens * model.hidden_row };
                let waiting = if node.is_apart() { 0 } else { self.waiting(model, work) };
                all + waiting + model.workspace_row * work.micro_batch_tokens + self.largest_statistics
            }
        };
        let on_their_way = if work.spills || mode == Mode::Spilled {
            IN_FLIGHT * model.hidden_row * work.micro_batch_tokens
        } else {
            0
        };
        // The embedding's rows come to the first stage as hidden states come to the others.
        let neighbours = 1 + u64::from(!self.is_last(model));
        let crossing = match work.calibrates {
            true => CROSSING * neighbours * model.hidden_row * work.micro_batch_tokens,
            false => 0,
        };
        FIXED_MEMORY + weights + states + on_their_way + crossing
    }

    /// Hidden states that wait in memory for the second sweep. The first stage makes its own again, the last one walks
    /// once, and with a directory they wait in files.
    fn waiting(&self, model: &ModelCost, work: &Work) -> u64 {
        let walks_twice = work.calibrates && model.statistics.is_some() && !self.is_last(model);
        if walks_twice && self.layers.start > 0 && !work.spills { work.tokens * model.hidden_row } else { 0 }
    }

    /// Hidden states in the memory of a card's host.
    fn beside_the_card(&self, mode: Mode, model: &ModelCost, work: &Work) -> u64 {
        let spilled = mode == Mode::Spilled && !work.spills;
        self.waiting(model, work) + if spilled { work.tokens * model.hidden_row } else { 0 }
    }

    /// The mode that `node` can run this slice in. One group loads every weight once in either mode, and
    /// streaming holds less. Hidden states leave the device only where there is no other way.
    pub fn mode(&self, node: &Node, group: usize, model: &ModelCost, work: &Work) -> Option<Mode> {
        let fits = |mode: &Mode| {
            self.peak_memory(node, *mode, group, model, work) <= node.memory
                && (!node.is_apart() || self.beside_the_card(*mode, model, work) <= node.host_memory)
        };
        let modes = [Mode::Resident, Mode::Streamed, Mode::Spilled];
        let modes = &modes[..if can_spill(node, model, work) { 3 } else { 2 }];
        modes.iter().copied().skip(usize::from(work.groups(group) == 1)).find(fits)
    }

    /// The least that any mode needs where `node` computes.
    pub fn least_memory(&self, node: &Node, model: &ModelCost, work: &Work) -> u64 {
        let mode = if can_spill(node, model, work) { Mode::Spilled } else { Mode::Streamed };
        self.peak_memory(node, mode, 1, model, work)
    }

    /// Whether this is the last stage, which passes nothing on.
    pub fn is_last(&self, model: &ModelCost) -> bool {
        self.layers.end == model.layers()
    }

    /// How long things take on `node`, which computes `slowed` times slower than alone, passing hidden states on at
    /// `link` bytes/s.
    pub fn pace(
        &self,
        node: &Node,
        link: f64,
        slowed: f64,
        mode: Mode,
        model: &ModelCost,
        work: &Work,
    ) -> Pace {
        let time = |amount: f64, rate: f64| (amount / rate * SECOND).round() as Time;
        // Whole femtoseconds a byte and a layer, so that equal shares take equal times.
        let bytes = |bytes: u64, rate: f64| Time::from(bytes) * time(1.0, rate);
        let layers = self.layers.len() as Time;
        let sum = |of: &dyn Fn(&Operations) -> f64, rate: f64| -> Time {
            let times = self.operations.iter().map(|(operations, count)| count * time(of(operations), rate));
            times.sum()
        };
        let forward = |operations: &Operations| operations.forward(work);
        let statistics =
            |operations: &Operations| forward(operations) + work.tokens as f64 * operations.statistics;
        let states = work.tokens * model.hidden_row;
        let beside = self.beside_the_card(mode, model, work);
        let kept = mode == Mode::Resident || self.source + beside <= node.host_memory;
        let sent = if self.is_last(model) { 0 } else { states };
        Pace {
            forward: sum(&forward, node.flops / slowed),
            statistics: sum(&statistics, node.statistics_flops / slowed),
            solving: sum(&|operations| operations.solving, node.solving_flops / slowed),
            read: bytes(self.source, node.read_rate),
            again: bytes(self.source, if kept { CACHE_RATE.max(node.read_rate) } else { node.read_rate }),
            write: bytes(self.output, WRITE_RATE),
            link: bytes(sent, link),
            spill: match (mode, work.spills) {
                (Mode::Spilled, true) => layers * (bytes(states, node.read_rate) + bytes(states, WRITE_RATE)),
                (Mode::Spilled, false) => layers * 2 * bytes(states, CACHE_RATE),
                _ => 0,
            },
        }
    }

    /// Expected time at `pace`. In its first pass a stage reads from disk, in later passes it loads again what it
    /// did not keep, chooses codes and writes; each overlaps with that pass's arithmetic. A resident stage loads
    /// ahead, while it waits for its first hidden states. Where a method needs statistics, a stage passes hidden
    /// states on first, and then walks through its layers again; the last stage walks once.
    pub fn cost(&self, pace: &Pace, mode: Mode, group: usize, model: &ModelCost, work: &Work) -> Cost {
        let Pace { forward, statistics, solving, read, again, write, link, spill } = *pace;
        let groups = work.groups(group) as Time;
        if !work.calibrates {
            return Cost { tail: groups * solving.max(read + write), ..Cost::default() };
        }
        let thorough = |loading: Time| groups * (statistics + solving).max(loading + write + spill);
        let two_sweeps = model.statistics.is_some();
        if two_sweeps && self.is_last(model) {
            return Cost { tail: thorough(read), ..Cost::default() };
        }
        // Where there are two sweeps, the first chooses nothing and writes nothing.
        let (solving, write) = if two_sweeps { (0, 0) } else { (solving, write) };
        let reading = groups * read;
        // Of one group, multiplied by the number of groups: that of all.
        let (fill, busy) = if groups == 1 {
            let fill = (forward + solving).max(reading);
            (fill, (forward + solving).max(reading + write))
        } else {
            let again = if mode == Mode::Resident { 0 } else { groups * again };
            // Nothing comes before the first stage for which it could load ahead.
            let loads_ahead = mode == Mode::Resident && self.layers.start > 0;
            let fill = if loads_ahead { forward } else { forward.max(reading) };
            let later =
                ((groups - 1) * forward + groups * solving).max((groups - 1) * again + groups * write);
            (fill, forward.max(reading) + later)
        };
        // The last layer's micro-batches leave one after another while the next are computed.
        let one = |all: Time| all * groups / work.micro_batches as Time;
        let layer = forward / self.layers.len() as Time;
        let behind = one(link).max((link + one(layer)).saturating_sub(layer));
        Cost {
            fill: fill + behind,
            rest: (busy - fill).max((groups - 1) * link),
            tail: if two_sweeps { thorough(again) } else { 0 },
        }
    }
}

/// Whether hidden states can leave the device: to files, or from a card to its host's memory. Methods without
/// statistics hold no more than a group's in any case.
fn can_spill(node: &Node, model: &ModelCost, work: &Work) -> bool {
    (work.spills || node.is_apart()) && work.calibrates && model.statistics.is_some()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{model, node, work};
    use super::*;

    fn seconds(node: &Node, slice: Range<usize>, mode: Mode, group: usize) -> f64 {
        let (model, work) = (model(8), work());
        let slice = model.slice(slice);
        let pace = Pace { link: 0, ..slice.pace(node, 1.0, 1.0, mode, &model, &work) };
        let cost = slice.cost(&pace, mode, group, &model, &work);
        (cost.fill + cost.rest) as f64 / work.groups(group) as f64 / SECOND
    }

    #[test]
    fn the_embedding_counts_where_it_lands() {
        let model = model(4);
        assert_eq!(model.slice(0..2).source, (2 << 20) + (1 << 21));
        assert_eq!(model.slice(2..4).source, (2 << 20) + (1 << 10));
        assert_eq!(model.slice(0..4).source, (4 << 20) + (1 << 21) + (1 << 10));
        let here = node(0, 0, 1e9);
        let resident = |range| model.slice(range).peak_memory(&here, Mode::Resident, 1, &model, &work());
        assert_eq!(resident(0..1) - resident(1..2), 1 << 21);
        // At the end of the model there is one neighbour less.
        let crossing = CROSSING * model.hidden_row * work().micro_batch_tokens;
        assert_eq!(resident(3..4) + crossing - resident(1..2), 1 << 10);
    }

    #[test]
    fn statistics_need_room_and_all_hidden_states() {
        let plain = model(4);
        let thorough = ModelCost { statistics: Some(vec![1 << 30; 4]), ..model(4) };
        let here = node(0, 0, 1e9);
        let peak =
            |model: &ModelCost| model.slice(0..2).peak_memory(&here, Mode::Streamed, 1, model, &work());
        // A layer less is loaded besides.
        let layer = plain.layer_loaded[0];
        assert!(peak(&thorough) + layer >= peak(&plain) + (1 << 30) + 9 * 1000 * plain.hidden_row);
    }

    #[test]
    fn a_directory_takes_hidden_states_where_memory_does_not() {
        let thorough = ModelCost { statistics: Some(vec![1 << 20; 4]), hidden_row: 4096, ..model(4) };
        let (without, with) = (work(), Work { spills: true, ..work() });
        let slice = thorough.slice(1..3);
        let here = node(0, 0, 1e9);
        let peak = |mode, work| slice.peak_memory(&here, mode, 10, &thorough, work);
        let all = without.tokens * thorough.hidden_row;
        let in_flight = IN_FLIGHT * without.micro_batch_tokens * thorough.hidden_row;
        assert_eq!(peak(Mode::Streamed, &without), peak(Mode::Spilled, &with) - in_flight + 2 * all);
        assert_eq!(peak(Mode::Streamed, &with), peak(Mode::Spilled, &with) + all);
        let mode = |memory, work| slice.mode(&node(0, memory, 1e9), 10, &thorough, work);
        let least = slice.least_memory(&here, &thorough, &with);
        assert_eq!(mode(least, &with), Some(Mode::Spilled));
        assert_eq!(mode(least, &without), None);
        assert_eq!(mode(least - 1, &with), None);
        assert_eq!(mode(peak(Mode::Streamed, &with), &with), Some(Mode::Streamed));
        let spill = |mode| slice.pace(&node(0, 0, 1e15), 1e9, 1.0, mode, &thorough, &with).spill;
        assert_eq!(spill(Mode::Streamed), 0);
        assert!(spill(Mode::Spilled) > 0);
    }

    #[test]
    fn streaming_holds_a_few_layers_whatever_the_slice() {
        let model = model(100);
        let here = node(0, 0, 1e9);
        let streamed = |range| model.slice(range).peak_memory(&here, Mode::Streamed, 2, &model, &work());
        assert_eq!(streamed(1..3), streamed(1..90));
    }

    #[test]
    fn groups_halve_down_to_one_micro_batch() {
        assert_eq!(work().group_sizes(), [10, 5, 3, 2, 1]);
        assert_eq!(Work { micro_batches: 0, calibrates: false, ..work() }.group_sizes(), [1]);
        assert_eq!(work().groups(3), 4);
    }

    #[test]
    fn the_slower_of_disk_and_arithmetic_counts() {
        assert_eq!(seconds(&node(0, 0, 1e9), 0..4, Mode::Streamed, 10), 40.0);
        let reading = seconds(&node(0, 0, 1e15), 0..4, Mode::Streamed, 10);
        assert!((0.005..0.02).contains(&reading), "{reading}");
    }

    #[test]
    fn what_is_not_kept_is_read_again_for_each_group() {
        let fast = node(0, 0, 1e15);
        let (once, again) =
            (seconds(&fast, 1..5, Mode::Resident, 1), seconds(&fast, 1..5, Mode::Streamed, 1));
        assert!(again > 6.0 * once, "{again} {once}");
        let cached = Node { host_memory: 1 << 30, ..fast };
        assert!(seconds(&cached, 1..5, Mode::Streamed, 1) < 0.5 * again);
    }
}
