//! Passes over a slice: groups of micro-batches through layer after layer, and what is noted on the way.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::finish::{Finished, Inputs};
use super::journal::PartId;
use super::messages::Event;
use super::stage::{Stage, send};
use super::statistics::{Gathering, LayerSums};
use crate::backend::{Backend, Solver};
use crate::error::{Error, Result};
use crate::model::{Batch, Decoder, LayerWeights, Site};
use crate::planner::Mode;
use crate::report::Work;

/// What all passes over a slice share.
pub struct Walk<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    layers: Range<usize>,
    decoder: Decoder<'a, B>,
    batches: Vec<Batch<B>>,
    /// Tokens of the largest micro-batch.
    most: usize,
}

/// A layer's weights as the loading thread hands them over.
type Loaded<B> = Receiver<Result<LayerWeights<<B as Backend>::Tensor>>>;

/// What a pass does besides computing.
trait Pass<B: Solver> {
    /// Takes a site's input.
    fn observe(&mut self, layer: usize, micro_batch: usize, site: Site, x: &B::Tensor) -> Result<()>;
    /// Takes a hidden state behind the last layer.
    fn passed(&mut self, micro_batch: usize, x: &B::Tensor) -> Result<()>;
    /// Takes a layer that every micro-batch has passed.
    fn complete(&mut self, layer: usize, weights: LayerWeights<B::Tensor>) -> Result<()>;
}

impl<'a, B: Solver> Walk<'a, B> {
    pub fn new(stage: &'a Stage<'a, B>, layers: Range<usize>) -> Result<Walk<'a, B>> {
        let job = stage.job;
        let table = job.model.rope.table(&job.lengths);
        let decoder = Decoder::new(stage.backend, &job.model, &table)?;
        let batches: Vec<Batch<B>> = job
            .micro_batches
            .iter()
            .map(|mb| decoder.batch(&table, mb.samples.start, &job.lengths[mb.samples.clone()]))
            .collect::<Result<_>>()?;
        let most = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
        Ok(Walk { stage, layers, decoder, batches, most })
    }

    /// One pass for methods that need maxima alone.
    pub fn maxima(&self, passes_on: bool, finisher: &Sender<Finished<B>>, waited: &mut f64) -> Result<()> {
        let stage = self.stage;
        let amax = stage.backend.amax(self.layers.len() * Site::ALL.len())?;
        let mut pass = Maxima { walk: self, amax, passes_on, finisher };
        let mut table = None;
        self.run(stage.group, &mut pass, &mut |first, group, states| {
            stage.fill(first, group, states, &mut table, waited)
        })
    }

    /// Hidden states alone, as far as the next stage. Keeps what came in.
    pub fn forward(&self, kept: &mut Vec<Vec<u8>>, waited: &mut f64) -> Result<()> {
        let (stage, mut table) = (self.stage, None);
        self.run(stage.group, &mut Forward { stage }, &mut |first, group, states| {
            stage.fill(first, group, states, &mut table, waited)?;
            // What the first stage embeds it can embed again.
            for state in states.iter().take(if stage.slice.start == 0 { 0 } else { group.len() }) {
                let mut bytes = Vec::new();
                stage.backend.download(state, &mut bytes)?;
                kept.push(bytes);
            }
            Ok(())
        })
    }

    /// Every layer over all micro-batches, with statistics.
    pub fn statistics(
        &self,
        kept: Vec<Vec<u8>>,
        finisher: &Sender<Finished<B>>,
        waited: &mut f64,
    ) -> Result<()> {
        let (stage, mut kept) = (self.stage, kept.into_iter());
        let gathering = Gathering::new(stage.backend, stage.job)?;
        let mut pass = Statistics { stage, gathering, sums: None, finisher };
        self.run(self.batches.len(), &mut pass, &mut |first, group, states| {
            if kept.len() == 0 {
                return stage.fill(first, group, states, &mut None, waited);
            }
            for (batch, state) in group.iter().zip(states) {
                stage.backend.set_rows(state, batch.tokens);
                stage.backend.upload(&kept.next().unwrap_or_default(), state)?;
            }
            Ok(())
        })
    }

    /// Runs groups of micro-batches through the layers, the next layer being loaded meanwhile.
    fn run(&self, group: usize, pass: &mut dyn Pass<B>, fill: Fill<'_, B>) -> Result<()> {
        let (stage, to_load) = (self.stage, self.layers.clone());
        let loads = match stage.mode {
            Mode::Resident => 1,
            Mode::Streamed => self.batches.len().div_ceil(group),
        };
        std::thread::scope(|scope| {
            let (to_walk, loaded) = bounded(stage.ahead());
            scope.spawn(move || {
                for layer in (0..loads).flat_map(|_| to_load.clone()) {
                    if to_walk.send(stage.load(layer)).is_err() {
                        break; // the walk has failed and says why
                    }
                }
            });
            self.run_loaded(group, &loaded, pass, fill)
        })
    }

    fn run_loaded(
        &self,
        group: usize,
        loaded: &Loaded<B>,
        pass: &mut dyn Pass<B>,
        fill: Fill<'_, B>,
    ) -> Result<()> {
        let Stage { backend, job, outbox, timeline, .. } = self.stage;
        let mut work = self.decoder.workspace(self.most)?;
        let mut states = (0..group.min(self.batches.len()))
            .map(|_| backend.activation(self.most, job.model.hidden))
            .collect::<Result<Vec<_>>>()?;
        let groups = self.batches.len().div_ceil(group);
        let resident = self.stage.mode == Mode::Resident;
        let mut kept = VecDeque::new();
        for (number, batches) in self.batches.chunks(group).enumerate() {
            let first = number * group;
            fill(first, batches, &mut states)?;
            let mut returned = VecDeque::new();
            for layer in self.layers.clone() {
                let weights = match kept.pop_front() {
                    Some(weights) => weights,
                    None => loaded.recv().map_err(|_| Error::run("the loading thread ended early"))??,
                };
                for (i, batch) in batches.iter().enumerate() {
                    let started = Instant::now();
                    let mut observe = |site: Site, x: &mut B::Tensor| pass.observe(layer, first + i, site, x);
                    self.decoder.layer(&weights, batch, &mut work, &mut states[i], &mut observe)?;
                    timeline.note(Work::Compute, layer, first + i, started);
                    outbox.event(Event::Walked { layer })?;
                    if layer + 1 == self.layers.end {
                        pass.passed(first + i, &states[i])?;
                    }
                }
                if number + 1 == groups {
                    pass.complete(layer, weights)?;
                } else if resident {
                    returned.push_back(weights);
                }
            }
            kept = returned;
        }
        Ok(())
    }
}

