//! One rank's walk over its slice: hidden states in, layer by layer over a group of micro-batches, hidden states out;
//! in a resumed run no more of it than its [`Routes`] say. One thread loads the next layer, one computes, one quantizes
//! the layer before (or one that is still being passed, where codes depend on weights alone) and another places it; one
//! more copies what nothing is done to, and two move hidden states. A streamed stage hands over one layer at a time, and
//! waits until weights are given back, so at most three layers' exist; a resident one loads its whole
//! slice ahead and keeps it until the last group has passed.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, bounded};

use super::crossing::{Crossing, WAITING, arrivals, departures};
use super::embedding::embed;
use super::stage::{Stage, send};
use super::walker::Walk;
use crate::backend::Solver;
use crate::checkpoint::OutputFiles;
use crate::error::Result;
use crate::finish::{Finished, Inputs, Lent, finish};
use crate::progress::Phases;
use crate::record::PartId;
use crate::threads;

impl<B: Solver> Stage<'_, B> {
    /// Runs the slice to its end, writing to `files` where this rank sees the output, and says where the time
    /// went.
    pub fn run(self, files: Option<&OutputFiles>) -> Result<Phases> {
        let started = Instant::now();
        std::thread::scope(|scope| {
            let (backend, job, outbox, timeline) = (self.backend, self.job, &self.outbox, self.timeline);
            // Statistics are larger than weights: of them, no more than one layer may wait. Otherwise a layer's weights
            // and its maxima may come one after the other.
            let waiting = if job.method.needs_statistics() { 0 } else { 2 * self.ahead() };
            let (to_finisher, finished) = bounded(waiting);
            let finishing = threads::scoped(scope, "finish", move || {
                finish(backend, job, files, outbox, timeline, &finished)
            })?;
            // What is only copied may be as large as a layer, which must not wait for it.
            let copied = self.copied().into_iter().map(Finished::Copied);
            let copying = threads::scoped(scope, "copy", move || {
                finish(backend, job, files, outbox, timeline, copied)
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
            let depart = move || outbox.told(departures(backend, outbox, &leaving));
            let departures = threads::scoped(scope, "depart", depart)?;

            let walked = outbox.told(self.send_all(&to_finisher, Crossing { arrived, departing }));
            drop((to_finisher, walking));
            let finished = threads::value(finishing.join());
            let copied = threads::value(copying.join());
            let departed = threads::value(departures.join());
            // Where one of these failed, the walk only noticed that nobody listens any more.
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

    /// The parts of this rank that have nothing to quantize.
    fn copied(&self) -> Vec<PartId> {
        let head = (self.slice.start == 0).then_some(PartId::Head);
        let tail = (self.slice.end == self.job.model.layers.len()).then_some(PartId::Tail);
        head.into_iter().chain(tail).collect()
    }

    /// Hands every layer of this rank to the finisher.
    fn send_all(&self, finisher: &Sender<Finished<B>>, crossing: Crossing<B>) -> Result<Phases> {
        let mut walked = Phases::default();
        if self.job.calibrates {
            walked = self.walk(finisher, crossing)?;
        } else {
            for layer in self.slice.clone().filter(|&layer| !self.job.is_finished(PartId::Layer(layer))) {
                let weights = Some(Lent::new(Arc::new(self.load(layer)?)));
                send(finisher, Finished::Max { layer, weights, inputs: Inputs::Unneeded })?;
            }
        }
        Ok(walked)
    }

    /// Walks micro-batches through the slice. Methods that need all of a layer's statistics can't finish a layer while
    /// later groups are still to come, so where a stage behind waits they walk twice: first hidden states alone, so
    /// that it gets to work, then every stage at its own layers.
    fn walk(&self, finisher: &Sender<Finished<B>>, crossing: Crossing<B>) -> Result<Phases> {
        let mut walk = Walk::new(self, crossing)?;
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
