//! The exact split of layers over ranks.

use super::{ModelCost, Node, Work};
use crate::error::{Error, Result};

/// Layers by rank, in rank order, each at least one.
///
/// Two dynamic programmes over (rank, first layer not yet given): the first finds the smallest possible
/// time of the slowest rank, the second, among the splits that reach it, the one with the smallest sum
/// of squared times, so that equal machines share evenly. Both take O(ranks · layers²). Times are
/// compared after rounding rates to steps of 25 %, so that measurement noise between equal machines
/// doesn't tilt the split.
///
/// # Errors
/// Exit code 4 where no split fits every rank's memory; the smallest rank is named.
pub fn split(nodes: &[Node], model: &ModelCost, work: &Work) -> Result<Vec<usize>> {
    let layers = model.layers();
    let group = work.group(nodes.len());
    let cost = |rank: usize, from: usize, to: usize| -> f64 {
        let slice = from..to;
        if model.peak_memory(&slice, group, work) > nodes[rank].memory {
            f64::INFINITY
        } else {
            work.seconds(&steady(&nodes[rank]), &slice, model)
        }
    };
    let slowest = best(nodes.len(), layers, &cost, &|a: f64, b| a.max(b));
    let Some((limit, _)) = slowest else {
        let smallest = nodes.iter().min_by_key(|node| node.memory).expect("a job has ranks");
        let needed = (0..layers).map(|l| model.peak_memory(&(l..l + 1), group, work)).max().unwrap_or(0);
        return Err(Error::plan(format!(
            "no split fits: rank {} ({}) may use {}, one layer needs up to {}",
            smallest.rank,
            smallest.host,
            crate::units::binary(smallest.memory),
            crate::units::binary(needed),
        ))
        .fix("leave this rank out, raise --memory-per-rank or shorten --calib-max-tokens"));
    };
    let even = |rank: usize, from: usize, to: usize| {
        let seconds = cost(rank, from, to);
        if seconds > limit { f64::INFINITY } else { seconds * seconds }
    };
    let (_, counts) = best(nodes.len(), layers, &even, &|a, b| a + b).expect("the limit was reached");
    Ok(counts)
}

/// The node with rates rounded to a grid of 25 % steps.
fn steady(node: &Node) -> Node {
    let grid = |rate: f64| 1.25f64.powf(rate.log(1.25).round());
    Node { flops: grid(node.flops), read_rate: grid(node.read_rate), ..node.clone() }
}

/// Minimises the combined cost of contiguous slices; ties go to the larger earlier slice, which is the
/// order in which candidates are tried.
fn best(
    ranks: usize,
    layers: usize,
    cost: &dyn Fn(usize, usize, usize) -> f64,
    combine: &dyn Fn(f64, f64) -> f64,
) -> Option<(f64, Vec<usize>)> {
    // value[r][l]: the best of giving layers l.. to ranks r..
    let mut value = vec![vec![f64::INFINITY; layers + 1]; ranks + 1];
    let mut choice = vec![vec![0; layers + 1]; ranks];
    value[ranks][layers] = 0.0;
    for rank in (0..ranks).rev() {
        for from in 0..layers {
            for to in (from + 1..=layers).rev() {
                let total = combine(cost(rank, from, to), value[rank + 1][to]);
                if total < value[rank][from] {
                    value[rank][from] = total;
                    choice[rank][from] = to;
                }
            }
        }
    }
    if value[0][0].is_infinite() {
        return None;
    }
    let mut from = 0;
    let counts = choice
        .iter()
        .map(|row| {
            let count = row[from] - from;
            from = row[from];
            count
        })
        .collect();
    Some((value[0][0], counts))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{model, node, work};
    use super::*;

    /// Every split of `layers` over `ranks`, tried one by one.
    fn exhaustive(nodes: &[Node], model: &ModelCost, work: &Work) -> f64 {
        fn walk(nodes: &[Node], rank: usize, from: usize, model: &ModelCost, work: &Work) -> f64 {
            let layers = model.layers();
            if rank == nodes.len() {
                return if from == layers { 0.0 } else { f64::INFINITY };
            }
            (from + 1..=layers)
                .map(|to| {
                    let group = work.group(nodes.len());
                    let fits = model.peak_memory(&(from..to), group, work) <= nodes[rank].memory;
                    let mine = if fits {
                        work.seconds(&steady(&nodes[rank]), &(from..to), model)
                    } else {
                        f64::INFINITY
                    };
                    mine.max(walk(nodes, rank + 1, to, model, work))
                })
                .fold(f64::INFINITY, f64::min)
        }
        walk(nodes, 0, 0, model, work)
    }

    #[test]
    fn the_slowest_rank_is_as_fast_as_it_can_be() {
        for rates in [[1e9, 1e9, 1e9], [1e9, 4e9, 2e9], [1e10, 1e9, 1e8]] {
            let nodes: Vec<Node> = rates.iter().enumerate().map(|(r, &f)| node(r, 1 << 30, f)).collect();
            let model = model(11);
            let counts = split(&nodes, &model, &work()).unwrap();
            let mut from = 0;
            let mut slowest = 0f64;
            for (node, count) in nodes.iter().zip(&counts) {
                slowest = slowest.max(work().seconds(&steady(node), &(from..from + count), &model));
                from += count;
            }
            assert_eq!(slowest, exhaustive(&nodes, &model, &work()), "{counts:?}");
        }
    }

    #[test]
    fn noise_between_equal_machines_does_not_tilt_the_split() {
        let nodes = [node(0, 1 << 30, 1.02e9), node(1, 1 << 30, 0.99e9), node(2, 1 << 30, 1e9)];
        assert_eq!(split(&nodes, &model(30), &work()).unwrap(), [10, 10, 10]);
    }

    #[test]
    fn a_rank_too_small_for_one_layer_is_named() {
        let nodes = [node(0, 1 << 30, 1e9), node(1, 1 << 10, 1e9)];
        let error = split(&nodes, &model(4), &work()).unwrap_err().to_string();
        assert!(error.contains("rank 1 (host1)"), "{error}");
    }
}
