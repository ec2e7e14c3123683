//! Who owns which layers: pure arithmetic over what machines reported and what headers say.
//!
//! Knows neither MPI nor files nor number formats. The plan is the one with the smallest expected wall time
//! over all contiguous slices, all orders of ranks and all sizes of groups, each rank within its memory.

mod assumed;
mod cost;
mod orders;
mod remedies;
mod simulate;
mod split;
mod steady;
mod table;

pub use assumed::{ASSUMED_LINK, AssumedMachine, MachineKind};
pub use cost::{Mode, ModelCost, Operations, Work};

use std::ops::Range;

use cost::{Cost, Slice, Time};
use orders::Orders;
use simulate::simulate;
use split::{Costs, Kind, slices, split, way};

use crate::error::{Error, Result};

/// What the planner knows of one rank.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Node {
    /// MPI rank.
    pub rank: usize,
    /// Host name, for people.
    pub host: String,
    /// A number that all ranks on this host have, and no others.
    pub host_id: usize,
    /// Bytes that this rank may use where it computes.
    pub memory: u64,
    /// Bytes of host memory beside `memory`, for files that were read once and for hidden states; none where `memory`
    /// is the host's own.
    pub host_memory: u64,
    /// Rate of the forward pass in FLOP/s.
    pub flops: f64,
    /// Rate of the forward pass with statistics in FLOP/s.
    pub statistics_flops: f64,
    /// Rate of choosing codes in FLOP/s.
    pub solving_flops: f64,
    /// Rate at which weights are read from disk, in bytes/s.
    pub read_rate: f64,
    /// Rate at which this rank exchanges hidden states, in bytes/s; two ranks do so at the lower of theirs.
    pub link: f64,
    /// Ranks that compute on the same cores, this one included.
    pub company: usize,
    /// How much slower each of them is when all compute at once, at least 1.
    pub crowding: f64,
}

impl Node {
    /// Whether this is a card with memory of its own.
    fn is_apart(&self) -> bool {
        self.host_memory > 0
    }

    /// How much slower this rank is when at most so many ranks of the job compute at once.
    fn slowed(&self, at_once: usize) -> f64 {
        let share = self.company.min(at_once) as f64 / self.company as f64;
        (share * self.crowding).max(1.0)
    }
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
    /// Whether its weights stay loaded.
    pub mode: Mode,
    /// Micro-batches that walk through a layer together.
    pub group: usize,
    /// Source bytes of its tensors.
    pub bytes_read: u64,
    /// Output bytes of its tensors.
    pub bytes_written: u64,
    /// Expected peak of memory in bytes: weights, hidden states of a group, buffers.
    pub peak_memory: u64,
    /// Memory it may use.
    pub memory: u64,
    /// Expected busy time in seconds.
    pub seconds: f64,
    /// Expected time of waiting for hidden states, in seconds.
    pub wait: f64,
}

/// The whole plan, the same on every rank.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// Stages in the order in which hidden states pass, whatever the order of ranks.
    pub stages: Vec<Stage>,
    /// Expected wall time in seconds, from the first layer to the last byte, as the simulated schedule gives it.
    pub seconds: f64,
}

