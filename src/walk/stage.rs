//! What a rank's threads share while it walks over its slice, and how parts are handed to the finisher.

use std::ops::Range;

use crossbeam_channel::{Receiver, Sender};

use crate::backend::Solver;
use crate::cluster::Frame;
use crate::error::{Error, Result};
use crate::finish::{Finished, Outbox};
use crate::forward::LayerWeights;
use crate::job::Job;
use crate::planner::Mode;
use crate::progress::Timeline;
use crate::schedule::Routes;
use crate::states::States;

/// A rank's share of the job.
pub struct Stage<'a, B: Solver> {
    /// Where arithmetic happens.
    pub backend: &'a B,
    /// What every rank knows.
    pub job: &'a Job,
    /// The decoder layers of this rank.
    pub slice: Range<usize>,
    /// Whether its weights stay loaded.
    pub mode: Mode,
    /// Micro-batches that walk through a layer together.
    pub group: usize,
    /// Which micro-batches pass which of its layers.
    pub routes: &'a Routes,
    /// Where hidden states are kept.
    pub states: Option<&'a States>,
    /// Where work is noted.
    pub timeline: &'a Timeline,
    /// Hidden states from the stage before, in micro-batch order.
    pub incoming: Receiver<Frame>,
    /// To the stage behind and to rank 0.
    pub outbox: Outbox,
}

impl<B: Solver> Stage<'_, B> {
    /// Layers that may wait between two threads: where there is room for the slice, none has to wait for
    /// another.
    pub(super) fn ahead(&self) -> usize {
        match self.mode {
            Mode::Resident => self.slice.len(),
            Mode::Streamed | Mode::Spilled => 0,
        }
    }

    pub(super) fn load(&self, layer: usize) -> Result<LayerWeights<B::Tensor>> {
        let source = |name: &str| self.job.checkpoint.tensor(name);
        LayerWeights::load(self.backend, &self.job.model.layers[layer], &source)
    }
}

pub(super) fn send<B: Solver>(finisher: &Sender<Finished<B>>, part: Finished<B>) -> Result<()> {
    finisher.send(part).map_err(|_| finisher_ended())
}

/// The thread that quantizes says why itself.
pub(super) fn finisher_ended() -> Error {
    Error::run("the quantizing thread ended early")
}
