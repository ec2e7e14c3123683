//! What a sweep does besides computing.

use std::collections::HashSet;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::stage::{Stage, finisher_ended, send};
use super::statistics::{Gathering, LayerSums};
use crate::backend::Solver;
use crate::error::Result;
use crate::finish::{Event, Finished, Inputs, Lent};
use crate::forward::LayerWeights;
use crate::planner::Mode;
use crate::record::{Observed, PartId};

/// A sweep over a stage's slice.
pub trait Sweep<B: Solver> {
    /// Takes a site's input.
    fn observe(&mut self, layer: usize, micro_batch: usize, site: usize, x: &B::Tensor) -> Result<()>;
    /// Whether a layer is wanted when every micro-batch has passed it.
    fn completes(&self, layer: usize) -> bool;
    /// May take the weights of a layer that some micro-batches are still to pass; the receiver hears nothing, and ends
    /// when they have been given back.
    fn offer(&mut self, _: usize, _: &Arc<LayerWeights<B::Tensor>>) -> Result<Option<Receiver<()>>> {
        Ok(None)
    }
    /// Takes a wanted layer.
    fn complete(&mut self, layer: usize, weights: Arc<LayerWeights<B::Tensor>>) -> Result<()>;
    /// Hears that layers before `layer` have seen the first `documents` documents.
    fn seen(&mut self, layer: usize, documents: usize) -> Result<()>;
}

/// Maximum by site. Weights are quantized whenever there is time, so that with the last micro-batch little is left.
pub struct Maxima<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    amax: B::Amax,
    /// The slot of the first site of each layer of the slice, and that behind the last one.
    slots: Vec<usize>,
    /// Layers whose weights the finisher has.
    given: HashSet<usize>,
    /// Documents that rank 0 has been told of, through the whole slice.
    told: usize,
    finisher: &'a Sender<Finished<B>>,
}

/// Rank 0 hears of maxima when so many parts of all documents are new.
const NEWS: usize = 64;

impl<'a, B: Solver> Maxima<'a, B> {
    pub fn new(stage: &'a Stage<'a, B>, finisher: &'a Sender<Finished<B>>) -> Result<Maxima<'a, B>> {
        let layers = &stage.job.model.layers[stage.slice.clone()];
        let mut slots = vec![0];
        for layer in layers {
            slots.push(slots[slots.len() - 1] + layer.sites.len());
        }
        let amax = stage.backend.amax(slots[layers.len()])?;
        Ok(Maxima { stage, amax, slots, given: HashSet::new(), told: 0, finisher })
    }

    /// `max |x|` by site of a layer, an earlier process's included, from all that were read.
    fn maxima(&self, read: &[f32], layer: usize) -> Vec<f32> {
        let place = layer - self.stage.slice.start;
        let now = &read[self.slots[place]..self.slots[place + 1]];
        let Some(before) = self.stage.job.observed.get(&layer) else { return now.to_vec() };
        // What was recorded is finite; a NaN of now must stay one.
        let largest = |(&now, &before): (&f32, &f32)| if now < before { before } else { now };
        now.iter().zip(&before.maxima).map(largest).collect()
    }
}

impl<B: Solver> Sweep<B> for Maxima<'_, B> {
    fn observe(&mut self, layer: usize, _: usize, site: usize, x: &B::Tensor) -> Result<()> {
        let slot = self.slots[layer - self.stage.slice.start] + site;
        self.stage.backend.observe(x, &mut self.amax, slot)
    }

    fn completes(&self, layer: usize) -> bool {
        !self.stage.job.is_finished(PartId::Layer(layer))
    }

    fn offer(
        &mut self,
        layer: usize,
        weights: &Arc<LayerWeights<B::Tensor>>,
    ) -> Result<Option<Receiver<()>>> {
        if !<Self as Sweep<B>>::completes(self, layer) || self.given.contains(&layer) {
            return Ok(None);
        }
        let (lent, given_back) = match self.stage.mode {
            // They stay in any case.
            Mode::Resident => (Lent::new(weights.clone()), None),
            Mode::Streamed | Mode::Spilled => {
                let (lent, given_back) = Lent::awaited(weights.clone());
                (lent, Some(given_back))
            }
        };
        match self.finisher.try_send(Finished::Max { layer, weights: Some(lent), inputs: Inputs::Unknown }) {
            Ok(()) => {
                self.given.insert(layer);
                Ok(given_back)
            }
            Err(TrySendError::Full(_)) => Ok(None),
            Err(TrySendError::Disconnected(_)) => Err(finisher_ended()),
        }
    }

