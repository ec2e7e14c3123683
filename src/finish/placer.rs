//! Finished tensors to their places, on a thread of their own: while one is digested and written, the next is
//! being quantized.

use std::collections::HashMap;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::messages::{Event, Outbox};
use crate::checkpoint::{OutTensor, OutputFiles, SourceTensor, digest, first_not_finite};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::record::{GroupRecord, PartId, PartRecord};

/// Something to be placed.
pub enum ToPlace {
    /// A tensor that was made here.
    Made(String, Vec<u8>),
    /// A tensor of the source, as it is.
    Copied(SourceTensor),
    /// All tensors of a part have been handed over.
    Part(PartId, Vec<GroupRecord>),
    /// Nothing: answered when all that came before has been placed.
    Settle,
}

/// Writes tensors where this rank sees the output, and sends them to rank 0 where it doesn't.
pub struct Placer<'a> {
    /// What the parts consist of.
    pub job: &'a Job,
    /// The output, where this rank sees it.
    pub files: Option<&'a OutputFiles>,
    /// To rank 0.
    pub outbox: Outbox,
    /// Where memory that is no longer needed goes, for the next tensor: fresh pages cost more than the copy into
    /// them.
    pub spare: Sender<Vec<u8>>,
    /// Answers to [`ToPlace::Settle`]. It is the placer's own, so that whoever waits for an answer hears of its end: a
    /// sender in a message would stay in the channel, which keeps what was queued when its receiver is gone.
    pub settled: Sender<()>,
}

impl Placer<'_> {
    /// Takes tensors until there are no more; returns the seconds of digesting, writing and sending.
    ///
    /// # Errors
    /// Exit code 5: a disk that fails, a tensor to be copied that holds NaN or infinity; 3 where its FP8 codes do.
    pub fn run(self, tensors: &Receiver<ToPlace>) -> Result<f64> {
        let (mut digests, mut seconds) = (HashMap::new(), 0.0);
        for tensor in tensors {
            let started = Instant::now();
            match tensor {
                ToPlace::Made(name, bytes) => {
                    let digest = digest(&bytes);
                    match self.files {
                        Some(files) => {
                            files.write(&name, &bytes)?;
                            // Scalars aren't worth it; where nobody wants it any more it is simply freed.
                            if bytes.len() > size_of::<f32>() {
                                let _ = self.spare.try_send(bytes);
                            }
                        }
                        None => self.outbox.tensor(&name, &digest, bytes)?,
                    }
                    digests.insert(name, digest);
                }
                // In place there is no need for a copy in memory: an embedding may be gigabytes.
                ToPlace::Copied(source) => {
                    finite(self.job, &source)?;
                    let digest = digest(source.bytes());
                    match self.files {
                        Some(files) => files.write(&source.name, source.bytes())?,
                        None => self.outbox.tensor(&source.name, &digest, source.bytes().to_vec())?,
                    }
                    digests.insert(source.name, digest);
                }
                ToPlace::Part(part, groups) => {
                    let tensors = &self.job.inventory.part(part).outputs;
                    let digest_of = |tensor: &OutTensor| {
                        digests.remove(&tensor.name).expect("every tensor of a part comes before its end")
                    };
                    let digests = tensors.iter().map(digest_of).collect();
                    self.outbox.event(Event::Finished(PartRecord { part, digests, groups }))?;
                }
                ToPlace::Settle => drop(self.settled.send(())),
            }
            seconds += started.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }
}

/// The health check of what is only copied: nothing is computed with most of it, so nothing else would notice.
fn finite(job: &Job, source: &SourceTensor) -> Result<()> {
    let Some(at) = first_not_finite(source.dtype, source.checked()?) else { return Ok(()) };
    let cols = source.shape.last().copied().unwrap_or(1).max(1);
    let error = Error::run(format!(
        "health check: the tensor holds NaN or infinity, first in row {}, column {}",
        at / cols,
        at % cols
    ));
    let file = &job.checkpoint.files[job.checkpoint.entry(&source.name)?.file];
    Err(error.file(file).tensor(&source.name).fix("repair or replace this tensor in the source"))
}
