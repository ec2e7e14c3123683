//! One rank's walk over its slice: hidden states in, layer by layer over a group of micro-batches,
//! hidden states out. Three threads: one loads the next layer, one computes, one quantizes and places the
//! layer before. A streamed stage hands over one layer at a time, so at most three layers' weights exist; a
//! resident one loads its whole slice ahead and keeps it until the last group has passed.

use std::ops::Range;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::finish::{Finished, Inputs, finish};
use super::job::Job;
use super::journal::PartId;
use super::messages::{Hidden, Outbox};
use super::walk::Walk;
use crate::backend::Solver;
use crate::checkpoint::OutputFiles;
use crate::cluster::Frame;
use crate::error::{Error, Result};
use crate::model::{Batch, LayerWeights};
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
            (phases.forward, phases.wait) = walked?;
            phases.total = started.elapsed().as_secs_f64();
            Ok(phases)
        })
    }

    /// Layers that may wait between two threads: where there is room for the slice, none has to wait for
    /// another.
    pub(super) fn ahead(&self) -> usize {
        match self.mode {
            Mode::Resident => self.slice.len(),
            Mode::Streamed => 0,
        }
    }

    /// Hands every part of this rank to the finisher; returns seconds of computing and of waiting for hidden
    /// states.
    fn send_all(&self, finisher: &Sender<Finished<B>>) -> Result<(f64, f64)> {
        if self.slice.start == 0 {
            send(finisher, Finished::Copied(PartId::Head))?;
        }
        // What is only copied comes first: it is on the disk before there is anything else to write.
        if self.slice.end == self.job.model.layers {
            send(finisher, Finished::Copied(PartId::Tail))?;
        }
        let mut seconds = (0.0, 0.0);
        match self.job.forward_until {
            Some(last) if self.slice.start <= last => seconds = self.walk(last, finisher)?,
            _ => {
                for layer in self.slice.clone().filter(|&layer| !self.job.is_finished(PartId::Layer(layer))) {
                    send(
                        finisher,
                        Finished::Layer { layer, weights: self.load(layer)?, inputs: Inputs::None },
                    )?;
                }
            }
        }
        Ok(seconds)
    }

    pub(super) fn load(&self, layer: usize) -> Result<LayerWeights<B::Tensor>> {
        let source = |name: &str| self.job.checkpoint.tensor(name);
        LayerWeights::load(self.backend, &self.job.model, layer, &source)
    }

    /// Brings the hidden states of a group in: embedded on the first stage, received on the others. Adds
    /// the seconds of waiting to `waited`. A resident stage keeps the embedding in `table`.
    pub(super) fn fill(
        &self,
        first: usize,
        group: &[Batch<B>],
        states: &mut [B::Tensor],
        table: &mut Option<B::Tensor>,
        waited: &mut f64,
    ) -> Result<()> {
        let job = self.job;
        if self.slice.start == 0 {
            let here = match table.take() {
                Some(here) => here,
                None => self.backend.load(&job.checkpoint.tensor(&job.model.embedding().name)?)?,
            };
            for (i, batch) in group.iter().enumerate() {
                self.backend.set_rows(&mut states[i], batch.tokens);
                let ids = self.backend.index(job.ids_of(first + i))?;
                self.backend.embed(&here, &ids, &mut states[i])?;
            }
            *table = (self.mode == Mode::Resident).then_some(here);
            return Ok(());
        }
        for (i, batch) in group.iter().enumerate() {
            let started = Instant::now();
            let frame = self
                .incoming
                .recv()
                .map_err(|_| Error::run("the stage before ended without sending its hidden states"))?;
            let hidden = Hidden::from_frame(frame);
            *waited += started.elapsed().as_secs_f64();
            debug_assert_eq!(hidden.micro_batch, first + i, "messages of one sender arrive in order");
            self.backend.set_rows(&mut states[i], batch.tokens);
            self.backend.upload(&hidden.bytes, &mut states[i])?;
        }
        Ok(())
    }
    /// Sends a hidden state to the next stage.
    pub(super) fn pass_on(&self, micro_batch: usize, x: &B::Tensor) -> Result<()> {
        let mut bytes = Vec::new();
        self.backend.download(x, &mut bytes)?;
        self.outbox.hidden(micro_batch, bytes)
    }

    /// Walks all micro-batches through the slice, as far as layer `last`. Methods that need all of a layer's
    /// statistics can't finish a layer while later groups are still to come, so they walk twice: first hidden
    /// states alone, so that the stage behind gets to work, then every stage at its own layers.
    fn walk(&self, last: usize, finisher: &Sender<Finished<B>>) -> Result<(f64, f64)> {
        let (job, started) = (self.job, Instant::now());
        let layers = self.slice.start..self.slice.end.min(last + 1);
        let passes_on = last >= self.slice.end;
        let walk = Walk::new(self, layers)?;
        let mut waited = 0.0;
        if !job.method.needs_statistics() {
            walk.maxima(passes_on, finisher, &mut waited)?;
        } else {
            let mut kept = Vec::new();
            if passes_on {
                walk.forward(&mut kept, &mut waited)?;
            }
            walk.statistics(kept, finisher, &mut waited)?;
        }
        Ok((started.elapsed().as_secs_f64() - waited, waited))
    }
}

pub(super) fn send<B: Solver>(finisher: &Sender<Finished<B>>, part: Finished<B>) -> Result<()> {
    finisher.send(part).map_err(|_| Error::run("the quantizing thread ended early"))
}
