//! A worker that computes while the main thread moves messages.

use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};

use super::pump::{Outgoing, Pumped};
use super::{Cluster, Frame, Tag};
use crate::error::{Error, Result};
use crate::threads;

/// Messages that a worker may have waiting for the main thread, and the other way round.
const CHANNEL: usize = 8;

/// Bytes from other ranks that may wait on rank 0 until they are written, unless one message alone has more.
const TO_BE_WRITTEN: usize = 256 << 20;

/// A worker's way to the main thread; each of its threads may have one.
#[derive(Clone)]
pub struct ToMain {
    messages: Sender<Outgoing>,
    /// Apart from messages, which wait for the network: a failure ends the job at once.
    failures: Sender<Error>,
}

impl ToMain {
    /// Hands over a message to `peer`, which may be this rank. Waits while others wait.
    ///
    /// # Errors
    /// Exit code 5 where the job is ending.
    pub fn send(&self, peer: usize, tag: Tag, frame: Frame) -> Result<()> {
        let sent = self.messages.send(Outgoing { peer, tag, frame });
        sent.map_err(|_| Error::run("the job is ending because of another failure"))
    }

    /// Ends the job with this error. Returns before that.
    pub fn fail(&self, error: &Error) {
        // Where nobody listens any more, the job is ending already.
        let _ = self.failures.send(error.clone());
    }
}

impl Cluster {
    /// Runs `worker` on a thread of its own until every rank's worker has ended and everything that was sent has
    /// been taken. The worker gets its way out, and what others send it with [`Tag::Hidden`], in order; what has
    /// [`Tag::Root`] goes to `root`, in the order in which each rank sent it, on a thread of its own as well: it writes
    /// to disks, and the main thread must stay with MPI.
    ///
    /// # Errors
    /// The worker's, where it fails last of all. Any other failure, of any thread and any rank, ends the job here: no
    /// thread has to notice that another one has gone.
    pub fn work<T: Send>(
        &self,
        worker: impl FnOnce(ToMain, Receiver<Frame>) -> Result<T> + Send,
        mut root: impl FnMut(usize, Frame) -> Result<()> + Send,
    ) -> Result<T> {
        let (messages, outgoing) = bounded(CHANNEL);
        let (failures, failed) = unbounded();
        let (to_worker, incoming) = bounded(CHANNEL);
        // Bytes in that channel and in the hands of its receiver.
        let waiting = &AtomicUsize::new(0);
        let to_main = ToMain { messages, failures };
        std::thread::scope(|scope| {
            // In here, so that its sender is gone where the second thread can't be started.
            let (to_root, inbox) = unbounded::<(usize, Frame)>();
            let failures = to_main.failures.clone();
            let take = move || {
                for (peer, frame) in inbox {
                    let bytes = frame.body.len();
                    root(peer, frame).inspect_err(|error| drop(failures.send(error.clone())))?;
                    waiting.fetch_sub(bytes, Ordering::Relaxed);
                }
                Ok(())
            };
            let taking = threads::scoped(scope, "root", take)?;
            let work = move || {
                // Kept until a failure has been told, so that the main thread does not take this for the end.
                let _open = to_main.clone();
                let failures = to_main.failures.clone();
                worker(to_main, incoming).inspect_err(|error| drop(failures.send(error.clone())))
            };
            let worker = threads::scoped(scope, "walk", work)?;
            let pumped = self.pump(&outgoing, &failed, &mut |tag, peer, frame| match tag {
                Tag::Root => {
                    let (bytes, before) = (frame.body.len(), waiting.load(Ordering::Relaxed));
                    // Events are small, and this rank's own have nowhere else to wait.
                    if peer != self.rank && bytes > 0 && before > 0 && before + bytes > TO_BE_WRITTEN {
                        return Ok(Pumped::Later(frame));
                    }
                    waiting.fetch_add(bytes, Ordering::Relaxed);
                    // Where that thread has ended, it has said why.
                    let _ = to_root.send((peer, frame));
                    Ok(Pumped::Taken)
                }
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
            if let Err(error) = pumped {
                self.end(error);
            }
            drop(to_root);
            let taken = self.attend(|| threads::value(taking.join()));
            taken.and(threads::value(worker.join()))
        })
    }
}
