//! Sweeps over a rank's slice: groups of micro-batches are computed through layer after layer.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded};

use super::stage::Stage;
use super::sweeps::{Forward, Maxima, Statistics, Sweep};
use super::transfer::Transfer;
use crate::backend::{Backend, Solver};
use crate::error::{Error, Result};
use crate::finish::{Event, ToFinish};
use crate::forward::{Batch, Decoder, LayerWeights, Tables, Workspace};
use crate::planner::Mode;
use crate::progress::Work;
use crate::schedule::{Route, Visit, visits};
use crate::states::{Keeper, Keeping};
use crate::threads;

/// What all sweeps over a slice share.
pub struct Walk<'a, B: Solver> {
    pub(super) stage: &'a Stage<'a, B>,
    pub(super) transfer: Transfer<B>,
    pub(super) decoder: Decoder<'a, B>,
    pub(super) batches: Vec<Batch<B>>,
    /// Tokens of the largest micro-batch.
    largest_batch: usize,
    pub(super) keeper: Keeper<'a>,
    /// The hidden states with which the second sweep begins, by micro-batch; used where there is no directory for them.
    pub(super) captured: Vec<Option<Vec<u8>>>,
    /// Hidden states before the next layer, by micro-batch, in host memory; used where a stage is spilled and there is
    /// no directory for them.
    pub(super) held: Vec<Vec<u8>>,
    /// A moment of the device's clock, and the time on the timeline at which it was taken.
    clock: (B::Moment, f64),
    /// Passes that are not on the timeline yet.
    passing: Vec<Pass<B::Moment>>,
    /// Seconds of computing, by the device's clock.
    pub computed: f64,
    /// Seconds of waiting for hidden states.
    pub waited: f64,
    /// How many times a micro-batch was computed through a layer.
    pub passes: u64,
}

/// Layers and their weights, from the loading thread, in the order of the visits.
type Loaded<B> = Receiver<Result<(usize, LayerWeights<<B as Backend>::Tensor>)>>;

/// Weights that the walk, and perhaps the finisher, hold together.
type SharedWeights<B> = Arc<LayerWeights<<B as Backend>::Tensor>>;

/// One micro-batch's computation through one layer, by the device's clock.
struct Pass<M> {
    layer: usize,
    micro_batch: usize,
    start: M,
    end: M,
}

/// A micro-batch whose hidden states leave the device behind a layer.
pub struct Leaving<M> {
    /// Which micro-batch.
    pub micro_batch: usize,
    /// Which of the tensors on the device holds them.
    pub slot: usize,
    /// The moment at which they are complete.
    pub since: M,
}

/// The routes that a sweep follows, and the size of its groups.
#[derive(Clone, Copy)]
pub struct SweepPlan<'a> {
    /// By micro-batch; none for those that do not pass this stage.
    pub routes: &'a [Option<Route>],
    /// Micro-batches that go through a layer together.
    pub group: usize,
    /// Whether a second sweep follows, for which hidden states are captured.
    pub captures: bool,
}

/// What the visits of one sweep share.
struct Memory<B: Solver> {
    workspace: Workspace<B::Tensor>,
    /// Hidden states on the device: one tensor for each micro-batch of a group, or two in turn where the stage is
    /// spilled.
    states: Vec<B::Tensor>,
    /// Weights that stay loaded from group to group, by layer of the slice.
    resident: Vec<Option<SharedWeights<B>>>,
    /// The weights of the visit before, with which the device may still be computing, and the receiver that disconnects
    /// when the finisher has released them. The walk holds them for one visit more: freeing them sooner would make the
    /// loading of the next layer wait for the device.
    in_use: Option<(SharedWeights<B>, Option<Receiver<()>>)>,
    /// The first micro-batch of the sweep's first group.
    first_group: Option<usize>,
    /// The layer before which hidden states of this group were kept last.
    kept_before: usize,
}

