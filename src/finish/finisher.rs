//! Quantizes the parts of a rank and hands their tensors to the thread that places them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::folding::{Stored, rewritten};
use super::health::{healthy_input, healthy_weight};
use super::messages::Outbox;
use super::placer::{Placer, ToPlace};
use crate::backend::Solver;
use crate::checkpoint::OutputFiles;
use crate::error::{Error, Result};
use crate::forward::LayerWeights;
use crate::job::Job;
use crate::methods::layer::{Layer, QuantizedGroup};
use crate::methods::{SiteStatistics, quantize_linear, weight_amax};
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear};
use crate::progress::{Phases, Timeline, Work};
use crate::record::{Chosen, GroupRecord, PartId};
use crate::threads;

/// A part of the model for the finisher, or what has become known of it.
pub enum ToFinish<B: Solver> {
    /// A part without a linear that is quantized: its tensors are copied.
    Unquantized(PartId),
    /// A layer that is quantized with max scales. Its codes depend on its weights alone, so the weights may be handed
    /// over before the maxima of its inputs are known, and the maxima later.
    MaxScales {
        /// Which layer.
        layer: usize,
        /// Its weights; none where an earlier message had them.
        weights: Option<FinisherWeights<B>>,
        /// The maxima of its inputs.
        inputs: InputMaxima,
    },
    /// A layer whose codes depend on the statistics of its inputs.
    WithStatistics {
        /// Which layer.
        layer: usize,
        /// The statistics, by site.
        statistics: Vec<SiteStatistics<B::Matrix>>,
        /// Its weights.
        weights: FinisherWeights<B>,
    },
}

/// A layer's weights as the finisher holds them, and a signal to the walk, if it waits for one, that the finisher holds
/// them no longer.
pub struct FinisherWeights<B: Solver> {
    weights: Arc<LayerWeights<B::Tensor>>,
    /// Nothing is sent through this channel. It disconnects when this value is dropped.
    release: Option<Sender<()>>,
}

impl<B: Solver> FinisherWeights<B> {
    /// Weights for whose release the walk does not wait.
    pub fn new(weights: Arc<LayerWeights<B::Tensor>>) -> FinisherWeights<B> {
        FinisherWeights { weights, release: None }
    }

    /// Weights whose release the walk waits for. The receiver never yields a value; receiving fails, and so returns,
    /// when the finisher has dropped the weights.
    pub fn with_release(weights: Arc<LayerWeights<B::Tensor>>) -> (FinisherWeights<B>, Receiver<()>) {
        let (release, released) = bounded(0);
        (FinisherWeights { weights, release: Some(release) }, released)
    }
}

/// The maxima of the inputs of a layer that is quantized with max scales.
pub enum InputMaxima {
    /// Another message will have them.
    NotYetKnown,
    /// The scheme does not quantize inputs.
    NotNeeded,
    /// `max |x|` by site.
    Known(Vec<f32>),
}

/// Quantizes the parts that this rank owns.
struct Finisher<'a, B: Solver> {
    backend: &'a B,
    job: &'a Job,
    /// To the thread that places tensors.
    places: Sender<ToPlace>,
    /// Buffers of tensors that have been placed, from that thread.
    placed: Receiver<Vec<u8>>,
    /// That thread's answers to [`ToPlace::Flush`].
    flushed: Receiver<()>,
    /// Buffers that can be used again, by length: layers have tensors of the same lengths.
    spare: HashMap<usize, Vec<Vec<u8>>>,
    /// Where the times of quantizing are noted.
    timeline: &'a Timeline,
    /// Layers whose weights are quantized and placed, and whose input maxima are not known yet.
    quantized: HashMap<usize, Vec<GroupRecord>>,
    /// Seconds spent quantizing.
    seconds: f64,
}

