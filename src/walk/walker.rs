//! Sweeps over a slice: groups of micro-batches through layer after layer.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Select, Sender, TryRecvError, bounded};

use super::crossing::Crossing;
use super::stage::Stage;
use super::sweeps::{Forward, Maxima, Statistics, Sweep};
use crate::backend::{Backend, Solver};
use crate::error::{Error, Result};
use crate::finish::{Event, Finished};
use crate::forward::{Batch, Decoder, LayerWeights, Tables};
use crate::planner::Mode;
use crate::progress::Work;
use crate::schedule::{Route, Visit, visits};
use crate::states::{Keeper, Keeping};
use crate::threads;

/// What all sweeps over a slice share.
pub struct Walk<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    crossing: Crossing<B>,
    decoder: Decoder<'a, B>,
    batches: Vec<Batch<B>>,
    /// Tokens of the largest micro-batch.
    most: usize,
    keeper: Keeper<'a>,
    /// What the second sweep begins with, by micro-batch, where there is no directory for it.
    captured: Vec<Option<Vec<u8>>>,
    /// Hidden states before the next layer, by micro-batch, where neither the device nor a directory holds them.
    held: Vec<Vec<u8>>,
    /// The device's clock: a moment, and when it was on the timeline.
    clock: (B::Moment, f64),
    /// Passes that have not been noted yet.
    passing: Vec<Pass<B::Moment>>,
    /// Seconds of computing, by the device's clock.
    pub computed: f64,
    /// Seconds of waiting for hidden states.
    pub waited: f64,
    /// Micro-batches through layers.
    pub passes: u64,
}

/// Layers and their weights as the loading thread hands them over.
type Loaded<B> = Receiver<Result<(usize, LayerWeights<<B as Backend>::Tensor>)>>;

/// Weights of a slice that stay loaded.
type Resident<B> = Vec<Option<Arc<LayerWeights<<B as Backend>::Tensor>>>>;

/// Weights that the device is still computing with, and what ends when the finisher has done with them.
type InUse<B> = (Arc<LayerWeights<<B as Backend>::Tensor>>, Option<Receiver<()>>);

/// A micro-batch through a layer.
struct Pass<M> {
    layer: usize,
    micro_batch: usize,
    start: M,
    end: M,
}

/// A micro-batch whose hidden states leave the device behind a layer.
struct Leaving<M> {
    micro_batch: usize,
    /// Which of the states in memory are its own.
    slot: usize,
    /// When they are complete.
    since: M,
}

/// Which micro-batches pass what, and how many of them together.
#[derive(Clone, Copy)]
struct Course<'a> {
    routes: &'a [Option<Route>],
    group: usize,
    /// Whether another sweep follows, for which hidden states are captured.
    captures: bool,
}

