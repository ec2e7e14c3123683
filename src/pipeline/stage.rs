//! One rank's walk over its slice: hidden states in, layer by layer over a group of micro-batches,
//! hidden states out. Three threads: one loads the next layer, one computes, one quantizes and places the
//! layer before. Each hands over one layer at a time, so at most three layers' weights exist.

use std::ops::Range;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::finish::{Finished, Finisher};
use super::job::Job;
use super::journal::PartId;
use super::messages::{Event, Hidden, Outbox};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{Batch, Decoder, LayerWeights, Site};
use crate::report::Phases;

/// A rank's share of the job.
pub struct Stage<'a, B: Backend> {
    /// Where arithmetic happens.
    pub backend: &'a B,
    /// What every rank knows.
    pub job: &'a Job,
    /// The decoder layers of this rank.
    pub slice: Range<usize>,
    /// Micro-batches that walk through a layer before the next layer is loaded.
    pub group: usize,
    /// Hidden states from the stage before, in micro-batch order.
    pub incoming: Receiver<Hidden>,
    /// To the stage behind and to rank 0.
    pub outbox: Outbox,
}

impl<B: Backend> Stage<'_, B> {
    /// Runs the slice to its end and says where the time went.
    pub fn run(self, finisher: Finisher<'_, B>) -> Result<Phases> {
        let started = Instant::now();
        std::thread::scope(|scope| {
            let (to_finisher, finished) = bounded(0);
            let finishing = scope.spawn(move || finisher.run(&finished));
            let walked = self.send_all(&to_finisher);
            drop(to_finisher);
            let finished = finishing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // Where the finisher failed, the walk only noticed that nobody listens any more.
            let mut phases = finished?;
            (phases.forward, phases.wait) = walked?;
            phases.total = started.elapsed().as_secs_f64();
            Ok(phases)
        })
    }

    /// Hands every part of this rank to the finisher; returns seconds of computing and of waiting for hidden
    /// states.
    fn send_all(&self, finisher: &Sender<Finished<B>>) -> Result<(f64, f64)> {
        if self.slice.start == 0 {
            send(finisher, Finished::Copied(PartId::Head))?;
        }
        let mut seconds = (0.0, 0.0);
        match self.job.forward_until {
            Some(last) if self.slice.start <= last => seconds = self.walk(last, finisher)?,
            _ => {
                for layer in self.slice.clone().filter(|&layer| !self.job.is_finished(PartId::Layer(layer))) {
                    send(finisher, Finished::Layer { layer, weights: self.load(layer)?, input_amax: None })?;
                }
            }
        }
        if self.slice.end == self.job.model.layers {
            send(finisher, Finished::Copied(PartId::Tail))?;
        }
        Ok(seconds)
    }

    fn load(&self, layer: usize) -> Result<LayerWeights<B::Tensor>> {
        let source = |name: &str| self.job.checkpoint.tensor(name);
        LayerWeights::load(self.backend, &self.job.model, layer, &source)
    }

    /// Walks all micro-batches through the slice, as far as layer `last`.
    fn walk(&self, last: usize, finisher: &Sender<Finished<B>>) -> Result<(f64, f64)> {
        let layers = self.slice.start..self.slice.end.min(last + 1);
        let groups = self.job.micro_batches.len().div_ceil(self.group);
        std::thread::scope(|scope| {
            let (to_walk, loaded) = bounded(0);
            let to_load = layers.clone();
            scope.spawn(move || {
                for layer in (0..groups).flat_map(|_| to_load.clone()) {
                    if to_walk.send(self.load(layer)).is_err() {
                        break; // the walk has failed and says why
                    }
                }
            });
            self.walk_loaded(layers, last >= self.slice.end, &loaded, finisher)
        })
    }

    fn walk_loaded(
        &self,
        layers: Range<usize>,
        passes_on: bool,
        loaded: &Receiver<Result<LayerWeights<B::Tensor>>>,
        finisher: &Sender<Finished<B>>,
    ) -> Result<(f64, f64)> {
        let (job, started) = (self.job, Instant::now());
        let table = job.model.rope.table(&job.lengths);
        let decoder = Decoder::new(self.backend, &job.model, &table)?;
        let batches: Vec<Batch<B>> = job
            .micro_batches
            .iter()
            .map(|mb| decoder.batch(&table, mb.samples.start, &job.lengths[mb.samples.clone()]))
            .collect::<Result<_>>()?;
        let most = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
        let mut work = decoder.workspace(most)?;
        let mut amax = self.backend.amax(layers.len() * Site::ALL.len())?;
        let mut states = (0..self.group.min(batches.len()))
            .map(|_| self.backend.activation(most, job.model.hidden))
            .collect::<Result<Vec<_>>>()?;
        let mut waited = 0.0;

        let groups = batches.len().div_ceil(self.group);
        for (number, group) in batches.chunks(self.group).enumerate() {
            let first = number * self.group;
            waited += self.fill(first, group, &mut states)?;
            for layer in layers.clone() {
                let weights = loaded.recv().map_err(|_| Error::run("the loading thread ended early"))??;
                let slot = (layer - layers.start) * Site::ALL.len();
                for (i, batch) in group.iter().enumerate() {
                    let mut observe =
                        |site: Site, x: &B::Tensor| self.backend.observe(x, &mut amax, slot + site as usize);
                    decoder.layer(&weights, batch, &mut work, &mut states[i], &mut observe)?;
                    self.outbox.event(Event::Walked { layer })?;
                    if passes_on && layer + 1 == layers.end {
                        let mut bytes = Vec::new();
                        self.backend.download(&states[i], &mut bytes)?;
                        self.outbox.hidden(first + i, bytes)?;
                    }
                }
                if number + 1 == groups && !job.is_finished(PartId::Layer(layer)) {
                    let maxima = &self.backend.read_amax(&amax)?[slot..slot + Site::ALL.len()];
                    let input_amax = Some(maxima.to_vec());
                    send(finisher, Finished::Layer { layer, weights, input_amax })?;
                }
            }
        }
        Ok((started.elapsed().as_secs_f64() - waited, waited))
    }

    /// Brings the hidden states of a group in: embedded on the first stage, received on the others. Returns
    /// the seconds of waiting.
    fn fill(&self, first: usize, group: &[Batch<B>], states: &mut [B::Tensor]) -> Result<f64> {
        let job = self.job;
        if self.slice.start == 0 {
            let table = self.backend.load(&job.checkpoint.tensor(&job.model.embedding().name)?)?;
            for (i, batch) in group.iter().enumerate() {
                self.backend.set_rows(&mut states[i], batch.tokens);
                let ids = self.backend.index(job.ids_of(first + i))?;
                self.backend.embed(&table, &ids, &mut states[i])?;
            }
            return Ok(0.0);
        }
        let mut waited = 0.0;
        for (i, batch) in group.iter().enumerate() {
            let started = Instant::now();
            let hidden = self
                .incoming
                .recv()
                .map_err(|_| Error::run("the stage before ended without sending its hidden states"))?;
            waited += started.elapsed().as_secs_f64();
            debug_assert_eq!(hidden.micro_batch, first + i, "messages of one sender arrive in order");
            self.backend.set_rows(&mut states[i], batch.tokens);
            self.backend.upload(&hidden.bytes, &mut states[i])?;
        }
        Ok(waited)
    }
}

fn send<B: Backend>(finisher: &Sender<Finished<B>>, part: Finished<B>) -> Result<()> {
    finisher.send(part).map_err(|_| Error::run("the quantizing thread ended early"))
}