impl Plan {
    /// The stage that `rank` runs.
    pub fn stage(&self, rank: usize) -> &Stage {
        &self.stages[self.position(rank)]
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

/// Assigns contiguous slices to ranks, in whatever order of ranks is fastest.
///
/// `counts` are the layers by rank that the user asked for; they keep rank order.
///
/// # Errors
/// Exit code 4: more ranks than layers, counts that do not add up, a rank whose memory can't hold what
/// its slice needs.
pub fn plan(nodes: &[Node], model: &ModelCost, work: &Work, counts: Option<&[usize]>) -> Result<Plan> {
    let layers = model.layers();
    if nodes.len() > layers {
        return Err(Error::plan(format!(
            "{} ranks for {layers} layers: each rank computes at least one layer",
            nodes.len()
        ))
        .fix(format!("start at most {layers} ranks, for example with mpirun -np {layers}")));
    }
    let planner = Planner { nodes: steady::steady(nodes), model, work };
    match counts {
        Some(counts) => planner.given(checked_counts(counts, nodes.len(), layers)?),
        None => match planner.fastest() {
            Some(found) => Ok(planner.finished(found)),
            None => Err(planner.too_small()),
        },
    }
}

fn checked_counts(counts: &[usize], ranks: usize, layers: usize) -> Result<&[usize]> {
    let total = counts.iter().fold(0, |total: usize, &count| total.saturating_add(count));
    let listed = counts.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    if counts.len() != ranks {
        return Err(Error::plan(format!(
            "--layers-per-rank {listed} is for {} ranks, and the job has {ranks}",
            counts.len()
        ))
        .fix(format!("give {ranks} numbers that add up to {layers}")));
    }
    if let Some(rank) = counts.iter().position(|&count| count == 0) {
        return Err(Error::plan(format!("--layers-per-rank {listed} leaves rank {rank} without a layer"))
            .fix(format!("give {ranks} positive numbers that add up to {layers}, or start fewer ranks")));
    }
    if total != layers {
        return Err(Error::plan(format!(
            "--layers-per-rank {listed} covers {total} layers, and the model has {layers}"
        ))
        .fix(format!("give {ranks} positive numbers that add up to {layers}")));
    }
    Ok(counts)
}

/// Slices of these sizes by rank index, in rank order.
fn in_rank_order(counts: &[usize]) -> Vec<(usize, Range<usize>)> {
    let mut first = 0;
    let slice = |(index, count): (usize, &usize)| {
        first += count;
        (index, first - count..first)
    };
    counts.iter().enumerate().map(slice).collect()
}

/// The size of a search over all orders of ranks beyond which rank order is taken as given: enough for ten
/// ranks that all differ, or for 64 ranks of three kinds.
const MOST_STEPS: usize = 20_000_000;

/// How much longer a plan may take that reads every weight once. Streaming leans on a disk's rate, of which a
/// sample is all that is known; room in memory is certain.
const READING_ONCE: (Time, Time) = (21, 20);

struct Planner<'a> {
    nodes: Vec<Node>,
    model: &'a ModelCost,
    work: &'a Work,
}

/// Slices by rank index, in stage order, for groups of one size.
struct Found {
    group: usize,
    /// Multiplied by the number of groups.
    wall: Time,
    stages: Vec<(usize, Range<usize>)>,
}

impl Planner<'_> {
    fn fastest(&self) -> Option<Found> {
        let slices: Vec<Slice> =
            slices(self.model.layers(), self.nodes.len()).map(|range| self.model.slice(range)).collect();
        let any = self.fastest_of(&slices, false)?;
        let once = self
            .fastest_of(&slices, true)
            .filter(|once| once.wall * READING_ONCE.1 <= self.wall_in(&any, once.group) * READING_ONCE.0);
        Some(once.unwrap_or(any))
    }

    /// The fastest plan, or the fastest that reads every weight `once`.
    fn fastest_of(&self, slices: &[Slice], once: bool) -> Option<Found> {
        let mut best: Option<Found> = None;
        for group in self.work.group_sizes() {
            let beat = best.as_ref().map(|best| self.wall_in(best, group));
            best = self.fastest_in(group, slices, once, beat).or(best);
        }
        best
    }

