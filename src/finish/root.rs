//! What rank 0 does with what it hears: tensors to their places, finished parts into the journal,
//! progress to the user.

use super::messages::{Event, ToRoot};
use super::prover::Prover;
use crate::checkpoint::OutputFiles;
use crate::cluster::Frame;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::record::{Journal, PartRecord};

/// Takes what ranks tell rank 0, on a thread of its own.
pub struct Root<'a> {
    /// The output.
    pub files: &'a OutputFiles,
    /// The journal.
    pub journal: Journal,
    /// What the user sees.
    pub progress: Progress,
    /// Parts finished in this run or in an earlier one.
    pub records: Vec<PartRecord>,
    /// Reads finished layers while others are being made, where there is one.
    pub prover: Option<Prover>,
}

impl Root<'_> {
    /// Takes a message from rank `peer`.
    ///
    /// # Errors
    /// Exit code 5: a disk that fails, a tensor that was damaged on its way.
    pub fn take(&mut self, peer: usize, frame: Frame) -> Result<()> {
        let head = serde_json::from_slice(&frame.head).map_err(|e| {
            Error::run(format!("rank {peer} sent something unreadable: {e}"))
                .fix("run the same distq everywhere")
        })?;
        match head {
            ToRoot::Event(Event::Walked { layer }) => self.progress.step(peer, layer),
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
