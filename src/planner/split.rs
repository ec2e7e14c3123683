//! The exact split: which slices, on which kinds of ranks, in which order.
//!
//! With S stages and G groups of micro-batches, the first group passes every stage, and then the slowest
//! stage sets the pace, so the wall time is the sum of all stages' `fill` and the largest `rest`. For a
//! given bound of `rest` the smallest sum is a dynamic programme over (ranks used, first layer not yet
//! given). The bound that gives the smallest wall time is found by halving the list of all values that
//! `rest` can take; a part of the list that can't hold anything better is left out.

use std::ops::Range;

use super::cost::{Cost, Time};
use super::orders::Orders;

/// What each kind of rank needs for each slice; none where the slice doesn't fit.
pub struct Costs {
    layers: usize,
    kinds: Vec<Vec<Option<Cost>>>,
}

impl Costs {
    /// Tables by kind, each in the order of [`slices`].
    pub fn new(layers: usize, kinds: Vec<Vec<Option<Cost>>>) -> Costs {
        Costs { layers, kinds }
    }
}

/// All slices, in the order of a table.
pub fn slices(layers: usize) -> impl Iterator<Item = Range<usize>> {
    (0..layers).flat_map(move |from| (from + 1..=layers).map(move |to| from..to))
}

/// A split and its wall time.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// The sum of `fill` and the largest `rest`.
    pub wall: Time,
    /// Stages in the order in which hidden states pass: the kind of rank and its layers.
    pub stages: Vec<(usize, Range<usize>)>,
}

/// Finds the split with the smallest wall time; among those that are found equal, the one with the smallest
/// sum of squared times, so that equal ranks share evenly, and the one that uses ranks in their order. None
/// where nothing fits, or nothing takes less than `beat`.
pub fn split(costs: &Costs, orders: &Orders, beat: Option<Time>) -> Option<Split> {
    let mut limits: Vec<Time> = costs.kinds.iter().flatten().flatten().map(|cost| cost.rest).collect();
    limits.sort_unstable();
    limits.dedup();
    let mut search = Search { costs, orders, limits, beat: beat.unwrap_or(Time::MAX), best: None };
    let loosest = search.limits.len().checked_sub(1)?;
    search.below(0, loosest);
    search.best
}

/// The smallest sum of `fill` under a bound of `rest`.
struct Bounded {
    fill: Time,
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
    /// Looks for something better under the bounds `limits[low..high]`, where the sum of `fill` is at least
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
        if found.fill + found.rest < self.beat {
            self.beat = found.fill + found.rest;
            self.best = Some(Split { wall: self.beat, stages: found.stages });
        }
        self.halve(low, reached, found.fill);
    }

    fn bounded(&self, limit: Time) -> Option<Bounded> {
        let (layers, ranks) = (self.costs.layers, self.orders.ranks());
        let choices: Vec<_> =
            self.costs.kinds.iter().map(|table| choices(layers, ranks, table, limit)).collect();
        // The best of giving layers from.. to the ranks that a state has not used: value and first step.
        let mut best = vec![vec![None::<Step>; layers + 1]; self.orders.next.len()];
        let last = best.len() - 1;
        best[last][layers] = Some(Step::default());
        for state in (0..last).rev() {
            let left = ranks - self.orders.used[state];
            // At least one layer for every rank, before and behind.
            for from in self.orders.used[state]..=layers - left {
                let mut least: Option<Step> = None;
                for &(kind, next) in &self.orders.next[state] {
                    for choice in &choices[kind][from] {
                        let Some(behind) = &best[next][choice.to] else { continue };
                        let value = (choice.value.0 + behind.value.0, choice.value.1 + behind.value.1);
                        if least.as_ref().is_none_or(|least| value < least.value) {
                            least = Some(Step { value, kind, to: choice.to, next });
                        }
                    }
                }
                best[state][from] = least;
            }
        }
        let fill = best[0][0].as_ref()?.value.0;
        let (mut state, mut from, mut rest, mut stages) = (0, 0, 0, Vec::with_capacity(ranks));
        while state != last {
            let step = best[state][from].as_ref().expect("a step of a way that reaches the end");
            let choice = choices[step.kind][from].iter().find(|choice| choice.to == step.to);
            rest = rest.max(choice.expect("a step is one of the choices").rest);
            stages.push((step.kind, from..step.to));
            (state, from) = (step.next, step.to);
        }
        Some(Bounded { fill, rest, stages })
    }
}

/// Sum of `fill`, then of squared times.
type Value = (Time, Time);

#[derive(Clone, Debug, Default)]
struct Step {
    value: Value,
    kind: usize,
    to: usize,
    next: usize,
}

struct Choice {
    to: usize,
    value: Value,
    rest: Time,
}

/// What a kind of rank can take by first layer, the largest slice first.
fn choices(layers: usize, ranks: usize, table: &[Option<Cost>], limit: Time) -> Vec<Vec<Choice>> {
    let mut choices: Vec<Vec<Choice>> = (0..layers).map(|_| vec![]).collect();
    for (slice, cost) in slices(layers).zip(table).filter(|(slice, _)| slice.len() + ranks <= layers + 1) {
        if let Some(cost) = cost.filter(|cost| cost.rest <= limit) {
            // Microseconds: squares of femtoseconds could overflow.
            let busy = (cost.fill + cost.rest) / 1_000_000_000;
            let value = (cost.fill, busy * busy);
            choices[slice.start].push(Choice { to: slice.end, value, rest: cost.rest });
        }
    }
    choices.iter_mut().for_each(|from| from.reverse());
    choices
}