impl<'a, B: Solver> Walk<'a, B> {
    pub fn new(stage: &'a Stage<'a, B>, crossing: Crossing<B>) -> Result<Walk<'a, B>> {
        let job = stage.job;
        let tables = Tables::new(&job.model, &job.lengths);
        let decoder = Decoder::new(stage.backend, &job.model, &tables)?;
        let batches: Vec<Batch<B>> = job
            .micro_batches
            .iter()
            .map(|mb| decoder.batch(&tables, mb.samples.start, &job.lengths[mb.samples.clone()]))
            .collect::<Result<_>>()?;
        let most = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
        let captured = batches.iter().map(|_| None).collect();
        let held = batches.iter().map(|_| vec![]).collect();
        let keeper = Keeper::new(stage.states, job);
        let moment = stage.backend.moment()?;
        stage.backend.seconds(&moment, &moment)?; // it has passed
        Ok(Walk {
            stage,
            crossing,
            decoder,
            batches,
            most,
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

    /// One sweep for methods that need maxima alone.
    pub fn maxima(&mut self, finisher: &Sender<Finished<B>>) -> Result<()> {
        let stage = self.stage;
        let course = Course { routes: &stage.routes.own, group: stage.group, captures: false };
        self.run(course, &mut Maxima::new(stage, finisher)?)
    }

    /// Hidden states alone, as far as the next stage. Captures what the second sweep begins with.
    pub fn forward(&mut self) -> Result<()> {
        let routes = self.stage.routes;
        let again = routes.own.iter().flatten().filter(|route| route.kept).map(|route| route.enter).max();
        self.keeper.protect(again.unwrap_or(0));
        let course = Course { routes: &routes.forward, group: self.stage.group, captures: true };
        self.run(course, &mut Forward)?;
        self.keeper.protect(0);
        Ok(())
    }

    /// Every layer over all micro-batches, with statistics.
    pub fn statistics(&mut self, finisher: &Sender<Finished<B>>) -> Result<()> {
        let stage = self.stage;
        let course = Course { routes: &stage.routes.own, group: self.batches.len(), captures: false };
        self.run(course, &mut Statistics::new(stage, finisher)?)
    }

    /// Makes all visits of a sweep, the next layer being loaded meanwhile.
    fn run(&mut self, course: Course<'a>, sweep: &mut dyn Sweep<B>) -> Result<()> {
        let stage = self.stage;
        let visits = visits(&stage.slice, course.routes, course.group, &|layer| sweep.completes(layer));
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
                        break; // the walk has failed and says why
                    }
                }
            };
            threads::scoped(scope, "load", load)?;
            self.run_loaded(course, &visits, &loaded, sweep)
        })
    }

    fn run_loaded(
        &mut self,
        course: Course<'a>,
        visits: &[Visit],
        loaded: &Loaded<B>,
        sweep: &mut dyn Sweep<B>,
    ) -> Result<()> {
        let stage = self.stage;
        let mut work = self.decoder.workspace(self.most)?;
        // Where hidden states leave the device, those of one micro-batch do while the next passes the layer.
        let spilled = stage.mode == Mode::Spilled;
        let in_memory = if spilled { 2 } else { course.group }.min(self.batches.len());
        let mut states = (0..in_memory)
            .map(|_| stage.backend.activation(self.most, stage.job.model.hidden))
            .collect::<Result<Vec<_>>>()?;
        let mut resident: Resident<B> = stage.slice.clone().map(|_| None).collect();
        let waits =
            visits.first().and_then(|visit| visit.enters(course.routes)).is_some_and(|route| !route.kept);
        if stage.mode == Mode::Resident && stage.slice.start > 0 && waits {
            let started = Instant::now();
            self.offer_ahead(loaded, &mut resident, sweep)?;
            self.waited += started.elapsed().as_secs_f64();
        }
        let first_group = visits.first().map(|visit| visit.group.start);
        // Given back before the device is done with it, a layer would hold up the next one's loading.
        let mut in_use: Option<InUse<B>> = None;
        // The layer before which the group's hidden states were kept last.
        let mut since = 0;
        for visit in visits {
            let slot = visit.layer - stage.slice.start;
            let weights = match resident[slot].take() {
                None if visit.needs_weights => {
                    let loaded = loaded.recv().map_err(|_| Error::run("the loading thread ended early"))?;
                    let (layer, weights) = loaded?;
                    if layer != visit.layer {
                        return Err(Error::run(format!(
                            "layer {layer} was loaded where layer {} is due; please report this",
                            visit.layer
                        )));
                    }
                    Some(Arc::new(weights))
                }
                weights => weights,
            };
            if visit.begins_group {
                since =
                    visit.enters(course.routes).map_or(0, |route| if route.kept { route.enter } else { 0 });
            }
            // While stages behind wait for the first group, nothing is done beside it that may be done later.
            let awaited = first_group == Some(visit.group.start)
                && visit.enters(course.routes).is_some_and(|route| route.passes_on);
            let lent = match &weights {
                Some(weights) if !visit.completes && !awaited => sweep.offer(visit.layer, weights)?,
                _ => None,
            };
            let (mut before, mut behind) = self.open(course, visit, since);
            let mut passing = vec![];
            let kept = behind.any();
            let mut leaving: Option<Leaving<B::Moment>> = None;
            for &i in &visit.micro_batches {
                let place = match (spilled, &leaving) {
                    (false, _) => i % in_memory,
                    (true, None) => 0,
                    (true, Some(before)) => 1 - before.slot,
                };
                let state = &mut states[place];
                self.bring(course, visit.layer, i, state)?;
                self.keep(course, &mut before, i, state)?;
                let route = visit.route(course.routes, i);
                if let (true, Some(weights)) = (route.passes(visit.layer), &weights) {
                    let start = stage.backend.moment()?;
                    let mut observe = |site: usize, x: &mut B::Tensor| sweep.observe(visit.layer, i, site, x);
                    let layer = &stage.job.model.layers[visit.layer];
                    self.decoder.layer(layer, weights, &self.batches[i], &mut work, state, &mut observe)?;
                    let end = stage.backend.moment()?;
                    passing.push(Pass { layer: visit.layer, micro_batch: i, start, end });
                    stage.outbox.event(Event::Walked { layer: visit.layer })?;
                    self.passes += 1;
                    if route.passes_on && visit.layer + 1 == route.until {
                        let shape = [self.batches[i].tokens, stage.job.model.hidden];
                        self.crossing.pass_on(stage.backend, i, state, shape)?;
                    }
                    match (spilled, leaving.take()) {
                        (false, _) => self.keep(course, &mut behind, i, state)?,
                        (true, before) => {
                            let since = stage.backend.moment()?;
                            leaving = Some(Leaving { micro_batch: i, slot: place, since });
                            self.leave(course, &mut behind, before, &states)?;
                        }
                    }
                }
            }
            self.leave(course, &mut behind, leaving, &states)?;
            // Those of the visit before: while the device passes them, it has been given this one's already.
            let passed = std::mem::replace(&mut self.passing, passing);
            self.note(passed)?;
            let documents = |i: usize| stage.job.micro_batches[i].samples.end;
            if kept {
                since = visit.layer + 1;
                sweep.seen(since, documents(visit.group.end - 1))?;
            }
            if let Some((weights, lent)) = in_use.take() {
                drop(weights);
                // Otherwise there would be a layer too many. A finisher that fails says so itself.
                let _ = lent.map(|lent| lent.recv());
            }
            match weights {
                Some(weights) if visit.completes => sweep.complete(visit.layer, weights)?,
                weights if stage.mode == Mode::Resident && !visit.last_group => resident[slot] = weights,
                // With the last group other layers are with the finisher, and there is no room for one more.
                Some(weights) if !visit.last_group => in_use = Some((weights, lent)),
                _ => {}
            }
            if visit.ends_group {
                sweep.seen(stage.slice.end, documents(visit.group.end - 1))?;
            }
        }
        let passed = std::mem::take(&mut self.passing);
        self.note(passed)
    }

    /// Offers layers as they are loaded, until the first hidden states are here: there is nothing else to do.
    fn offer_ahead(
        &self,
        loaded: &Loaded<B>,
        resident: &mut Resident<B>,
        sweep: &mut dyn Sweep<B>,
    ) -> Result<()> {
        let mut either = Select::new();
        let hidden = either.recv(&self.crossing.arrived);
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

    /// Notes passes on the timeline.
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

    /// Prepares to keep what comes into the layer from other stages, and what comes out of it and stays here.
    fn open(&self, course: Course<'a>, visit: &Visit, since: usize) -> (Keeping, Keeping) {
        let (layer, routes) = (visit.layer, self.stage.routes);
        let captured = |i: usize, at: usize| course.captures && routes.captures(i) == Some(at);
        let of = |which: &dyn Fn(usize, &Route) -> bool| -> Vec<usize> {
            let all = visit.micro_batches.iter().copied();
            all.filter(|&i| which(i, visit.route(course.routes, i))).collect()
        };
        let coming = of(&|_, route| layer > 0 && route.enter == layer && !route.kept);
        let staying =
            of(&|i, route| route.passes(layer) && (route.passes(layer + 1) || captured(i, layer + 1)));
        let needed = |of: &[usize], at: usize| of.iter().any(|&i| captured(i, at));
        let behind = needed(&staying, layer + 1) || self.stage.mode == Mode::Spilled;
        (
            self.keeper.open(layer, &coming, needed(&coming, layer), layer * coming.len()),
            self.keeper.open(layer + 1, &staying, behind, (layer + 1 - since) * staying.len()),
        )
    }

    /// Brings the hidden states of a micro-batch to a layer, where they are not there from the layer before.
    fn bring(&mut self, course: Course<'a>, layer: usize, i: usize, state: &mut B::Tensor) -> Result<()> {
        let (stage, route) = (self.stage, course.routes[i].as_ref().expect("visits are of routes"));
        if route.enter < layer && stage.mode != Mode::Spilled {
            return Ok(());
        }
        stage.backend.set_rows(state, self.batches[i].tokens);
        if route.enter == layer && !route.kept {
            let started = Instant::now();
            self.crossing.enter(stage.backend, i, state)?;
            if layer == 0 {
                self.decoder.embedded(state)?;
            }
            self.waited += started.elapsed().as_secs_f64();
            return Ok(());
        }
        let held = &mut self.held[i];
        let captured = if course.captures { None } else { self.captured[i].take() };
        match (captured, self.keeper.states()) {
            (Some(captured), _) => *held = captured,
            (None, Some(states)) => states.read(layer, &stage.job.micro_batches[i].samples, held)?,
            (None, None) if held.is_empty() => return Err(Error::run("no hidden states were kept")),
            (None, None) => {}
        }
        // Beside the forward pass, which has the micro-batch before.
        let arrived = stage.backend.arrived(held, stage.job.model.hidden)?;
        stage.backend.copy(&arrived, state)?;
        // Only what leaves the device again needs the memory again.
        if stage.mode != Mode::Spilled || self.keeper.states().is_some() {
            *held = vec![];
        }
        Ok(())
    }

    /// Takes hidden states off the device, once they are complete.
    fn leave(
        &mut self,
        course: Course<'a>,
        keeping: &mut Keeping,
        leaving: Option<Leaving<B::Moment>>,
        states: &[B::Tensor],
    ) -> Result<()> {
        let Some(Leaving { micro_batch: i, slot, since }) = leaving else { return Ok(()) };
        let (backend, state, layer) = (self.stage.backend, &states[slot], keeping.layer());
        if self.keeper.states().is_some() {
            return self.keeper.keep(keeping, i, |bytes| backend.download_as_of(&since, state, bytes));
        }
        let captured = course.captures && self.stage.routes.captures(i) == Some(layer);
        if captured || course.routes[i].as_ref().is_some_and(|route| route.passes(layer)) {
            backend.download_as_of(&since, state, &mut self.held[i])?;
        }
        if captured {
            self.captured[i] = Some(self.held[i].clone());
        }
        Ok(())
    }

    /// Keeps hidden states: in a file, or in memory where the second sweep begins with them and there is no directory.
    fn keep(&mut self, course: Course<'a>, keeping: &mut Keeping, i: usize, x: &B::Tensor) -> Result<()> {
        let backend = self.stage.backend;
        let captured = course.captures && self.stage.routes.captures(i) == Some(keeping.layer());
        if captured && self.keeper.states().is_none() {
            return backend.download(x, self.captured[i].insert(Vec::new()));
        }
        self.keeper.keep(keeping, i, |bytes| backend.download(x, bytes))
    }
}
