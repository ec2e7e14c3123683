//! The order in which a sweep visits layers, and the micro-batches of each visit. Pure arithmetic.

use std::ops::Range;

use super::routes::Route;

/// One group's visit to one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The layer.
    pub layer: usize,
    /// The group.
    pub group: Range<usize>,
    /// The micro-batches of the group that pass this layer or enter the stage here, in order.
    pub micro_batches: Vec<usize>,
    /// Whether the visit needs the layer's weights.
    pub needs_weights: bool,
    /// Whether every micro-batch has passed the layer after this visit, and the sweep wants the layer then.
    pub completes: bool,
    /// Whether this is the group's first visit.
    pub begins_group: bool,
    /// Whether this is the group's last visit.
    pub ends_group: bool,
    /// Whether the group is the last one.
    pub last_group: bool,
}

impl Visit {
    /// The route of one of the visit's micro-batches.
    pub fn route<'r>(&self, routes: &'r [Option<Route>], micro_batch: usize) -> &'r Route {
        routes[micro_batch].as_ref().expect("visits are made of routes")
    }

    /// The route of the visit's first micro-batch.
    pub fn first_route<'r>(&self, routes: &'r [Option<Route>]) -> Option<&'r Route> {
        self.micro_batches.first().map(|&i| self.route(routes, i))
    }
}

/// All visits of a sweep over `layers`, group after group. A layer that `completes` is visited with the last group even
/// where no micro-batch has to pass it.
pub fn visits(
    layers: &Range<usize>,
    routes: &[Option<Route>],
    group: usize,
    completes: &dyn Fn(usize) -> bool,
) -> Vec<Visit> {
    let mut visits: Vec<Visit> = Vec::new();
    for start in (0..routes.len()).step_by(group.max(1)) {
        let group = start..(start + group).min(routes.len());
        let last_group = group.end == routes.len();
        let begin = visits.len();
        for layer in layers.clone() {
            let on = |i: &usize, here: &dyn Fn(&Route) -> bool| routes[*i].as_ref().is_some_and(here);
            let here = |route: &Route| route.passes(layer) || route.enter == layer;
            let micro_batches: Vec<usize> = group.clone().filter(|i| on(i, &here)).collect();
            let completes = last_group && completes(layer);
            if micro_batches.is_empty() && !completes {
                continue;
            }
            visits.push(Visit {
                layer,
                needs_weights: completes || micro_batches.iter().any(|i| on(i, &|route| route.passes(layer))),
                group: group.clone(),
                micro_batches,
                completes,
                begins_group: visits.len() == begin,
                ends_group: false,
                last_group,
            });
        }
        if let Some(last) = visits[begin..].last_mut() {
            last.ends_group = true;
        }
    }
    visits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(enter: usize, until: usize) -> Option<Route> {
        Some(Route { enter, kept: false, until, passes_on: false })
    }

    fn seen(visits: &[Visit]) -> Vec<(usize, Vec<usize>, bool)> {
        visits.iter().map(|v| (v.layer, v.micro_batches.clone(), v.completes)).collect()
    }

    #[test]
    fn groups_come_by_one_after_another() {
        let routes = [route(2, 4), route(2, 4), route(2, 4)];
        let visits = visits(&(2..4), &routes, 2, &|_| true);
        assert_eq!(
            seen(&visits),
            [(2, vec![0, 1], false), (3, vec![0, 1], false), (2, vec![2], true), (3, vec![2], true)]
        );
        let ends: Vec<_> = visits.iter().map(|v| (v.begins_group, v.ends_group, v.last_group)).collect();
        assert_eq!(
            ends,
            [(true, false, false), (false, true, false), (true, false, true), (false, true, true)]
        );
    }

    #[test]
    fn only_what_is_left_is_visited() {
        let visits = visits(&(0..6), &[None, route(3, 5), route(0, 0)], 3, &|layer| layer == 5);
        assert_eq!(
            seen(&visits),
            [(0, vec![2], false), (3, vec![1], false), (4, vec![1], false), (5, vec![], true)]
        );
        let weights: Vec<_> = visits.iter().map(|v| v.needs_weights).collect();
        assert_eq!(weights, [false, true, true, true]);
    }
}