    /// The fastest plan with groups of one size, if it takes less than `beat`.
    fn fastest_in(&self, group: usize, slices: &[Slice], once: bool, beat: Option<Time>) -> Option<Found> {
        let mut links: Vec<f64> = self.nodes.iter().map(|node| node.link).collect();
        links.sort_by(f64::total_cmp);
        links.dedup();
        let mut kinds: Vec<Kind> = Vec::new();
        let mut by_rank: Vec<usize> = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let (host, host_id) = (&node.host, node.host_id);
            let equal = |other: &Node| {
                Node { rank: node.rank, host: host.clone(), host_id, ..other.clone() } == *node
            };
            if let Some(other) = self.nodes[..index].iter().position(equal) {
                by_rank.push(by_rank[other]);
                continue;
            }
            let link = links.iter().position(|link| *link == node.link).expect("it is listed");
            let table = |next: &f64| slices.iter().map(|s| self.cost(node, *next, s, group, once)).collect();
            let kind = Kind { link, tables: links.iter().map(table).collect() };
            // Ranks that need the same for every slice are of one kind, whatever else they differ in.
            by_rank.push(kinds.iter().position(|known| *known == kind).unwrap_or_else(|| {
                kinds.push(kind);
                kinds.len() - 1
            }));
        }
        let steps = kinds.len() * links.len() * self.model.layers().pow(2) / by_rank.len();
        let orders = Orders::all(&by_rank, MOST_STEPS / steps).unwrap_or_else(|| Orders::by_rank(&by_rank));
        let found = split(&Costs { layers: self.model.layers(), kinds }, &orders, beat)?;
        let nodes = orders.ranks_of(found.stages.iter().map(|(kind, _)| *kind));
        let layers = found.stages.into_iter().map(|(_, layers)| layers);
        Some(Found { group, wall: found.wall, stages: nodes.into_iter().zip(layers).collect() })
    }

    /// The plan with these layers by rank, in rank order.
    fn given(&self, counts: &[usize]) -> Result<Plan> {
        let stages = in_rank_order(counts);
        if let Some((index, layers)) = stages.iter().find(|(index, layers)| !self.fits(*index, layers)) {
            return Err(self.has_no_room(*index, layers, counts));
        }
        let mut best: Option<Found> = None;
        for group in self.work.group_sizes() {
            let beat = best.as_ref().map_or(Time::MAX, |best| self.wall_in(best, group));
            if let Some(wall) = self.wall(&stages, group, false).filter(|&wall| wall < beat) {
                best = Some(Found { group, wall, stages: stages.clone() });
            }
        }
        Ok(self.finished(best.expect("every rank can stream its slice one micro-batch at a time")))
    }

    /// The wall time of these stages with groups of one size.
    fn wall(&self, stages: &[(usize, Range<usize>)], group: usize, once: bool) -> Option<Time> {
        let (mut longest, mut rest, mut next) = (0, 0, f64::MAX);
        for (index, layers) in stages.iter().rev() {
            let node = &self.nodes[*index];
            let cost = self.cost(node, next, &self.model.slice(layers.clone()), group, once)?;
            longest = way(&cost, longest);
            rest = rest.max(cost.rest);
            next = node.link;
        }
        Some(longest + rest)
    }

    /// What a slice costs on a node before one on a link of `next`, where it fits and, if so wished, is read
    /// `once`.
    fn cost(&self, node: &Node, next: f64, slice: &Slice, group: usize, once: bool) -> Option<Cost> {
        let (model, work) = (self.model, self.work);
        let mode = slice.mode(node, group, model, work)?;
        if once && mode == Mode::Streamed && work.groups(group) > 1 {
            return None;
        }
        let slowed = node.slowed(self.at_once(group));
        let pace = slice.pace(node, next.min(node.link), slowed, mode, model, work);
        Some(slice.cost(&pace, mode, group, model, work))
    }

    /// How many ranks compute at once at most: where each is done behind its last group, as many as there are groups
    /// on their way.
    fn at_once(&self, group: usize) -> usize {
        let one_sweep = self.work.calibrates && self.model.statistics.is_none();
        if one_sweep { self.work.groups(group) } else { usize::MAX }
    }

    /// Whether a rank has room for these layers, be it one micro-batch at a time.
    fn fits(&self, index: usize, layers: &Range<usize>) -> bool {
        self.model.slice(layers.clone()).mode(&self.nodes[index], 1, self.model, self.work).is_some()
    }

    /// The wall time of `found`, multiplied by the number of groups of another size.
    fn wall_in(&self, found: &Found, group: usize) -> Time {
        found.wall * self.work.groups(group) as Time / self.work.groups(found.group) as Time
    }

    /// The plan of what was found, and the time that its schedule takes in simulation: each rank as fast as it is when
    /// it has a core, but no host faster than its cores get through what its ranks have to compute.
    fn finished(&self, found: Found) -> Plan {
        let (group, model, work) = (found.group, self.model, self.work);
        let staged: Vec<_> = (found.stages.iter())
            .map(|(index, layers)| {
                let (node, slice) = (&self.nodes[*index], model.slice(layers.clone()));
                let mode = slice.mode(node, group, model, work).expect("a planned slice fits");
                (node, slice, mode)
            })
            .collect();
        let links = staged.iter().skip(1).map(|(node, ..)| node.link).chain([f64::MAX]);
        let paces = staged.iter().zip(links).map(|((node, slice, mode), next)| {
            (slice.pace(node, next.min(node.link), 1.0, *mode, model, work), slice.layers.len(), *mode)
        });
        let times = simulate(paces, group, model.statistics.is_some(), work);
        let crowded = staged.iter().map(|(node, ..)| *node).filter(|node| node.crowding > 1.0).map(|node| {
            let mates = staged.iter().zip(&times).filter(|((other, ..), _)| other.host_id == node.host_id);
            let busy: Vec<f64> = mates.map(|(_, times)| times.busy).collect();
            node.crowding * busy.iter().sum::<f64>() / busy.len() as f64
        });
        let seconds = times.iter().map(|times| times.end).chain(crowded).fold(0.0, f64::max);
        let stage = |((node, slice, mode), times): ((&Node, Slice, Mode), simulate::Times)| Stage {
            rank: node.rank,
            host: node.host.clone(),
            mode,
            group,
            bytes_read: slice.source,
            bytes_written: slice.output,
            peak_memory: slice.peak_memory(node, mode, group, model, work),
            memory: node.memory,
            seconds: times.busy,
            wait: times.wait,
            layers: slice.layers,
        };
        Plan { stages: staged.into_iter().zip(times).map(stage).collect(), seconds }
    }
}

#[cfg(test)]
mod tests;
