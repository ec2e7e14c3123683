//! Runs a rank's slice: hidden states come in, pass layer by layer in groups of micro-batches, and go out. A resumed
//! run does only the part of this that its [`crate::schedule::Routes`] name.
//!
//! The work is divided among threads. One loads the next layer, one computes, one quantizes and one places its tensors.
//! Another pair of quantizing and placing threads copies the embedding, the final norm and lm_head. Two more bring
//! hidden states to the device and send them on. A streamed stage hands over one layer at a time and waits until its
//! weights are released, so that the weights of at most three layers are in memory. A resident stage loads its whole
//! slice ahead and keeps it until the last group has passed.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, bounded};

use super::embedding::embed;
use super::stage::{Stage, send};
use super::transfer::{Transfer, WAITING, arrivals, departures};
use super::walker::Walk;
use crate::backend::Solver;
use crate::checkpoint::OutputFiles;
use crate::error::Result;
use crate::finish::{FinisherWeights, InputMaxima, ToFinish, finish};
use crate::progress::Phases;
use crate::record::PartId;
use crate::threads;

impl<B: Solver> Stage<'_, B> {
    /// Runs the slice to its end, and returns where the time went. Tensors are written to `files` where this rank sees
    /// the output, and otherwise sent to rank 0.
    ///
    /// # Errors
    /// Exit code 5: a disk or a device that fails, a maximum that is zero, NaN or infinite.
    pub fn run(self, files: Option<&OutputFiles>) -> Result<Phases> {
        let started = Instant::now();
        std::thread::scope(|scope| {
            let (backend, job, outbox, timeline) = (self.backend, self.job, &self.outbox, self.timeline);
            // Statistics are larger than weights, so no layer with statistics may wait in the channel. Without them, a
            // layer's weights and its maxima may be two messages.
            let waiting = if job.method.needs_statistics() { 0 } else { 2 * self.ahead() };
            let (to_finisher, to_finish) = bounded(waiting);
            let finishing = threads::scoped(scope, "finish", move || {
                finish(backend, job, files, outbox, timeline, &to_finish)
            })?;
            // Parts that are only copied have a finisher of their own: they may be as large as a layer, and a layer
            // must not wait for them.
            let unquantized = self.unquantized().into_iter().map(ToFinish::Unquantized);
            let copying = threads::scoped(scope, "copy", move || {
                finish(backend, job, files, outbox, timeline, unquantized)
            })?;
            let (to_walk, arrived) = bounded(WAITING);
            let (walking, ended) = bounded(0);
            let (incoming, hidden) = (self.incoming.clone(), job.model.hidden);
            let (first, routes) = (self.slice.start == 0, self.routes);
            let arrive = move || match first {
                true => embed(backend, job, routes, &to_walk, &ended),
                false => arrivals(backend, hidden, &incoming, &to_walk, &ended),
            };
            let arrivals = threads::scoped(scope, "arrive", arrive)?;
            let (departing, leaving) = bounded(WAITING);
            let depart = move || outbox.report_failure(departures(backend, outbox, &leaving));
            let departures = threads::scoped(scope, "depart", depart)?;

            let walked = outbox.report_failure(self.send_all(&to_finisher, Transfer { arrived, departing }));
            // The other threads end when their channels are closed.
            drop((to_finisher, walking));
            let finished = threads::value(finishing.join());
            let copied = threads::value(copying.join());
            let departed = threads::value(departures.join());
            // Where one of these threads failed, the walk's error only says that a channel is closed, so theirs go
            // first.
            let mut phases = finished?;
            phases.write += copied?.write;
            let departed = departed?;
            let walked = walked?;
            phases.transfer = departed + threads::value(arrivals.join());
            (phases.forward, phases.wait, phases.passes) = (walked.forward, walked.wait, walked.passes);
            phases.total = started.elapsed().as_secs_f64();
            Ok(phases)
        })
    }

    /// The parts of this rank that have no linear to quantize.
    fn unquantized(&self) -> Vec<PartId> {
        let head = (self.slice.start == 0).then_some(PartId::Head);
        let tail = (self.slice.end == self.job.model.layers.len()).then_some(PartId::Tail);
        head.into_iter().chain(tail).collect()
    }

    /// Hands every layer of this rank to the finisher.
    fn send_all(&self, finisher: &Sender<ToFinish<B>>, transfer: Transfer<B>) -> Result<Phases> {
        let mut walked = Phases::default();
        if self.job.calibrates {
            walked = self.walk(finisher, transfer)?;
        } else {
            for layer in self.slice.clone().filter(|&layer| !self.job.is_finished(PartId::Layer(layer))) {
                let weights = Some(FinisherWeights::new(Arc::new(self.load(layer)?)));
                send(finisher, ToFinish::MaxScales { layer, weights, inputs: InputMaxima::NotNeeded })?;
            }
        }
        Ok(walked)
    }

    /// Passes micro-batches through the slice. Methods with statistics can't finish a layer before all groups have
    /// passed it. So that the next stage need not wait for that, they make two sweeps where there is one: the first
    /// only computes the hidden states for it, and in the second all stages work at the same time, each on its own
    /// layers.
    fn walk(&self, finisher: &Sender<ToFinish<B>>, transfer: Transfer<B>) -> Result<Phases> {
        let mut walk = Walk::new(self, transfer)?;
        if !self.job.method.needs_statistics() {
            walk.maxima(finisher)?;
        } else {
            if !self.routes.forward.is_empty() {
                walk.forward()?;
            }
            walk.statistics(finisher)?;
        }
        let Walk { computed, waited, passes, .. } = walk;
        Ok(Phases { forward: computed, wait: waited, passes, ..Phases::default() })
    }
}
