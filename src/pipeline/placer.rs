//! Finished tensors to their places, on a thread of their own: while one is digested and written, the next is
//! being quantized.

use std::collections::HashMap;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::job::Job;
use super::journal::{GroupRecord, PartId, PartRecord, digest, part_digest};
use super::messages::{Event, Outbox};
use crate::checkpoint::{OutputFiles, SourceTensor, first_not_finite};
use crate::error::{Error, Result};

/// Something to be placed.
pub enum ToPlace {
    /// A tensor that was made here.
    Made(String, Vec<u8>),
    /// A tensor of the source, as it is.
    Copied(SourceTensor),
    /// All tensors of a part have been handed over.
    Part(PartId, Vec<GroupRecord>),
    /// Nothing: dropped when all that came before has been placed.
    Settled(Sender<()>),
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
}

impl Placer<'_> {
    /// Takes tensors until there are no more; returns the seconds of digesting, writing and sending.
    ///
    /// # Errors
    /// Exit code 5: a disk that fails, a tensor to be copied that holds NaN or infinity.
    pub fn run(self, tensors: &Receiver<ToPlace>) -> Result<f64> {
        let (mut digests, mut seconds) = (HashMap::new(), 0.0);
        for tensor in tensors {
            let started = Instant::now();
            match tensor {
                ToPlace::Made(name, bytes) => {
                    digests.insert(name.clone(), digest(&bytes));
                    match self.files {
                        Some(files) => {
                            files.write(&name, &bytes)?;
                            // Scalars aren't worth it; where nobody wants it any more it is simply freed.
                            if bytes.len() > size_of::<f32>() {
                                let _ = self.spare.try_send(bytes);
                            }
                        }
                        None => self.outbox.tensor(&name, bytes)?,
                    }
                }
                // In place there is no need for a copy in memory: an embedding may be gigabytes.
                ToPlace::Copied(source) => {
                    finite(self.job, &source)?;
                    digests.insert(source.name.clone(), digest(source.bytes()));
                    match self.files {
                        Some(files) => files.write(&source.name, source.bytes())?,
                        None => self.outbox.tensor(&source.name, source.bytes().to_vec())?,
                    }
                }
                ToPlace::Part(part, groups) => {
                    let tensors = &self.job.inventory.part(part).outputs;
                    let digest = part_digest(tensors.iter().map(|tensor| {
                        digests.remove(&tensor.name).expect("every tensor of a part comes before its end")
                    }));
                    self.outbox.event(Event::Finished(PartRecord { part, digest, groups }))?;
                }
                ToPlace::Settled(settled) => drop(settled),
            }
            seconds += started.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }
}

/// The health check of what is only copied: nothing is computed with most of it, so nothing else would notice.
fn finite(job: &Job, source: &SourceTensor) -> Result<()> {
    let Some(at) = first_not_finite(source.dtype, source.bytes()) else { return Ok(()) };
    let cols = source.shape.last().copied().unwrap_or(1).max(1);
    let error = Error::run(format!(
        "health check: the tensor holds NaN or infinity, first in row {}, column {}",
        at / cols,
        at % cols
    ));
    let file = &job.checkpoint.files[job.checkpoint.entry(&source.name)?.file];
    Err(error.file(file).tensor(&source.name).fix("repair or replace this tensor in the source"))
}
