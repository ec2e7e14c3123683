//! Where the hidden states of a micro-batch come from before a layer, and where they go behind it.

use std::time::Instant;

use super::walker::{Leaving, SweepPlan, Walk};
use crate::backend::Solver;
use crate::error::{Error, Result};
use crate::planner::Mode;
use crate::schedule::{Route, Visit};
use crate::states::Keeping;

impl<'a, B: Solver> Walk<'a, B> {
    /// Prepares to keep hidden states in files: those that come into the layer from other stages, and those that leave
    /// the layer and stay on this rank. `kept_before` is the layer before which this group's were kept last.
    pub(super) fn open(&self, plan: SweepPlan<'a>, visit: &Visit, kept_before: usize) -> (Keeping, Keeping) {
        let (layer, routes) = (visit.layer, self.stage.routes);
        let captured = |i: usize, at: usize| plan.captures && routes.captures(i) == Some(at);
        let of = |which: &dyn Fn(usize, &Route) -> bool| -> Vec<usize> {
            let all = visit.micro_batches.iter().copied();
            all.filter(|&i| which(i, visit.route(plan.routes, i))).collect()
        };
        let coming = of(&|_, route| layer > 0 && route.enter == layer && !route.kept);
        let staying =
            of(&|i, route| route.passes(layer) && (route.passes(layer + 1) || captured(i, layer + 1)));
        let needed = |of: &[usize], at: usize| of.iter().any(|&i| captured(i, at));
        let after = needed(&staying, layer + 1) || self.stage.mode == Mode::Spilled;
        (
            self.keeper.open(layer, &coming, needed(&coming, layer), layer * coming.len()),
            self.keeper.open(layer + 1, &staying, after, (layer + 1 - kept_before) * staying.len()),
        )
    }

    /// Brings the hidden states of micro-batch `i` into `state`, unless the layer before has left them there: from the
    /// stage before or the embedding, from a file, or from host memory.
    pub(super) fn bring(
        &mut self,
        plan: SweepPlan<'a>,
        layer: usize,
        i: usize,
        state: &mut B::Tensor,
    ) -> Result<()> {
        let (stage, route) = (self.stage, plan.routes[i].as_ref().expect("visits are of routes"));
        if route.enter < layer && stage.mode != Mode::Spilled {
            return Ok(());
        }
        stage.backend.set_rows(state, self.batches[i].tokens);
        if route.enter == layer && !route.kept {
            let started = Instant::now();
            self.transfer.receive(stage.backend, i, state)?;
            if layer == 0 {
                self.decoder.embedded(state)?;
            }
            self.waited += started.elapsed().as_secs_f64();
            return Ok(());
        }
        let held = &mut self.held[i];
        let captured = if plan.captures { None } else { self.captured[i].take() };
        match (captured, self.keeper.states()) {
            (Some(captured), _) => *held = captured,
            (None, Some(states)) => states.read(layer, &stage.job.micro_batches[i].samples, held)?,
            (None, None) if held.is_empty() => return Err(Error::run("no hidden states were kept")),
            (None, None) => {}
        }
        // This copy runs beside the forward pass of the micro-batch before.
        let arrived = stage.backend.arrived(held, stage.job.model.hidden)?;
        stage.backend.copy(&arrived, state)?;
        // The buffer is used again only where hidden states are held in host memory.
        if stage.mode != Mode::Spilled || self.keeper.states().is_some() {
            *held = vec![];
        }
        Ok(())
    }

    /// Copies the hidden states of a spilled stage from the device, as they were at the moment `since`: to a file, or
    /// to host memory.
    pub(super) fn leave(
        &mut self,
        plan: SweepPlan<'a>,
        keeping: &mut Keeping,
        leaving: Option<Leaving<B::Moment>>,
        states: &[B::Tensor],
    ) -> Result<()> {
        let Some(Leaving { micro_batch: i, slot, since }) = leaving else { return Ok(()) };
        let (backend, state, layer) = (self.stage.backend, &states[slot], keeping.layer());
        if self.keeper.states().is_some() {
            return self.keeper.keep(keeping, i, |bytes| backend.download_as_of(&since, state, bytes));
        }
        let captured = plan.captures && self.stage.routes.captures(i) == Some(layer);
        if captured || plan.routes[i].as_ref().is_some_and(|route| route.passes(layer)) {
            backend.download_as_of(&since, state, &mut self.held[i])?;
        }
        if captured {
            self.captured[i] = Some(self.held[i].clone());
        }
        Ok(())
    }

    /// Keeps hidden states in a file. Where the second sweep begins with them and there is no directory, keeps them in
    /// host memory.
    pub(super) fn keep(
        &mut self,
        plan: SweepPlan<'a>,
        keeping: &mut Keeping,
        i: usize,
        x: &B::Tensor,
    ) -> Result<()> {
        let backend = self.stage.backend;
        let captured = plan.captures && self.stage.routes.captures(i) == Some(keeping.layer());
        if captured && self.keeper.states().is_none() {
            return backend.download(x, self.captured[i].insert(Vec::new()));
        }
        self.keeper.keep(keeping, i, |bytes| backend.download(x, bytes))
    }
}
