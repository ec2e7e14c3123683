//! What each kind of sweep does with the inputs of sites, and with layers that every micro-batch has passed.

use std::collections::HashSet;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::stage::{Stage, finisher_ended, send};
use super::statistics::{Gathering, LayerSums};
use crate::backend::Solver;
use crate::error::Result;
use crate::finish::{Event, FinisherWeights, InputMaxima, ToFinish};
use crate::forward::LayerWeights;
use crate::planner::Mode;
use crate::record::{Observed, PartId};

/// A sweep over a stage's slice.
pub trait Sweep<B: Solver> {
    /// Takes the input `x` of a site.
    fn observe(&mut self, layer: usize, micro_batch: usize, site: usize, x: &B::Tensor) -> Result<()>;
    /// Whether [`Sweep::complete`] wants a layer when every micro-batch has passed it.
    fn completes(&self, layer: usize) -> bool;
    /// Offers the weights of a layer which some micro-batches have yet to pass, so that it can be quantized early.
    /// Where the walk has to wait for their release, returns a receiver that disconnects then.
    fn offer(&mut self, _: usize, _: &Arc<LayerWeights<B::Tensor>>) -> Result<Option<Receiver<()>>> {
        Ok(None)
    }
    /// Takes a layer that every micro-batch has passed.
    fn complete(&mut self, layer: usize, weights: Arc<LayerWeights<B::Tensor>>) -> Result<()>;
    /// Notes that the first `documents` documents have passed all layers before `layer`.
    fn seen(&mut self, layer: usize, documents: usize) -> Result<()>;
}

/// Gathers the maximum of each site's input. Weights are quantized early whenever the finisher is free, so that little
/// is left to do after the last micro-batch.
pub struct Maxima<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    amax: B::Amax,
    /// The number in `amax` of the first site of each layer of the slice, and the number of all sites at the end.
    slots: Vec<usize>,
    /// Layers whose weights have been handed to the finisher.
    handed_over: HashSet<usize>,
    /// Documents that have passed the whole slice and whose maxima rank 0 has.
    reported: usize,
    finisher: &'a Sender<ToFinish<B>>,
}

/// How many times in a run, about, a stage reports its running maxima to rank 0 for the journal.
const MAXIMA_REPORTS_PER_RUN: usize = 64;

impl<'a, B: Solver> Maxima<'a, B> {
    pub fn new(stage: &'a Stage<'a, B>, finisher: &'a Sender<ToFinish<B>>) -> Result<Maxima<'a, B>> {
        let layers = &stage.job.model.layers[stage.slice.clone()];
        let mut slots = vec![0];
        for layer in layers {
            slots.push(slots[slots.len() - 1] + layer.sites.len());
        }
        let amax = stage.backend.amax(slots[layers.len()])?;
        Ok(Maxima { stage, amax, slots, handed_over: HashSet::new(), reported: 0, finisher })
    }

    /// `max |x|` by site of one layer, out of those of all layers. Includes what an earlier process has recorded.
    fn maxima(&self, read: &[f32], layer: usize) -> Vec<f32> {
        let place = layer - self.stage.slice.start;
        let now = &read[self.slots[place]..self.slots[place + 1]];
        let Some(before) = self.stage.job.observed.get(&layer) else { return now.to_vec() };
        // Recorded maxima are finite. A NaN of this process must not be replaced by one.
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
        if !<Self as Sweep<B>>::completes(self, layer) || self.handed_over.contains(&layer) {
            return Ok(None);
        }
        let (held, released) = match self.stage.mode {
            // The walk keeps these weights anyway, so it does not wait for their release.
            Mode::Resident => (FinisherWeights::new(weights.clone()), None),
            Mode::Streamed | Mode::Spilled => {
                let (held, released) = FinisherWeights::with_release(weights.clone());
                (held, Some(released))
            }
        };
        let message = ToFinish::MaxScales { layer, weights: Some(held), inputs: InputMaxima::NotYetKnown };
        match self.finisher.try_send(message) {
            Ok(()) => {
                self.handed_over.insert(layer);
                Ok(released)
            }
            Err(TrySendError::Full(_)) => Ok(None),
            Err(TrySendError::Disconnected(_)) => Err(finisher_ended()),
        }
    }

    fn complete(&mut self, layer: usize, weights: Arc<LayerWeights<B::Tensor>>) -> Result<()> {
        let maxima = self.maxima(&self.stage.backend.read_amax(&self.amax)?, layer);
        let weights = (!self.handed_over.contains(&layer)).then(|| FinisherWeights::new(weights));
        send(self.finisher, ToFinish::MaxScales { layer, weights, inputs: InputMaxima::Known(maxima) })
    }

    fn seen(&mut self, layer: usize, documents: usize) -> Result<()> {
        let Stage { backend, job, slice, outbox, .. } = self.stage;
        let (whole, all) = (layer == slice.end, job.lengths.len());
        if whole && documents < all && (documents - self.reported) * MAXIMA_REPORTS_PER_RUN < all {
            return Ok(());
        }
        let read = backend.read_amax(&self.amax)?;
        for layer in (slice.start..layer).filter(|&layer| self.completes(layer)) {
            let before = job.observed.get(&layer).map_or(0, |observed| observed.documents);
            let (documents, maxima) = (documents.max(before), self.maxima(&read, layer));
            // JSON has no numbers for maxima that are not finite; the health check ends the run because of them.
            if maxima.iter().all(|x| x.is_finite()) {
                outbox.event(Event::Observed(Observed { layer, documents, maxima }))?;
            }
        }
        if whole {
            self.reported = documents;
        }
        Ok(())
    }
}

/// Computes hidden states and gathers nothing.
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

/// Gathers the full statistics of one layer at a time.
pub struct Statistics<'a, B: Solver> {
    stage: &'a Stage<'a, B>,
    gathering: Gathering<'a, B>,
    sums: Option<LayerSums<B>>,
    finisher: &'a Sender<ToFinish<B>>,
}

impl<'a, B: Solver> Statistics<'a, B> {
    pub fn new(stage: &'a Stage<'a, B>, finisher: &'a Sender<ToFinish<B>>) -> Result<Statistics<'a, B>> {
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
        let sums = self.sums.as_mut().expect("set above");
        self.gathering.take(micro_batch, site, x, job.model.layers[layer].sites[site].features, sums)
    }

    fn completes(&self, layer: usize) -> bool {
        !self.stage.job.is_finished(PartId::Layer(layer))
    }

    fn complete(&mut self, layer: usize, weights: Arc<LayerWeights<B::Tensor>>) -> Result<()> {
        let Some(sums) = self.sums.take() else { return Ok(()) };
        // Waits until the layer is quantized: statistics are larger than weights, and memory is planned for those of
        // one layer.
        let (weights, released) = FinisherWeights::with_release(weights);
        let statistics = self.gathering.finish(sums)?;
        send(self.finisher, ToFinish::WithStatistics { layer, statistics, weights })?;
        let _ = released.recv();
        Ok(())
    }

    fn seen(&mut self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }
}
