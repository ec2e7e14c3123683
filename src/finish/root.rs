//! Handles the messages that ranks send to rank 0: tensors are written, finished parts recorded in the journal, and
//! progress is shown.

use super::messages::{Event, ToRoot};
use super::prover::Prover;
use crate::checkpoint::OutputFiles;
use crate::cluster::Frame;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::record::{Journal, PartRecord};

/// Handles the messages that ranks send to rank 0, on a thread of its own.
pub struct RootInbox<'a> {
    /// The output.
    pub files: &'a OutputFiles,
    /// The journal.
    pub journal: Journal,
    /// The progress bar.
    pub progress: Progress,
    /// Parts finished in this run or in an earlier one.
    pub records: Vec<PartRecord>,
    /// Verifies finished layers while others are being computed; none where that is all done at the end.
    pub prover: Option<Prover>,
}

impl RootInbox<'_> {
    /// Handles a message from rank `peer`.
    ///
    /// # Errors
    /// Exit code 5: a disk that fails, a tensor that was damaged on its way.
    pub fn handle(&mut self, peer: usize, frame: Frame) -> Result<()> {
        let head = serde_json::from_slice(&frame.head).map_err(|e| {
            Error::run(format!("rank {peer} sent something unreadable: {e}"))
                .fix("run the same distq everywhere")
        })?;
        match head {
            ToRoot::Event(Event::Passed { layer }) => self.progress.step(peer, layer),
            ToRoot::Event(Event::Observed(observed)) => self.journal.observed(&observed)?,
            ToRoot::Event(Event::Finished(record)) => {
                self.journal.finished(&record)?;
                if let Some(prover) = &mut self.prover {
                    prover.finished(peer, record.part);
                }
                self.records.push(record);
            }
            ToRoot::Tensor { name, digest } => {
                if crate::checkpoint::digest(&frame.body) != digest {
                    return Err(Error::run(format!("a tensor from rank {peer} was damaged on its way"))
                        .tensor(name)
                        .fix("check the network, then use --resume"));
                }
                self.files.write(&name, &frame.body)?;
                if let Some(prover) = &mut self.prover {
                    prover.written_here(peer);
                }
            }
        }
        Ok(())
    }
}
