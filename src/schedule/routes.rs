//! Finds which layers of each stage every micro-batch passes, and where its hidden states come from. In a first run
//! that is all layers; in a resumed one those for which something is left to do. Pure arithmetic, the same on every
//! rank.

use std::ops::Range;

use super::kept::Kept;

/// The layers of a stage that one micro-batch passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The first layer that it passes.
    pub enter: usize,
    /// Whether its hidden states are read from a file or memory, rather than received from the stage before (on the
    /// first stage: embedded).
    pub kept: bool,
    /// The layer behind the last that it passes.
    pub until: usize,
    /// Whether it goes on to the next stage.
    pub passes_on: bool,
}

impl Route {
    /// Whether it passes a layer.
    pub fn passes(&self, layer: usize) -> bool {
        (self.enter..self.until).contains(&layer)
    }
}

/// The routes of all micro-batches through a stage; none for those that need not pass it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// The routes of the sweep that only computes hidden states; empty where there is no such sweep.
    pub forward: Vec<Option<Route>>,
    /// The routes of the sweep that gathers maxima or statistics.
    pub own: Vec<Option<Route>>,
}

impl Routes {
    /// The layer whose inputs the first sweep keeps for the second, and whether those of this micro-batch are among
    /// them. What was kept by an earlier run need not be kept again.
    pub fn captures(&self, micro_batch: usize) -> Option<usize> {
        let forward = self.forward.get(micro_batch)?.as_ref()?;
        let own = self.own[micro_batch].as_ref()?;
        (own.kept && !forward.kept).then_some(own.enter)
    }

    /// How many times a micro-batch is computed through a layer, over both sweeps.
    pub fn passes(&self) -> usize {
        self.forward.iter().chain(&self.own).flatten().map(|route| route.until - route.enter).sum()
    }
}

/// A stage, and the kept hidden states that it can read.
pub struct StageFiles {
    /// Its layers.
    pub layers: Range<usize>,
    /// The files that it can read.
    pub kept: Vec<Kept>,
}

/// Routes by stage. `documents` are those of each micro-batch; `needs` says whether a layer must still see a
/// micro-batch. With `two_sweeps` a layer needs all micro-batches or none, and is looked at after hidden states have
/// gone on to the next stage.
pub fn routes(
    stages: &[StageFiles],
    documents: &[Range<usize>],
    needs: &dyn Fn(usize, usize) -> bool,
    two_sweeps: bool,
) -> Vec<Routes> {
    let mut wanted = vec![false; documents.len()];
    let mut all: Vec<Routes> = (stages.iter().rev())
        .map(|station| {
            let routes = station.routes(documents, needs, two_sweeps, &wanted);
            let from_before = |route: &Option<Route>| {
                route.as_ref().is_some_and(|r| !r.kept && r.enter == station.layers.start)
            };
            for (i, wanted) in wanted.iter_mut().enumerate() {
                *wanted = from_before(&routes.own[i]) || routes.forward.get(i).is_some_and(from_before);
            }
            routes
        })
        .collect();
    all.reverse();
    all
}

