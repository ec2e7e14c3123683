//! What a rank's threads share while it walks over its slice, and how parts are handed to the finisher.

use std::ops::Range;

use crossbeam_channel::{Receiver, Sender};

use crate::backend::Solver;
use crate::cluster::Frame;
use crate::error::{Error, Result};
use crate::finish::{Outbox, ToFinish};
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
    /// The job.
    pub job: &'a Job,
    /// The decoder layers of this rank.
    pub slice: Range<usize>,
    /// Whether its weights stay loaded, and where its hidden states are between layers.
    pub mode: Mode,
    /// Micro-batches that pass a layer together.
    pub group: usize,
    /// Which micro-batches pass which of its layers.
    pub routes: &'a Routes,
    /// The directory for hidden states, where there is one.
    pub states: Option<&'a States>,
    /// Where the times of computing, loading and quantizing are noted.
    pub timeline: &'a Timeline,
    /// Hidden states from the stage before, in micro-batch order.
    pub incoming: Receiver<Frame>,
    /// To the stage behind and to rank 0.
    pub outbox: Outbox,
}

impl<B: Solver> Stage<'_, B> {
    /// Layers that may wait between two threads: all of a resident stage, which has memory for them, and none of the
    /// others.
    pub(super) fn ahead(&self) -> usize {
        match self.mode {
            Mode::Resident => self.slice.len(),
            Mode::Streamed | Mode::Spilled => 0,
        }
    }

    /// Loads a layer's weights to the device.
    pub(super) fn load(&self, layer: usize) -> Result<LayerWeights<B::Tensor>> {
        let source = |name: &str| self.job.checkpoint.tensor(name);
        LayerWeights::load(self.backend, &self.job.model.layers[layer], &source)
    }
}

/// Sends a part to the finisher; waits while it is busy.
pub(super) fn send<B: Solver>(finisher: &Sender<ToFinish<B>>, part: ToFinish<B>) -> Result<()> {
    finisher.send(part).map_err(|_| finisher_ended())
}

/// The error where the quantizing thread is gone. That thread has reported its own failure, which is the cause.
pub(super) fn finisher_ended() -> Error {
    Error::run("the quantizing thread ended early")
}
