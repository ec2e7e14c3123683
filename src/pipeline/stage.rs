//! One rank's walk over its slice: hidden states in, layer by layer over a group of micro-batches,
//! hidden states out; in a resumed run no more of it than its [`Routes`] say. Three threads: one loads the next layer, one computes, one quantizes and places the
//! layer before. A streamed stage hands over one layer at a time, so at most three layers' weights exist; a
//! resident one loads its whole slice ahead and keeps it until the last group has passed.

use std::ops::Range;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::finish::{Finished, Inputs, finish};
use super::job::Job;
use super::journal::PartId;
use super::messages::{Hidden, Outbox};
use super::routes::Routes;
use super::states::States;
use super::walk::Walk;
use crate::backend::Solver;
use crate::checkpoint::OutputFiles;
use crate::cluster::Frame;
use crate::error::{Error, Result};
use crate::model::LayerWeights;
use crate::planner::Mode;
use crate::report::{Phases, Timeline};

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
    /// Runs the slice to its end, writing to `files` where this rank sees the output, and says where the time
    /// went.
    pub fn run(self, files: Option<&OutputFiles>) -> Result<Phases> {
        let started = Instant::now();
        std::thread::scope(|scope| {
            // Statistics are larger than weights: of them, no more than one layer may wait.
            let waiting = if self.job.method.needs_statistics() { 0 } else { self.ahead() };
            let (to_finisher, finished) = bounded(waiting);
            let (backend, job, outbox, timeline) =
                (self.backend, self.job, self.outbox.clone(), self.timeline);
            let finishing = scope.spawn(move || finish(backend, job, files, outbox, timeline, &finished));
            let walked = self.send_all(&to_finisher);
            drop(to_finisher);
            let finished = finishing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // Where the finisher failed, the walk only noticed that nobody listens any more.
            let mut phases = finished?;
            let walked = walked?;
            (phases.forward, phases.wait, phases.passes) = (walked.forward, walked.wait, walked.passes);
            phases.total = started.elapsed().as_secs_f64();
            Ok(phases)
        })
    }

    /// Layers that may wait between two threads: where there is room for the slice, none has to wait for
    /// another.
    pub(super) fn ahead(&self) -> usize {
        match self.mode {
            Mode::Resident => self.slice.len(),
            Mode::Streamed | Mode::Spilled => 0,
        }
    }

    /// Hands every part of this rank to the finisher.
    fn send_all(&self, finisher: &Sender<Finished<B>>) -> Result<Phases> {
        if self.slice.start == 0 {
            send(finisher, Finished::Copied(PartId::Head))?;
        }
        // What is only copied comes first: it is on the disk before there is anything else to write.
        if self.slice.end == self.job.model.layers {
            send(finisher, Finished::Copied(PartId::Tail))?;
        }
        let mut walked = Phases::default();
        if self.job.calibrates {
            walked = self.walk(finisher)?;
        } else {
            for layer in self.slice.clone().filter(|&layer| !self.job.is_finished(PartId::Layer(layer))) {
                let weights = self.load(layer)?;
                send(finisher, Finished::Layer { layer, weights, inputs: Inputs::None })?;
            }
        }
        Ok(walked)
    }

    pub(super) fn load(&self, layer: usize) -> Result<LayerWeights<B::Tensor>> {
        let source = |name: &str| self.job.checkpoint.tensor(name);
        LayerWeights::load(self.backend, &self.job.model, layer, &source)
    }

    /// Brings a micro-batch into the slice: embedded on the first stage, received on the others. Adds the seconds of
    /// waiting to `waited`, and leaves the embedding in `table`.
    pub(super) fn enter(
        &self,
        micro_batch: usize,
        state: &mut B::Tensor,
        table: &mut Option<B::Tensor>,
        waited: &mut f64,
    ) -> Result<()> {
        let job = self.job;
        if self.slice.start == 0 {
            let here = match table.take() {
                Some(here) => here,
                None => self.backend.load(&job.checkpoint.tensor(&job.model.embedding().name)?)?,
            };
            let ids = self.backend.index(job.ids_of(micro_batch))?;
            self.backend.embed(&here, &ids, state)?;
            *table = Some(here);
            return Ok(());
        }
        let started = Instant::now();
        let frame = self
            .incoming
            .recv()
            .map_err(|_| Error::run("the stage before ended without sending its hidden states"))?;
        let hidden = Hidden::from_frame(frame);
        *waited += started.elapsed().as_secs_f64();
        debug_assert_eq!(hidden.micro_batch, micro_batch, "messages of one sender arrive in order");
        self.backend.upload(&hidden.bytes, state)
    }

    /// Sends a hidden state to the next stage.
    pub(super) fn pass_on(&self, micro_batch: usize, x: &B::Tensor) -> Result<()> {
        let mut bytes = Vec::new();
        self.backend.download(x, &mut bytes)?;
        self.outbox.hidden(micro_batch, bytes)
    }

    /// Walks micro-batches through the slice. Methods that need all of a layer's statistics can't finish a layer while
    /// later groups are still to come, so where a stage behind waits they walk twice: first hidden states alone, so
    /// that it gets to work, then every stage at its own layers.
    fn walk(&self, finisher: &Sender<Finished<B>>) -> Result<Phases> {
        let started = Instant::now();
        let mut walk = Walk::new(self)?;
        if !self.job.method.needs_statistics() {
            walk.maxima(finisher)?;
        } else {
            if !self.routes.forward.is_empty() {
                walk.forward()?;
            }
            walk.statistics(finisher)?;
        }
        let (wait, passes) = (walk.waited, walk.passes);
        Ok(Phases { forward: started.elapsed().as_secs_f64() - wait, wait, passes, ..Phases::default() })
    }
}

pub(super) fn send<B: Solver>(finisher: &Sender<Finished<B>>, part: Finished<B>) -> Result<()> {
    finisher.send(part).map_err(|_| Error::run("the quantizing thread ended early"))
}