/// Quantizes and places parts until there are no more: to `files`, or through `outbox` to rank 0. Returns the time
/// spent.
///
/// # Errors
/// Exit code 5: a maximum that is zero, NaN or infinite, a disk that fails.
pub fn finish<B: Solver>(
    backend: &B,
    job: &Job,
    files: Option<&OutputFiles>,
    outbox: &Outbox,
    timeline: &Timeline,
    parts: impl IntoIterator<Item = ToFinish<B>>,
) -> Result<Phases> {
    // The tensors of a whole layer may wait for the disk, so that the finisher can release the layer's weights sooner.
    let waiting = job.inventory.layers.iter().map(|layer| layer.outputs.len()).max().unwrap_or(0);
    let (places, tensors) = bounded(waiting);
    // Methods with statistics allocate the memory of the codes that they choose, and have no use for old buffers.
    let (spare, placed) = bounded(if job.method.needs_statistics() { 0 } else { waiting });
    let (flush_done, flushed) = bounded(1);
    std::thread::scope(|scope| {
        let placer = Placer { job, files, outbox: outbox.clone(), spare, flushed: flush_done };
        let placing = threads::scoped(scope, "place", move || outbox.report_failure(placer.run(&tensors)))?;
        let (spare, quantized) = (HashMap::new(), HashMap::new());
        let mut finisher =
            Finisher { backend, job, places, placed, flushed, spare, timeline, quantized, seconds: 0.0 };
        let finished = outbox.report_failure(finisher.run(parts));
        let quantize = finisher.seconds;
        // Closes the channel to the placing thread, which ends when it has placed what is still in it.
        drop(finisher);
        let placed = threads::value(placing.join());
        // Where placing failed, the finisher's own error only says that the channel is closed: the placer's goes first.
        let write = placed?;
        finished.map(|()| Phases { quantize, write, ..Phases::default() })
    })
}

