//! A worker that computes while the main thread moves messages.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use super::pump::{Outgoing, Pumped};
use super::{Cluster, Frame, Tag};
use crate::error::{Error, Result};
use crate::threads;

/// Messages that a worker may have waiting for the main thread, and the other way round.
const CHANNEL: usize = 8;

impl Cluster {
    /// Runs `worker` on a thread of its own until every rank's worker has ended and everything that was sent has
    /// been taken. The worker gets its way out, and what others send it with [`Tag::Hidden`], in order; what has
    /// [`Tag::Root`] goes to `root` on the main thread.
    ///
    /// # Errors
    /// The worker's. Where there are other ranks, an error of any of them ends the job here.
    pub fn work<T: Send>(
        &self,
        worker: impl FnOnce(Sender<Outgoing>, Receiver<Frame>) -> Result<T> + Send,
        root: &mut dyn FnMut(usize, Frame) -> Result<()>,
    ) -> Result<T> {
        let (to_main, outgoing) = bounded(CHANNEL);
        let (to_worker, incoming) = bounded(CHANNEL);
        std::thread::scope(|scope| {
            let work = move || {
                worker(to_main.clone(), incoming)
                    .inspect_err(|error| drop(to_main.send(Outgoing::Fail(error.clone()))))
            };
            let worker = threads::scoped(scope, "walk", work)?;
            let pumped = self.pump(&outgoing, &mut |tag, peer, frame| match tag {
                Tag::Root => root(peer, frame).map(|()| Pumped::Taken),
                Tag::Hidden => match to_worker.try_send(frame) {
                    Ok(()) => Ok(Pumped::Taken),
                    Err(TrySendError::Full(frame)) => Ok(Pumped::Later(frame)),
                    Err(TrySendError::Disconnected(_)) => Err(Error::run(format!(
                        "rank {peer} sent hidden states after this rank's walk had ended"
                    ))
                    .fix("report this with the command that led here")),
                },
                _ => Err(Error::run(format!("rank {peer} sent a message that is not for this rank"))
                    .fix("report this with the command that led here")),
            });
            if let (Err(error), Some(_)) = (&pumped, &self.transport) {
                // Other ranks must not wait until this one's worker notices.
                self.end(error.clone());
            }
            if pumped.is_err() {
                // Wake a worker that waits for hidden states or for the main thread.
                drop(to_worker);
                drop(outgoing);
            }
            let worked = threads::value(worker.join());
            pumped.and(worked)
        })
    }
}