/// Brings the hidden states of a group in: the first micro-batch's number, the group, where they go.
type Fill<'f, B> = &'f mut dyn FnMut(usize, &[Batch<B>], &mut [<B as Backend>::Tensor]) -> Result<()>;

/// Maximum by site; layers are finished as they come.
struct Maxima<'a, B: Solver> {
    walk: &'a Walk<'a, B>,
    amax: B::Amax,
    passes_on: bool,
    finisher: &'a Sender<Finished<B>>,
}

impl<B: Solver> Pass<B> for Maxima<'_, B> {
    fn observe(&mut self, layer: usize, _: usize, site: Site, x: &B::Tensor) -> Result<()> {
        let slot = (layer - self.walk.layers.start) * Site::ALL.len() + site as usize;
        self.walk.stage.backend.observe(x, &mut self.amax, slot)
    }

    fn passed(&mut self, micro_batch: usize, x: &B::Tensor) -> Result<()> {
        if self.passes_on { self.walk.stage.pass_on(micro_batch, x) } else { Ok(()) }
    }

    fn complete(&mut self, layer: usize, weights: LayerWeights<B::Tensor>) -> Result<()> {
        let stage = self.walk.stage;
        if stage.job.is_finished(PartId::Layer(layer)) {
            return Ok(());
        }
        let slot = (layer - self.walk.layers.start) * Site::ALL.len();
        let maxima = &stage.backend.read_amax(&self.amax)?[slot..slot + Site::ALL.len()];
        let inputs = Inputs::Maxima(maxima.to_vec());
        send(self.finisher, Finished::Layer { layer, weights, inputs })
    }
}

/// Computes, and nothing else.
struct Forward<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
}

impl<B: Solver> Pass<B> for Forward<'_, B> {
    fn observe(&mut self, _: usize, _: usize, _: Site, _: &B::Tensor) -> Result<()> {
        Ok(())
    }

    fn passed(&mut self, micro_batch: usize, x: &B::Tensor) -> Result<()> {
        self.stage.pass_on(micro_batch, x)
    }

    fn complete(&mut self, _: usize, _: LayerWeights<B::Tensor>) -> Result<()> {
        Ok(())
    }
}

/// Full statistics, one layer at a time.
struct Statistics<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    gathering: Gathering<'a, B>,
    sums: Option<LayerSums<B>>,
    finisher: &'a Sender<Finished<B>>,
}

impl<B: Solver> Pass<B> for Statistics<'_, B> {
    fn observe(&mut self, layer: usize, micro_batch: usize, site: Site, x: &B::Tensor) -> Result<()> {
        let job = self.stage.job;
        if job.is_finished(PartId::Layer(layer)) {
            return Ok(());
        }
        if self.sums.is_none() {
            self.sums = Some(self.gathering.layer(&job.model)?);
        }
        let sums = self.sums.as_mut().expect("just made");
        self.gathering.take(micro_batch, site, x, job.model.site_features(site), sums)
    }

    fn passed(&mut self, _: usize, _: &B::Tensor) -> Result<()> {
        Ok(())
    }

    fn complete(&mut self, layer: usize, weights: LayerWeights<B::Tensor>) -> Result<()> {
        let Some(sums) = self.sums.take() else { return Ok(()) };
        // One layer's statistics at a time: they are larger than its weights.
        let (solving, solved) = bounded(0);
        let inputs = Inputs::Statistics(Box::new(self.gathering.finish(sums)?), solving);
        send(self.finisher, Finished::Layer { layer, weights, inputs })?;
        let _ = solved.recv();
        Ok(())
    }
}