impl<B: Solver> Finisher<'_, B> {
    fn run(&mut self, parts: impl IntoIterator<Item = ToFinish<B>>) -> Result<()> {
        for part in parts {
            let started = self.timeline.now();
            match part {
                ToFinish::Unquantized(part) => self.unquantized(part)?,
                ToFinish::MaxScales { layer, weights, inputs } => {
                    if let Some(held) = weights {
                        let groups = self.max_scales(layer, &held.weights)?;
                        self.quantized.insert(layer, groups);
                        self.timeline.note(Work::Quantize, layer, 0, started, self.timeline.now());
                        let walk_waits = held.release.is_some();
                        drop(held);
                        if walk_waits {
                            self.flush()?;
                        }
                    }
                    self.input_scales(layer, inputs)?;
                }
                ToFinish::WithStatistics { layer, statistics, weights: held } => {
                    self.with_statistics(layer, &held.weights, statistics)?;
                    self.timeline.note(Work::Quantize, layer, 0, started, self.timeline.now());
                }
            }
        }
        Ok(())
    }

    /// Copies the tensors of a part without quantized linears.
    fn unquantized(&mut self, part: PartId) -> Result<()> {
        if self.job.is_finished(part) {
            return Ok(());
        }
        self.copy(part, &HashMap::new())?;
        self.place(ToPlace::Part(part, vec![]))
    }

    /// Quantizes a layer with max scales and places all its tensors except the scales of its inputs.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn max_scales(&mut self, layer: usize, weights: &LayerWeights<B::Tensor>) -> Result<Vec<GroupRecord>> {
        self.copy(PartId::Layer(layer), &HashMap::new())?;
        let mut groups = Vec::new();
        for group in &self.job.inventory.layers[layer].quantized {
            let started = Instant::now();
            let linears = || group.numbers.iter().map(|&number| &weights.linears[number]);
            let maxima = weight_amax(self.backend, linears())?;
            for (linear, &amax) in group.members.iter().zip(&maxima) {
                healthy_weight(linear, amax)?;
            }
            let global = GlobalScale::from_amax(maxima.iter().copied().fold(0.0, f32::max));
            self.seconds += started.elapsed().as_secs_f64();
            for (linear, weight) in group.members.iter().zip(linears()) {
                let started = Instant::now();
                let elements = linear.rows * linear.cols;
                let spare =
                    QuantizedLinear { codes: self.spare(elements / 2), scales: self.spare(elements / BLOCK) };
                let quantized = quantize_linear(self.backend, weight, elements, global, spare)?;
                self.seconds += started.elapsed().as_secs_f64();
                self.linear(&linear.name, quantized, global)?;
            }
            groups.push(GroupRecord {
                site: group.name.to_string(),
                input_amax: None,
                members: group.members.iter().map(|l| l.name.clone()).zip(maxima).collect(),
                chosen: None,
            });
        }
        Ok(groups)
    }

    /// Places the scales of a layer's inputs once the maxima are known. With them the layer is complete.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn input_scales(&mut self, layer: usize, inputs: InputMaxima) -> Result<()> {
        let maxima = match inputs {
            InputMaxima::NotYetKnown => return Ok(()),
            InputMaxima::NotNeeded => None,
            InputMaxima::Known(maxima) => Some(maxima),
        };
        let mut groups = self.quantized.remove(&layer).expect("a layer's weights come before its maxima");
        for (group, spec) in groups.iter_mut().zip(&self.job.inventory.layers[layer].quantized) {
            group.input_amax = maxima.as_ref().map(|by_site| by_site[spec.site]);
            if let Some(amax) = group.input_amax {
                healthy_input(spec, layer, amax, true)?;
                for (name, _) in &group.members {
                    self.input(name, amax)?;
                }
            }
        }
        self.place(ToPlace::Part(PartId::Layer(layer), groups))
    }

    /// Quantizes and places a layer whose codes depend on its statistics.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn with_statistics(
        &mut self,
        layer: usize,
        weights: &LayerWeights<B::Tensor>,
        mut statistics: Vec<SiteStatistics<B::Matrix>>,
    ) -> Result<()> {
        let (part, job, mut started) = (PartId::Layer(layer), self.job, Instant::now());
        self.check_health(layer, weights, &statistics)?;
        let stored = Stored::of(job, layer)?;
        let numbers = job.inventory.numbers(layer);
        let read = |site: usize| {
            let weight = |&number: &usize| self.backend.widen(&weights.linears[number].weight);
            numbers[site].iter().map(weight).collect()
        };
        let described = Layer {
            solver: self.backend,
            spec: &job.model.layers[layer],
            quantized: &numbers,
            weights: &read,
            norms: stored.norms.iter().map(|norm| norm.as_ref().map(|(_, values)| values.clone())).collect(),
            round_norm: &|norm, x| stored.round(norm, x),
            bias_holds: &|linear, row, factor| stored.holds(linear, row, factor),
            tokens: job.sampling.fit_tokens,
            quantized_inputs: job.quantized_inputs,
        };
        let mut folds = described.folds(job.method, &statistics)?;
        let mut groups = Vec::new();
        described.quantize(job.method, &mut folds, &mut statistics, &mut |group| {
            self.seconds += started.elapsed().as_secs_f64();
            groups.push(self.place_group(layer, group)?);
            started = Instant::now();
            Ok(())
        })?;
        // Norms and biases come last: while codes are chosen, a fold may still be given up.
        self.copy(part, &rewritten(job, layer, &folds)?)?;
        self.place(ToPlace::Part(part, groups))
    }

    /// Checks the maxima of a layer's weights and inputs before anything is computed from them.
    fn check_health(
        &self,
        layer: usize,
        weights: &LayerWeights<B::Tensor>,
        statistics: &[SiteStatistics<B::Matrix>],
    ) -> Result<()> {
        for group in &self.job.inventory.layers[layer].quantized {
            let linears = group.numbers.iter().map(|&number| &weights.linears[number]);
            let maxima = weight_amax(self.backend, linears)?;
            for (linear, amax) in group.members.iter().zip(maxima) {
                healthy_weight(linear, amax)?;
            }
            let amax = crate::nvfp4::amax(&statistics[group.site].amax);
            healthy_input(group, layer, amax, self.job.quantized_inputs)?;
        }
        Ok(())
    }

    /// Places the tensors of a group of fused linears whose codes have been chosen; returns its record.
    fn place_group(&mut self, layer: usize, group: QuantizedGroup) -> Result<GroupRecord> {
        let job = self.job;
        let quantized = &job.inventory.layers[layer].quantized;
        let spec = quantized.iter().find(|spec| spec.site == group.site).expect("only these were asked for");
        if let Some(reason) = &group.fallback {
            tracing::warn!("{}: {reason}", spec.members[0].name);
        }
        let input = job.quantized_inputs.then_some(group.input_amax);
        let (mut maxima, mut verdicts) = (vec![], vec![]);
        for (linear, member) in spec.members.iter().zip(group.members) {
            healthy_weight(linear, member.amax)?;
            self.linear(&linear.name, member.linear, group.global)?;
            if let Some(amax) = input {
                self.input(&linear.name, group.headroom * amax)?;
            }
            maxima.push((linear.name.clone(), member.amax));
            verdicts.push(member.verdict);
        }
        let QuantizedGroup { site, smoothing, headroom, damping, fallback, .. } = group;
        let chosen = Some(Chosen { smoothing, headroom, damping, fallback, verdicts });
        let site = job.model.layers[layer].sites[site].name.to_string();
        Ok(GroupRecord { site, input_amax: input, members: maxima, chosen })
    }

    /// Places the weights of one linear.
    fn linear(&mut self, name: &str, quantized: QuantizedLinear, global: GlobalScale) -> Result<()> {
        let names = self.job.layout.linear_names(name);
        self.place(ToPlace::Made(names.codes, quantized.codes))?;
        self.place(ToPlace::Made(names.scales, quantized.scales))?;
        self.place(ToPlace::Made(names.weight_global, self.job.layout.scalar(global).to_vec()))
    }

    /// Places the scale of a linear's input.
    fn input(&self, name: &str, amax: f32) -> Result<()> {
        let scalar = self.job.layout.scalar(GlobalScale::from_amax(amax));
        self.place(ToPlace::Made(self.job.layout.linear_names(name).input_global, scalar.to_vec()))
    }

    /// Places the tensors of a part that are not quantized: those in `rewritten` with the bytes given there, the others
    /// as the source has them.
    fn copy(&mut self, part: PartId, rewritten: &HashMap<String, Vec<u8>>) -> Result<()> {
        for name in &self.job.part(part).copied {
            self.place(match rewritten.get(name) {
                Some(bytes) => ToPlace::Made(name.clone(), bytes.clone()),
                None => ToPlace::Copied(self.job.checkpoint.tensor(name)?),
            })?;
        }
        Ok(())
    }

    /// A buffer for `bytes` bytes: that of an earlier tensor of this length where one has been placed, a new one
    /// otherwise.
    fn spare(&mut self, bytes: usize) -> Vec<u8> {
        for spare in self.placed.try_iter() {
            self.spare.entry(spare.len()).or_default().push(spare);
        }
        self.spare.get_mut(&bytes).and_then(Vec::pop).unwrap_or_default()
    }

    /// Waits until everything so far has been placed. The walk waits for this layer's weights. Without this wait the
    /// finisher would accept the next layer while this one is being written, and then the walk would wait for the disk.
    fn flush(&self) -> Result<()> {
        self.place(ToPlace::Flush)?;
        self.flushed.recv().map_err(|_| placer_ended())
    }

    fn place(&self, tensor: ToPlace) -> Result<()> {
        self.places.send(tensor).map_err(|_| placer_ended())
    }
}

/// The error where the placing thread is gone. That thread has reported its own failure, which is the cause.
fn placer_ended() -> Error {
    Error::run("the writing thread ended early")
}