    fn complete(&mut self, layer: usize, weights: Arc<LayerWeights<B::Tensor>>) -> Result<()> {
        let maxima = self.maxima(&self.stage.backend.read_amax(&self.amax)?, layer);
        let weights = (!self.given.contains(&layer)).then(|| Lent::new(weights));
        send(self.finisher, Finished::Max { layer, weights, inputs: Inputs::Maxima(maxima) })
    }

    fn seen(&mut self, layer: usize, documents: usize) -> Result<()> {
        let Stage { backend, job, slice, outbox, .. } = self.stage;
        let (whole, all) = (layer == slice.end, job.lengths.len());
        if whole && documents < all && (documents - self.told) * NEWS < all {
            return Ok(());
        }
        let read = backend.read_amax(&self.amax)?;
        for layer in (slice.start..layer).filter(|&layer| self.completes(layer)) {
            let before = job.observed.get(&layer).map_or(0, |observed| observed.documents);
            let (documents, maxima) = (documents.max(before), self.maxima(&read, layer));
            // What is not finite ends the run, and can't be written as JSON.
            if maxima.iter().all(|x| x.is_finite()) {
                outbox.event(Event::Observed(Observed { layer, documents, maxima }))?;
            }
        }
        if whole {
            self.told = documents;
        }
        Ok(())
    }
}

/// Computes, and nothing else.
pub struct Forward;

impl<B: Solver> Sweep<B> for Forward {
    fn observe(&mut self, _: usize, _: usize, _: usize, _: &B::Tensor) -> Result<()> {
        Ok(())
    }

    fn completes(&self, _: usize) -> bool {
        false
    }

    fn complete(&mut self, _: usize, _: Arc<LayerWeights<B::Tensor>>) -> Result<()> {
        Ok(())
    }

    fn seen(&mut self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }
}

/// Full statistics, one layer at a time.
pub struct Statistics<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    gathering: Gathering<'a, B>,
    sums: Option<LayerSums<B>>,
    finisher: &'a Sender<Finished<B>>,
}

impl<'a, B: Solver> Statistics<'a, B> {
    pub fn new(stage: &'a Stage<'a, B>, finisher: &'a Sender<Finished<B>>) -> Result<Statistics<'a, B>> {
        let gathering = Gathering::new(stage.backend, stage.job)?;
        Ok(Statistics { stage, gathering, sums: None, finisher })
    }
}

impl<B: Solver> Sweep<B> for Statistics<'_, B> {
    fn observe(&mut self, layer: usize, micro_batch: usize, site: usize, x: &B::Tensor) -> Result<()> {
        let job = self.stage.job;
        if job.is_finished(PartId::Layer(layer)) {
            return Ok(());
        }
        if self.sums.is_none() {
            self.sums = Some(self.gathering.layer(&job.model.layers[layer])?);
        }
        let sums = self.sums.as_mut().expect("just made");
        self.gathering.take(micro_batch, site, x, job.model.layers[layer].sites[site].features, sums)
    }

    fn completes(&self, layer: usize) -> bool {
        !self.stage.job.is_finished(PartId::Layer(layer))
    }

    fn complete(&mut self, layer: usize, weights: Arc<LayerWeights<B::Tensor>>) -> Result<()> {
        let Some(sums) = self.sums.take() else { return Ok(()) };
        // One layer's statistics at a time: they are larger than its weights.
        let (weights, given_back) = Lent::awaited(weights);
        let statistics = self.gathering.finish(sums)?;
        send(self.finisher, Finished::Chosen { layer, statistics, weights })?;
        let _ = given_back.recv();
        Ok(())
    }

    fn seen(&mut self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }
}
