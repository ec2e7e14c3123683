//! The exact split: which slices, on which kinds of ranks, in which order.
//!
//! With G groups of micro-batches, the first group passes every stage, then the slowest stage or link sets
//! the pace, and behind its last group a stage has its `tail`. So the wall time is the longest way to the end
//! of a tail (the `fill` of a stage and of all before it, and its `tail`) and the largest `rest`. For a given
//! bound of `rest` the shortest longest way is a dynamic programme over (ranks used, first layer not yet
//! given, link of the rank that takes it). The bound that gives the smallest wall time is found by halving
//! the list of all values that `rest` can take; a part of the list that can't hold anything better is left
//! out.

use std::ops::Range;

use super::cost::{Cost, Time};
use super::orders::Orders;

/// What each kind of rank needs for each slice; none where the slice doesn't fit.
pub struct Costs {
    /// Decoder layers.
    pub layers: usize,
    /// By kind.
    pub kinds: Vec<Kind>,
}

/// What ranks of one kind need.
#[derive(PartialEq)]
pub struct Kind {
    /// Which of the links they are on.
    pub link: usize,
    /// Tables by link of the rank that comes next, each in the order of [`slices`].
    pub tables: Vec<Vec<Option<Cost>>>,
}

/// The longest way to the end of a tail, from a stage of this cost on: `behind` is that of the stages behind.
pub fn way(cost: &Cost, behind: Time) -> Time {
    cost.fill + cost.tail.max(behind)
}

/// All slices that leave a layer for every other rank, in the order of a table.
pub fn slices(layers: usize, ranks: usize) -> impl Iterator<Item = Range<usize>> {
    let most = layers + 1 - ranks;
    (0..layers).flat_map(move |from| (from + 1..=layers.min(from + most)).map(move |to| from..to))
}

/// A split and its wall time.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// The longest way to the end of a tail and the largest `rest`.
    pub wall: Time,
    /// Stages in the order in which hidden states pass: the kind of rank and its layers.
    pub stages: Vec<(usize, Range<usize>)>,
}

/// Finds the split with the smallest wall time; among those that are found equal, the one with the smallest
/// sum of squared times, so that equal ranks share evenly, and the one that uses ranks in their order. None
/// where nothing fits, or nothing takes less than `beat`.
pub fn split(costs: &Costs, orders: &Orders, beat: Option<Time>) -> Option<Split> {
    let beat = beat.unwrap_or(Time::MAX);
    let tables = costs.kinds.iter().flat_map(|kind| &kind.tables);
    let mut limits: Vec<Time> = tables.flatten().flatten().map(|cost| cost.rest).collect();
    limits.sort_unstable();
    limits.dedup();
    limits.truncate(limits.partition_point(|&limit| limit < beat));
    let loosest = limits.len().checked_sub(1)?;
    let mut search = Search { costs, orders, limits, beat, best: None };
    search.below(0, loosest);
    search.best
}

/// The shortest longest way under a bound of `rest`.
struct Bounded {
    way: Time,
    rest: Time,
    stages: Vec<(usize, Range<usize>)>,
}

struct Search<'a> {
    costs: &'a Costs,
    orders: &'a Orders,
    limits: Vec<Time>,
    beat: Time,
    best: Option<Split>,
}

