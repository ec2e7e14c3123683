//! From a layer's weights and input maxima to its bytes at their places in the output.

use std::time::Instant;

use crossbeam_channel::Receiver;

use super::job::Job;
use super::journal::{GroupRecord, PartId, PartRecord};
use super::messages::{Event, Outbox};
use crate::backend::Backend;
use crate::checkpoint::OutputFiles;
use crate::error::{Error, Result};
use crate::methods::{quantize_linear, weight_amax};
use crate::model::LayerWeights;
use crate::nvfp4::GlobalScale;
use crate::report::Phases;

/// A part whose statistics are complete.
pub enum Finished<B: Backend> {
    /// A part that has nothing to quantize.
    Copied(PartId),
    /// A decoder layer.
    Layer {
        /// Which one.
        layer: usize,
        /// Its weights.
        weights: LayerWeights<B::Tensor>,
        /// `max |x|` by site, where the scheme needs it.
        input_amax: Option<Vec<f32>>,
    },
}

/// Quantizes and places the parts that this rank owns.
pub struct Finisher<'a, B: Backend> {
    backend: &'a B,
    job: &'a Job,
    /// The output where this rank sees it; without it tensors go to rank 0.
    files: Option<&'a OutputFiles>,
    outbox: Outbox,
    /// Seconds spent quantizing and writing.
    phases: Phases,
}

impl<'a, B: Backend> Finisher<'a, B> {
    /// A finisher that writes to `files`, or through `outbox` to rank 0.
    pub fn new(backend: &'a B, job: &'a Job, files: Option<&'a OutputFiles>, outbox: Outbox) -> Self {
        Finisher { backend, job, files, outbox, phases: Phases::default() }
    }

    /// Takes parts until there are no more; returns the time spent.
    ///
    /// # Errors
    /// Exit code 5: a maximum that is zero, NaN or infinite, a disk that fails.
    pub fn run(mut self, parts: &Receiver<Finished<B>>) -> Result<Phases> {
        for part in parts {
            match part {
                Finished::Copied(part) => self.copied(part)?,
                Finished::Layer { layer, weights, input_amax } => {
                    self.layer(layer, &weights, input_amax.as_deref())?
                }
            }
        }
        Ok(self.phases)
    }

    /// Carries over a part that has nothing to quantize.
    fn copied(&mut self, part: PartId) -> Result<()> {
        if self.job.is_finished(part) {
            return Ok(());
        }
        let mut digest = blake3::Hasher::new();
        self.copy(part, &mut digest)?;
        self.finished(part, digest, vec![])
    }

    /// Quantizes and places a layer. `input_amax` holds `max |x|` by site, where a scheme needs it.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn layer(
        &mut self,
        layer: usize,
        weights: &LayerWeights<B::Tensor>,
        input_amax: Option<&[f32]>,
    ) -> Result<()> {
        let part = PartId::Layer(layer);
        let mut digest = blake3::Hasher::new();
        self.copy(part, &mut digest)?;
        let mut groups = Vec::new();
        for group in &self.job.inventory.layers[layer].quantized {
            let started = Instant::now();
            let linears = &weights.linears[group.site as usize];
            let maxima = weight_amax(self.backend, linears)?;
            for (linear, &amax) in group.members.iter().zip(&maxima) {
                healthy("weights", &linear.weight(), amax)?;
            }
            let input = input_amax.map(|by_site| by_site[group.site as usize]);
            if let Some(amax) = input {
                healthy("calibration inputs", &group.members[0].name, amax)?;
            }
            let global = GlobalScale::from_amax(maxima.iter().copied().fold(0.0, f32::max));
            self.phases.quantize += started.elapsed().as_secs_f64();
            for (linear, weight) in group.members.iter().zip(linears) {
                let started = Instant::now();
                let quantized = quantize_linear(self.backend, weight, linear.rows * linear.cols, global)?;
                self.phases.quantize += started.elapsed().as_secs_f64();
                let names = self.job.layout.linear_names(&linear.name);
                self.put(&names.codes, quantized.codes, &mut digest)?;
                self.put(&names.scales, quantized.scales, &mut digest)?;
                self.put(&names.weight_global, self.job.layout.scalar(global).to_vec(), &mut digest)?;
                if let Some(amax) = input {
                    let scalar = self.job.layout.scalar(GlobalScale::from_amax(amax));
                    self.put(&names.input_global, scalar.to_vec(), &mut digest)?;
                }
            }
            groups.push(GroupRecord {
                site: group.site,
                input_amax: input,
                members: group.members.iter().map(|l| l.name.clone()).zip(maxima).collect(),
            });
        }
        self.finished(part, digest, groups)
    }

    fn copy(&mut self, part: PartId, digest: &mut blake3::Hasher) -> Result<()> {
        for name in &self.job.part(part).copied {
            let tensor = self.job.checkpoint.tensor(name)?;
            match self.files {
                // In place there is no need for a copy in memory: an embedding may be gigabytes.
                Some(_) => self.write(name, tensor.bytes(), digest)?,
                None => self.put(name, tensor.bytes().to_vec(), digest)?,
            }
        }
        Ok(())
    }

    fn put(&mut self, name: &str, bytes: Vec<u8>, digest: &mut blake3::Hasher) -> Result<()> {
        if self.files.is_some() {
            return self.write(name, &bytes, digest);
        }
        let started = Instant::now();
        digest.update_rayon(&bytes);
        let sent = self.outbox.tensor(name, bytes);
        self.phases.write += started.elapsed().as_secs_f64();
        sent
    }

    fn write(&mut self, name: &str, bytes: &[u8], digest: &mut blake3::Hasher) -> Result<()> {
        let started = Instant::now();
        digest.update_rayon(bytes);
        let written = self.files.map_or(Ok(()), |files| files.write(name, bytes));
        self.phases.write += started.elapsed().as_secs_f64();
        written
    }

    fn finished(&mut self, part: PartId, digest: blake3::Hasher, groups: Vec<GroupRecord>) -> Result<()> {
        let digest = digest.finalize().to_hex().to_string();
        self.outbox.event(Event::Finished(PartRecord { part, digest, groups }))
    }
}

/// A maximum that can be turned into a scale.
fn healthy(what: &str, tensor: &str, amax: f32) -> Result<()> {
    if amax.is_finite() && amax > 0.0 {
        return Ok(());
    }
    let fault = if amax == 0.0 { "are all zero" } else { "hold NaN or infinity" };
    Err(Error::run(format!("health check: the {what} {fault}"))
        .tensor(tensor)
        .fix("repair or replace this tensor in the source, or leave the module out with --ignore"))
}
