//! One rank's walk over its slice: hidden states in, layer by layer over a group of micro-batches,
//! hidden states out; each layer is quantized and placed as soon as its last micro-batch has passed.

use std::ops::Range;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::finish::Finisher;
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
    /// Quantizes and places finished parts.
    pub finisher: Finisher<'a, B>,
}

impl<B: Backend> Stage<'_, B> {
    /// Runs the slice to its end and says where the time went.
    pub fn run(mut self) -> Result<Phases> {
        let started = Instant::now();
        if self.slice.start == 0 {
            self.finisher.copied(PartId::Head)?;
        }
        let waited = match self.job.forward_until {
            Some(last) if self.slice.start <= last => self.walk(last)?,
            _ => {
                for layer in self.slice.clone().filter(|&layer| !self.job.is_finished(PartId::Layer(layer))) {
                    self.finisher.layer(layer, &self.load(layer)?, None)?;
                }
                Duration::ZERO
            }
        };
        if self.slice.end == self.job.model.layers {
            self.finisher.copied(PartId::Tail)?;
        }
        let mut phases = self.finisher.phases;
        phases.wait = waited.as_secs_f64();
        phases.total = started.elapsed().as_secs_f64();
        phases.forward = (phases.total - phases.wait - phases.quantize - phases.write).max(0.0);
        Ok(phases)
    }

    fn load(&self, layer: usize) -> Result<LayerWeights<B::Tensor>> {
        let source = |name: &str| self.job.checkpoint.tensor(name);
        LayerWeights::load(self.backend, &self.job.model, layer, &source)
    }

    /// Walks all micro-batches through the slice, as far as layer `last`; returns the time spent waiting
    /// for hidden states.
    fn walk(&mut self, last: usize) -> Result<Duration> {
        let job = self.job;
        let layers = self.slice.start..self.slice.end.min(last + 1);
        let passes_on = last >= self.slice.end;
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
        let mut waited = Duration::ZERO;

        let groups = batches.len().div_ceil(self.group);
        for (number, group) in batches.chunks(self.group).enumerate() {
            let first = number * self.group;
            waited += self.fill(first, group, &mut states)?;
            for layer in layers.clone() {
                if layer + 1 < layers.end {
                    job.checkpoint
                        .prefetch(job.model.layer_tensors(layer + 1).iter().map(|t| t.name.as_str()));
                }
                let weights = self.load(layer)?;
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
                    let maxima = self.backend.read_amax(&amax)?;
                    self.finisher.layer(layer, &weights, Some(&maxima[slot..slot + Site::ALL.len()]))?;
                }
            }
        }
        Ok(waited)
    }

    /// Brings the hidden states of a group in: embedded on the first stage, received on the others.
    fn fill(&self, first: usize, group: &[Batch<B>], states: &mut [B::Tensor]) -> Result<Duration> {
        let job = self.job;
        if self.slice.start == 0 {
            let table = self.backend.load(&job.checkpoint.tensor(&job.model.embedding().name)?)?;
            for (i, batch) in group.iter().enumerate() {
                self.backend.set_rows(&mut states[i], batch.tokens);
                let ids = self.backend.index(job.ids_of(first + i))?;
                self.backend.embed(&table, &ids, &mut states[i])?;
            }
            return Ok(Duration::ZERO);
        }
        let mut waited = Duration::ZERO;
        for (i, batch) in group.iter().enumerate() {
            let started = Instant::now();
            let hidden = self
                .incoming
                .recv()
                .map_err(|_| Error::run("the stage before ended without sending its hidden states"))?;
            waited += started.elapsed();
            debug_assert_eq!(hidden.micro_batch, first + i, "messages of one sender arrive in order");
            self.backend.set_rows(&mut states[i], batch.tokens);
            self.backend.upload(&hidden.bytes, &mut states[i])?;
        }
        Ok(waited)
    }
}
