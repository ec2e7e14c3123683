//! Writes finished tensors to their places in the output, or sends them to rank 0. It runs on a thread of its own:
//! while one tensor is digested and written, the next is being quantized.

use std::collections::HashMap;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use super::messages::{Event, Outbox};
use crate::checkpoint::{OutTensor, OutputFiles, SourceTensor, digest, first_not_finite};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::record::{GroupRecord, PartId, PartRecord};

/// A message to the thread that places tensors.
pub enum ToPlace {
    /// A tensor that was computed: its name and its bytes.
    Made(String, Vec<u8>),
    /// A tensor of the source that is copied unchanged.
    Copied(SourceTensor),
    /// All tensors of a part have been handed over.
    Part(PartId, Vec<GroupRecord>),
    /// Asks for an answer when everything sent before has been placed.
    Flush,
}

/// Writes tensors where this rank sees the output, and sends them to rank 0 where it doesn't.
pub struct Placer<'a> {
    /// What the parts consist of.
    pub job: &'a Job,
    /// The output, where this rank sees it.
    pub files: Option<&'a OutputFiles>,
    /// To rank 0.
    pub outbox: Outbox,
    /// Gives buffers back to the finisher for later tensors: fresh pages from the system cost more than the copy into
    /// them.
    pub spare: Sender<Vec<u8>>,
    /// Answers to [`ToPlace::Flush`]. The placer owns this sender, so that its channel is disconnected when the placer
    /// ends, and a finisher that waits for an answer returns. A sender inside of the message would not do: a channel
    /// keeps its queued messages after its receiver is gone, and the sender in them would stay alive.
    pub flushed: Sender<()>,
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
                    let digest = self.made(&name, bytes)?;
                    digests.insert(name, digest);
                }
                ToPlace::Copied(source) => {
                    let digest = self.copied(&source)?;
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
                ToPlace::Flush => drop(self.flushed.send(())),
            }
            seconds += started.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }

    /// Places a computed tensor; returns its digest.
    fn made(&self, name: &str, bytes: Vec<u8>) -> Result<String> {
        let digest = digest(&bytes);
        match self.files {
            Some(files) => {
                files.write(name, &bytes)?;
                // The buffers of scalars are not worth the exchange. Where the channel is full or closed, the buffer is
                // freed.
                if bytes.len() > size_of::<f32>() {
                    let _ = self.spare.try_send(bytes);
                }
            }
            None => self.outbox.tensor(name, &digest, bytes)?,
        }
        Ok(digest)
    }

    /// Places a tensor of the source; returns its digest. Where this rank writes the output, the mapped bytes are
    /// written without a copy in memory: an embedding may have gigabytes.
    fn copied(&self, source: &SourceTensor) -> Result<String> {
        finite(self.job, source)?;
        let digest = digest(source.bytes());
        match self.files {
            Some(files) => files.write(&source.name, source.bytes())?,
            None => self.outbox.tensor(&source.name, &digest, source.bytes().to_vec())?,
        }
        Ok(digest)
    }
}

/// Checks that a copied tensor is finite. Nothing is computed with most copied tensors, so nothing else would find out.
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