impl StageFiles {
    fn routes(
        &self,
        documents: &[Range<usize>],
        needs: &dyn Fn(usize, usize) -> bool,
        two_sweeps: bool,
        wanted: &[bool],
    ) -> Routes {
        let Range { start, end } = self.layers;
        // Layer by micro-batch, from the newest kept states that are not too new.
        let route = |i: usize, newest: usize, until: usize, passes_on: bool| {
            let before = (self.kept.iter())
                .filter(|kept| (start..=newest).contains(&kept.layer) && kept.covers(&documents[i]));
            let kept = before.map(|kept| kept.layer).max();
            Route { enter: kept.unwrap_or(start), kept: kept.is_some(), until, passes_on }
        };
        let walks_twice = two_sweeps && wanted.contains(&true);
        let mut routes = Routes::default();
        for (i, &wanted) in wanted.iter().enumerate() {
            let mut needed = self.layers.clone().filter(|&layer| needs(layer, i));
            let first = needed.next();
            let behind = needed.next_back().or(first).map(|layer| layer + 1);
            if !walks_twice {
                let until = if wanted { Some(end) } else { behind };
                let newest = first.unwrap_or(end - 1);
                routes.own.push(until.map(|until| route(i, newest, until, wanted)));
                continue;
            }
            let mut own = first.map(|first| route(i, first, behind.unwrap_or(end), false));
            let forward = match &mut own {
                // What the first stage embeds it can embed again.
                Some(own) if !own.kept && (start > 0 || (wanted && first > Some(0))) => {
                    // Whatever comes from the stage before comes in the first sweep, in order.
                    let first = first.unwrap_or(start);
                    (own.enter, own.kept) = (first, true);
                    let until = if wanted { end } else { first };
                    Some(Route { enter: start, kept: false, until, passes_on: wanted })
                }
                _ => wanted.then(|| route(i, end - 1, end, true)),
            };
            routes.forward.push(forward);
            routes.own.push(own);
        }
        routes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn documents(count: usize) -> Vec<Range<usize>> {
        (0..count).map(|i| i..i + 1).collect()
    }

    fn stages(ends: &[usize], kept: &[Kept]) -> Vec<StageFiles> {
        let starts = std::iter::once(&0).chain(ends);
        let layers = starts.zip(ends).map(|(&start, &end)| start..end);
        layers
            .map(|layers| StageFiles {
                kept: kept.iter().filter(|kept| layers.contains(&kept.layer)).cloned().collect(),
                layers,
            })
            .collect()
    }

    fn passes(routes: &[Routes]) -> usize {
        routes.iter().map(Routes::passes).sum()
    }

    #[test]
    fn a_first_run_walks_everything_and_twice_where_others_wait() {
        let all = |two_sweeps| routes(&stages(&[2, 5, 6], &[]), &documents(4), &|_, _| true, two_sweeps);
        assert_eq!(passes(&all(false)), 6 * 4);
        assert_eq!(passes(&all(true)), (6 + 5) * 4);
        assert!(all(true)[0].captures(0).is_none(), "the first stage embeds again");
        assert_eq!(all(true)[1].captures(0), Some(2));
        assert!(all(true)[2].forward.is_empty(), "nobody waits for the last stage");
    }

    #[test]
    fn kept_states_spare_the_stages_before() {
        let kept = [Kept { layer: 3, documents: 0..4 }];
        let needs = |layer: usize, _: usize| layer >= 3;
        for two_sweeps in [false, true] {
            let routes = routes(&stages(&[2, 6], &kept), &documents(4), &needs, two_sweeps);
            assert_eq!((routes[0].passes(), routes[1].passes()), (0, 3 * 4));
        }
    }

    #[test]
    fn the_second_sweep_skips_what_is_finished() {
        let all = routes(&stages(&[4, 6], &[]), &documents(4), &|layer, _| layer >= 3, true);
        assert_eq!(all[0].captures(0), Some(3));
        assert_eq!((all[0].passes(), all[1].passes()), (4 * 4 + 4, 2 * 4));
    }

    #[test]
    fn micro_batches_that_all_layers_have_seen_stay_out() {
        let all = routes(&stages(&[2, 6], &[]), &documents(10), &|_, i| i >= 7, false);
        assert_eq!(passes(&all), 6 * 3);
    }

    /// Moves every micro-batch along its routes, and sees what arrives where.
    fn follow(
        ends: &[usize],
        kept: &[Kept],
        routes: &[Routes],
        count: usize,
        needs: &dyn Fn(usize, usize) -> bool,
    ) -> Result<(), TestCaseError> {
        let mut sent: Vec<usize> = vec![];
        for (station, routes) in stages(ends, kept).iter().zip(routes) {
            let (mut received, mut passed_on, mut captured) = (vec![], vec![], vec![]);
            for (sweep, own) in [(&routes.forward, false), (&routes.own, true)] {
                for (i, route) in sweep.iter().enumerate() {
                    let Some(route) = route else { continue };
                    let here = station.kept.iter().any(|k| k.holds(route.enter, &(i..i + 1)));
                    if !route.kept {
                        prop_assert_eq!(route.enter, station.layers.start);
                        if station.layers.start > 0 {
                            received.push(i);
                        }
                    } else if own {
                        prop_assert!(here || captured.contains(&(i, route.enter)), "{:?}", route);
                    } else {
                        prop_assert!(here, "{:?}", route);
                    }
                    if !own && let Some(layer) = routes.captures(i) {
                        prop_assert!((route.enter..=route.until).contains(&layer));
                        captured.push((i, layer));
                    }
                    if route.passes_on {
                        prop_assert_eq!(route.until, station.layers.end);
                        passed_on.push(i);
                    }
                }
            }
            prop_assert_eq!(&received, &sent, "what comes is what was sent, in order");
            for i in 0..count {
                for layer in station.layers.clone().filter(|&layer| needs(layer, i)) {
                    prop_assert!(routes.own[i].as_ref().is_some_and(|route| route.passes(layer)));
                }
            }
            sent = passed_on;
        }
        prop_assert!(sent.is_empty());
        Ok(())
    }

    proptest! {
        #[test]
        fn whatever_is_left_and_kept_every_layer_sees_what_it_needs(
            cuts in proptest::collection::btree_set(1usize..8, 0..4),
            kept in proptest::collection::vec((1usize..8, 0usize..6, 1usize..6), 0..5),
            done in proptest::collection::vec(any::<bool>(), 8),
            seen in proptest::collection::vec(0usize..=6, 8),
            two_sweeps in any::<bool>(),
        ) {
            let ends: Vec<usize> = cuts.into_iter().chain([8]).collect();
            let kept: Vec<Kept> = kept
                .into_iter()
                .map(|(layer, start, count)| Kept { layer, documents: start..(start + count).min(6) })
                .collect();
            let needs = |layer: usize, i: usize| !done[layer] && (two_sweeps || i >= seen[layer]);
            let routes = routes(&stages(&ends, &kept), &documents(6), &needs, two_sweeps);
            follow(&ends, &kept, &routes, 6, &needs)?;
        }
    }
}