impl Search<'_> {
    /// Looks for something better under the bounds `limits[low..high]`, where the longest way is at least
    /// `least`.
    fn halve(&mut self, low: usize, high: usize, least: Time) {
        if low < high && self.limits[low] + least < self.beat {
            let middle = low + (high - low) / 2;
            self.below(low, middle);
            self.halve(middle + 1, high, least);
        }
    }

    /// Looks under the bound `limits[high]` and, where something fits, under all smaller ones from `low` on.
    fn below(&mut self, low: usize, high: usize) {
        let Some(found) = self.bounded(self.limits[high]) else { return };
        let reached = self.limits.partition_point(|&limit| limit < found.rest);
        if found.way + found.rest < self.beat {
            self.beat = found.way + found.rest;
            self.best = Some(Split { wall: self.beat, stages: found.stages });
        }
        self.halve(low, reached, found.way);
    }

    fn bounded(&self, limit: Time) -> Option<Bounded> {
        let (layers, ranks) = (self.costs.layers, self.orders.ranks());
        let links = self.costs.kinds.iter().map(|kind| kind.tables.len()).max().unwrap_or(0);
        let choices: Vec<Vec<_>> = (self.costs.kinds.iter())
            .map(|kind| kind.tables.iter().map(|table| choices(layers, ranks, table, limit)).collect())
            .collect();
        // The best of giving layers from.. to the ranks that a state has not used, the first of them on a
        // link: value and first step.
        let at = |from: usize, link: usize| from * links + link;
        let mut best = vec![vec![None::<Step>; (layers + 1) * links]; self.orders.next.len()];
        let last = best.len() - 1;
        // Nobody comes behind the last rank: one link stands for all.
        best[last][at(layers, 0)] = Some(Step::default());
        for state in (0..last).rev() {
            let left = ranks - self.orders.used[state];
            // At least one layer for every rank, before and behind.
            for from in self.orders.used[state]..=layers - left {
                for &(kind, next) in &self.orders.next[state] {
                    let mut least = best[state][at(from, self.costs.kinds[kind].link)].take();
                    for (link, choices) in choices[kind].iter().enumerate() {
                        for choice in &choices[from] {
                            let Some(behind) = &best[next][at(choice.to, link)] else { continue };
                            let way = way(&choice.cost, behind.value.0);
                            let value = (way, choice.square + behind.value.1);
                            if least.as_ref().is_none_or(|least| value < least.value) {
                                least = Some(Step { value, kind, to: choice.to, next, link });
                            }
                        }
                    }
                    best[state][at(from, self.costs.kinds[kind].link)] = least;
                }
            }
        }
        let first = (0..links).filter(|&link| best[0][link].is_some());
        let mut link = first.min_by_key(|&link| best[0][link].as_ref().map(|step| step.value))?;
        let way = best[0][link].as_ref()?.value.0;
        let (mut state, mut from, mut rest, mut stages) = (0, 0, 0, Vec::with_capacity(ranks));
        while state != last {
            let step = best[state][at(from, link)].as_ref().expect("a step of a way that reaches the end");
            let choice = choices[step.kind][step.link][from].iter().find(|choice| choice.to == step.to);
            rest = rest.max(choice.expect("a step is one of the choices").cost.rest);
            stages.push((step.kind, from..step.to));
            (state, from, link) = (step.next, step.to, step.link);
        }
        Some(Bounded { way, rest, stages })
    }
}

/// The longest way, then the sum of squared times.
type Value = (Time, Time);

#[derive(Clone, Debug, Default)]
struct Step {
    value: Value,
    kind: usize,
    to: usize,
    next: usize,
    /// The link of the rank that comes next.
    link: usize,
}

struct Choice {
    to: usize,
    cost: Cost,
    square: Time,
}

/// What a kind of rank can take by first layer, the largest slice first.
fn choices(layers: usize, ranks: usize, table: &[Option<Cost>], limit: Time) -> Vec<Vec<Choice>> {
    let mut choices: Vec<Vec<Choice>> = (0..layers).map(|_| vec![]).collect();
    for (slice, cost) in slices(layers, ranks).zip(table) {
        if let Some(cost) = cost.filter(|cost| cost.rest <= limit) {
            // Microseconds: squares of femtoseconds could overflow.
            let busy = (cost.fill + cost.rest + cost.tail) / 1_000_000_000;
            choices[slice.start].push(Choice { to: slice.end, cost, square: busy * busy });
        }
    }
    choices.iter_mut().for_each(|from| from.reverse());
    choices
}