impl<'a, B: Solver> Walk<'a, B> {
    /// Prepares the sweeps of a stage.
    pub fn new(stage: &'a Stage<'a, B>, transfer: Transfer<B>) -> Result<Walk<'a, B>> {
        let job = stage.job;
        let tables = Tables::new(&job.model, &job.lengths);
        let decoder = Decoder::new(stage.backend, &job.model, &tables)?;
        let batches: Vec<Batch<B>> = job
            .micro_batches
            .iter()
            .map(|mb| decoder.batch(&tables, mb.samples.start, &job.lengths[mb.samples.clone()]))
            .collect::<Result<_>>()?;
        let largest_batch = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
        let captured = batches.iter().map(|_| None).collect();
        let held = batches.iter().map(|_| vec![]).collect();
        let keeper = Keeper::new(stage.states, job);
        let moment = stage.backend.moment()?;
        // Waits until the device has reached this moment, so that the timeline's clock can be read beside it.
        stage.backend.seconds(&moment, &moment)?;
        Ok(Walk {
            stage,
            transfer,
            decoder,
            batches,
            largest_batch,
            keeper,
            captured,
            held,
            clock: (moment, stage.timeline.now()),
            passing: vec![],
            computed: 0.0,
            waited: 0.0,
            passes: 0,
        })
    }

    /// The only sweep of methods that need nothing but maxima.
    pub fn maxima(&mut self, finisher: &Sender<ToFinish<B>>) -> Result<()> {
        let stage = self.stage;
        let plan = SweepPlan { routes: &stage.routes.own, group: stage.group, captures: false };
        self.run(plan, &mut Maxima::new(stage, finisher)?)
    }

    /// The first sweep of methods with statistics: computes hidden states for the next stage, and captures those with
    /// which the second sweep begins.
    pub fn forward(&mut self) -> Result<()> {
        let routes = self.stage.routes;
        let again = routes.own.iter().flatten().filter(|route| route.kept).map(|route| route.enter).max();
        self.keeper.protect(again.unwrap_or(0));
        let plan = SweepPlan { routes: &routes.forward, group: self.stage.group, captures: true };
        self.run(plan, &mut Forward)?;
        self.keeper.protect(0);
        Ok(())
    }

    /// The second sweep of methods with statistics: all micro-batches through one layer after the other.
    pub fn statistics(&mut self, finisher: &Sender<ToFinish<B>>) -> Result<()> {
        let stage = self.stage;
        let plan = SweepPlan { routes: &stage.routes.own, group: self.batches.len(), captures: false };
        self.run(plan, &mut Statistics::new(stage, finisher)?)
    }

    /// Makes all visits of a sweep. A thread of its own loads the next layer meanwhile.
    fn run(&mut self, plan: SweepPlan<'a>, sweep: &mut dyn Sweep<B>) -> Result<()> {
        let stage = self.stage;
        let visits = visits(&stage.slice, plan.routes, plan.group, &|layer| sweep.completes(layer));
        let mut known = HashSet::new();
        let again = stage.mode != Mode::Resident;
        let to_load: Vec<usize> = (visits.iter().filter(|visit| visit.needs_weights))
            .map(|visit| visit.layer)
            .filter(|&layer| again || known.insert(layer))
            .collect();
        std::thread::scope(|scope| {
            let (to_walk, loaded) = bounded(stage.ahead());
            let load = move || {
                for layer in to_load {
                    let start = stage.timeline.now();
                    let weights = stage.load(layer);
                    stage.timeline.note(Work::Load, layer, 0, start, stage.timeline.now());
                    if to_walk.send(weights.map(|weights| (layer, weights))).is_err() {
                        break; // The walk has failed, and reports its own error.
                    }
                }
            };
            threads::scoped(scope, "load", load)?;
            self.visit_all(plan, &visits, &loaded, sweep)
        })
    }

    fn visit_all(
        &mut self,
        plan: SweepPlan<'a>,
        visits: &[Visit],
        loaded: &Loaded<B>,
        sweep: &mut dyn Sweep<B>,
    ) -> Result<()> {
        let stage = self.stage;
        let mut memory = self.memory(plan, visits)?;
        let first_route = visits.first().and_then(|visit| visit.first_route(plan.routes));
        let receives = first_route.is_some_and(|route| !route.kept);
        if stage.mode == Mode::Resident && stage.slice.start > 0 && receives {
            let started = Instant::now();
            self.offer_ahead(loaded, &mut memory.resident, sweep)?;
            self.waited += started.elapsed().as_secs_f64();
        }
        for visit in visits {
            self.visit(plan, visit, &mut memory, loaded, sweep)?;
        }
        let passed = std::mem::take(&mut self.passing);
        self.note(passed)
    }

    fn memory(&self, plan: SweepPlan<'a>, visits: &[Visit]) -> Result<Memory<B>> {
        let stage = self.stage;
        // In a spilled stage hidden states of one micro-batch leave the device while the next one passes the layer.
        let spilled = stage.mode == Mode::Spilled;
        let on_device = if spilled { 2 } else { plan.group }.min(self.batches.len());
        let state = |_| stage.backend.activation(self.largest_batch, stage.job.model.hidden);
        Ok(Memory {
            workspace: self.decoder.workspace(self.largest_batch)?,
            states: (0..on_device).map(state).collect::<Result<_>>()?,
            resident: stage.slice.clone().map(|_| None).collect(),
            in_use: None,
            first_group: visits.first().map(|visit| visit.group.start),
            kept_before: 0,
        })
    }

    /// One group's visit to one layer.
    fn visit(
        &mut self,
        plan: SweepPlan<'a>,
        visit: &Visit,
        memory: &mut Memory<B>,
        loaded: &Loaded<B>,
        sweep: &mut dyn Sweep<B>,
    ) -> Result<()> {
        let stage = self.stage;
        let weights = match memory.resident[visit.layer - stage.slice.start].take() {
            None if visit.needs_weights => Some(self.next_loaded(visit.layer, loaded)?),
            weights => weights,
        };
        let first_route = visit.first_route(plan.routes);
        if visit.begins_group {
            memory.kept_before = first_route.map_or(0, |route| if route.kept { route.enter } else { 0 });
        }
        // No early quantization beside the first group: later stages are waiting for its hidden states.
        let later_stages_wait =
            memory.first_group == Some(visit.group.start) && first_route.is_some_and(|route| route.passes_on);
        let released = match &weights {
            Some(weights) if !visit.completes && !later_stages_wait => sweep.offer(visit.layer, weights)?,
            _ => None,
        };
        let mut keeping = self.open(plan, visit, memory.kept_before);
        let keeps = keeping.1.any();
        let passing = self.pass_all(plan, visit, weights.as_deref(), memory, &mut keeping, sweep)?;
        // The passes of the visit before are noted only now. By this time the device has this visit's work, so it does
        // not run out of work while its clock is read.
        let passed = std::mem::replace(&mut self.passing, passing);
        self.note(passed)?;
        let documents = stage.job.micro_batches[visit.group.end - 1].samples.end;
        if keeps {
            memory.kept_before = visit.layer + 1;
            sweep.seen(visit.layer + 1, documents)?;
        }
        self.release(visit, weights, released, memory, sweep)?;
        if visit.ends_group {
            sweep.seen(stage.slice.end, documents)?;
        }
        Ok(())
    }

    /// The weights of `layer` from the loading thread.
    fn next_loaded(&self, layer: usize, loaded: &Loaded<B>) -> Result<SharedWeights<B>> {
        let next = loaded.recv().map_err(|_| Error::run("the loading thread ended early"))?;
        let (number, weights) = next?;
        if number != layer {
            return Err(Error::run(format!(
                "layer {number} was loaded where layer {layer} is due; please report this"
            )));
        }
        Ok(Arc::new(weights))
    }

    /// Computes a visit's micro-batches through its layer, and keeps or sends their hidden states.
    fn pass_all(
        &mut self,
        plan: SweepPlan<'a>,
        visit: &Visit,
        weights: Option<&LayerWeights<B::Tensor>>,
        memory: &mut Memory<B>,
        (before, after): &mut (Keeping, Keeping),
        sweep: &mut dyn Sweep<B>,
    ) -> Result<Vec<Pass<B::Moment>>> {
        let stage = self.stage;
        let spilled = stage.mode == Mode::Spilled;
        let (mut passing, mut leaving) = (vec![], None::<Leaving<B::Moment>>);
        for &i in &visit.micro_batches {
            let slot = match (spilled, &leaving) {
                (false, _) => i % memory.states.len(),
                (true, None) => 0,
                (true, Some(previous)) => 1 - previous.slot,
            };
            let state = &mut memory.states[slot];
            self.bring(plan, visit.layer, i, state)?;
            self.keep(plan, before, i, state)?;
            let route = visit.route(plan.routes, i);
            let Some(weights) = weights.filter(|_| route.passes(visit.layer)) else { continue };
            let start = stage.backend.moment()?;
            let mut observe = |site: usize, x: &mut B::Tensor| sweep.observe(visit.layer, i, site, x);
            let layer = &stage.job.model.layers[visit.layer];
            let (batch, workspace) = (&self.batches[i], &mut memory.workspace);
            self.decoder.layer(layer, weights, batch, workspace, state, &mut observe)?;
            let end = stage.backend.moment()?;
            passing.push(Pass { layer: visit.layer, micro_batch: i, start, end });
            stage.outbox.event(Event::Passed { layer: visit.layer })?;
            self.passes += 1;
            if route.passes_on && visit.layer + 1 == route.until {
                let shape = [self.batches[i].tokens, stage.job.model.hidden];
                self.transfer.send(stage.backend, i, state, shape)?;
            }
            if spilled {
                let previous = leaving.take();
                leaving = Some(Leaving { micro_batch: i, slot, since: stage.backend.moment()? });
                self.leave(plan, after, previous, &memory.states)?;
            } else {
                self.keep(plan, after, i, state)?;
            }
        }
        self.leave(plan, after, leaving, &memory.states)?;
        Ok(passing)
    }

    /// Gives a layer's weights to the finisher, keeps them for the next group, or holds them for one visit more.
    fn release(
        &self,
        visit: &Visit,
        weights: Option<SharedWeights<B>>,
        released: Option<Receiver<()>>,
        memory: &mut Memory<B>,
        sweep: &mut dyn Sweep<B>,
    ) -> Result<()> {
        if let Some((weights, released)) = memory.in_use.take() {
            drop(weights);
            // Waits until the finisher has released the layer, since memory is planned for three layers. Where the
            // finisher failed, it reports that itself.
            let _ = released.map(|released| released.recv());
        }
        match weights {
            Some(weights) if visit.completes => sweep.complete(visit.layer, weights)?,
            weights if self.stage.mode == Mode::Resident && !visit.last_group => {
                memory.resident[visit.layer - self.stage.slice.start] = weights;
            }
            // With the last group the finisher holds other layers, so there is no memory to hold this one longer.
            Some(weights) if !visit.last_group => memory.in_use = Some((weights, released)),
            _ => {}
        }
        Ok(())
    }

    /// Offers layers to the finisher as they are loaded, until the first hidden states arrive.
    fn offer_ahead(
        &self,
        loaded: &Loaded<B>,
        resident: &mut [Option<SharedWeights<B>>],
        sweep: &mut dyn Sweep<B>,
    ) -> Result<()> {
        let mut either = Select::new();
        let hidden = either.recv(&self.transfer.arrived);
        either.recv(loaded);
        while either.ready() != hidden {
            match loaded.try_recv() {
                Ok(next) => {
                    let (layer, weights) = next?;
                    let weights = resident[layer - self.stage.slice.start].insert(Arc::new(weights));
                    sweep.offer(layer, weights)?;
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => break,
            }
        }
        Ok(())
    }

    /// Puts passes on the timeline, when the device has completed them.
    fn note(&mut self, passes: Vec<Pass<B::Moment>>) -> Result<()> {
        let (moment, zero) = &self.clock;
        for Pass { layer, micro_batch, start, end } in passes {
            let at = |moment_of: &B::Moment| Ok(zero + self.stage.backend.seconds(moment, moment_of)?);
            let (start, end) = (at(&start)?, at(&end)?);
            self.stage.timeline.note(Work::Compute, layer, micro_batch, start, end);
            self.computed += end - start;
        }
        Ok(())
    }
}
