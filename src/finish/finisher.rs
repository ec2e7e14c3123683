//! From a layer's weights and input maxima to its bytes at their places in the output.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use safetensors::Dtype;

use super::health::{healthy_input, healthy_weight};
use super::messages::Outbox;
use super::placer::{Placer, ToPlace};
use crate::backend::Solver;
use crate::checkpoint::{OutputFiles, narrow, stored, widen};
use crate::error::{Error, Result};
use crate::forward::LayerWeights;
use crate::job::Job;
use crate::methods::layer::{Folds, Layer, QuantizedGroup};
use crate::methods::{SiteStatistics, quantize_linear, weight_amax};
use crate::model::Norm;
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear};
use crate::progress::{Phases, Timeline, Work};
use crate::record::{Chosen, GroupRecord, PartId};
use crate::threads;

/// What a rank's parts are made of, as it becomes known.
pub enum Finished<B: Solver> {
    /// A part that has nothing to quantize.
    Copied(PartId),
    /// A layer whose codes depend on its weights alone, which may come before the rest.
    Max {
        /// Which one.
        layer: usize,
        /// Its weights, unless they came before.
        weights: Option<Lent<B>>,
        /// What is known of its inputs.
        inputs: Inputs,
    },
    /// A layer whose codes depend on its inputs.
    Chosen {
        /// Which one.
        layer: usize,
        /// What is known of its inputs, by site.
        statistics: Vec<SiteStatistics<B::Matrix>>,
        /// Its weights.
        weights: Lent<B>,
    },
}

/// A layer's weights in the finisher's hands.
pub struct Lent<B: Solver> {
    weights: Arc<LayerWeights<B::Tensor>>,
    /// Ends with them, where the walk waits for that.
    until: Option<Sender<()>>,
}

impl<B: Solver> Lent<B> {
    /// For good, or for as long as it takes.
    pub fn new(weights: Arc<LayerWeights<B::Tensor>>) -> Lent<B> {
        Lent { weights, until: None }
    }

    /// The receiver hears nothing, and ends when they are given back.
    pub fn awaited(weights: Arc<LayerWeights<B::Tensor>>) -> (Lent<B>, Receiver<()>) {
        let (until, given_back) = bounded(0);
        (Lent { weights, until: Some(until) }, given_back)
    }
}

/// What is known of the inputs of a layer whose codes do not depend on them.
pub enum Inputs {
    /// Their maxima are to come.
    Unknown,
    /// The scheme does not ask.
    Unneeded,
    /// `max |x|` by site.
    Maxima(Vec<f32>),
}

/// Quantizes the parts that this rank owns.
pub struct Finisher<'a, B: Solver> {
    backend: &'a B,
    job: &'a Job,
    /// To the thread that places tensors.
    places: Sender<ToPlace>,
    /// Memory of tensors that have been placed.
    placed: Receiver<Vec<u8>>,
    /// Hears from that thread that all has been placed.
    settled: Receiver<()>,
    /// The same, by length: layers have tensors of the same lengths.
    spare: HashMap<usize, Vec<Vec<u8>>>,
    /// Where work is noted.
    timeline: &'a Timeline,
    /// Layers that only their inputs' maxima are missing from.
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
    parts: impl IntoIterator<Item = Finished<B>>,
) -> Result<Phases> {
    // A layer may wait for the disk, so that its weights do not.
    let waiting = job.inventory.layers.iter().map(|layer| layer.outputs.len()).max().unwrap_or(0);
    let (places, tensors) = bounded(waiting);
    // Codes that are chosen have memory of their own.
    let (spare, placed) = bounded(if job.method.needs_statistics() { 0 } else { waiting });
    let (settling, settled) = bounded(1);
    std::thread::scope(|scope| {
        let placer = Placer { job, files, outbox: outbox.clone(), spare, settled: settling };
        let placing = threads::scoped(scope, "place", move || outbox.told(placer.run(&tensors)))?;
        let (spare, quantized) = (HashMap::new(), HashMap::new());
        let mut finisher =
            Finisher { backend, job, places, placed, settled, spare, timeline, quantized, seconds: 0.0 };
        let finished = outbox.told(finisher.run(parts));
        let quantize = finisher.seconds;
        drop(finisher);
        let placed = threads::value(placing.join());
        // Where placing failed, the finisher only noticed that nobody takes tensors any more.
        let write = placed?;
        finished.map(|()| Phases { quantize, write, ..Phases::default() })
    })
}

impl<B: Solver> Finisher<'_, B> {
    fn run(&mut self, parts: impl IntoIterator<Item = Finished<B>>) -> Result<()> {
        for part in parts {
            let started = self.timeline.now();
            match part {
                Finished::Copied(part) => self.copied(part)?,
                Finished::Max { layer, weights, inputs } => {
                    if let Some(lent) = weights {
                        let groups = self.max(layer, &lent.weights)?;
                        self.quantized.insert(layer, groups);
                        self.timeline.note(Work::Quantize, layer, 0, started, self.timeline.now());
                        let awaited = lent.until.is_some();
                        drop(lent);
                        if awaited {
                            self.settle()?;
                        }
                    }
                    self.scaled(layer, inputs)?;
                }
                Finished::Chosen { layer, statistics, weights: lent } => {
                    self.chosen(layer, &lent.weights, statistics)?;
                    self.timeline.note(Work::Quantize, layer, 0, started, self.timeline.now());
                }
            }
        }
        Ok(())
    }

    /// Carries over a part that has nothing to quantize.
    fn copied(&mut self, part: PartId) -> Result<()> {
        if self.job.is_finished(part) {
            return Ok(());
        }
        self.copy(part, &HashMap::new())?;
        self.place(ToPlace::Part(part, vec![]))
    }

    /// Quantizes a layer with max scales, and places all of it but the scales of its inputs.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn max(&mut self, layer: usize, weights: &LayerWeights<B::Tensor>) -> Result<Vec<GroupRecord>> {
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

    /// Places the scales of a quantized layer's inputs, which is all that is missing from it, once they are known.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn scaled(&mut self, layer: usize, inputs: Inputs) -> Result<()> {
        let maxima = match inputs {
            Inputs::Unknown => return Ok(()),
            Inputs::Unneeded => None,
            Inputs::Maxima(maxima) => Some(maxima),
        };
        let mut groups = self.quantized.remove(&layer).expect("weights do not come after maxima");
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

    /// Quantizes and places a layer by what its statistics say.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where a maximum is zero, NaN or infinite.
    fn chosen(
        &mut self,
        layer: usize,
        weights: &LayerWeights<B::Tensor>,
        mut statistics: Vec<SiteStatistics<B::Matrix>>,
    ) -> Result<()> {
        let (part, job, started) = (PartId::Layer(layer), self.job, Instant::now());
        let quantized = &job.inventory.layers[layer].quantized;
        for group in quantized {
            let linears = group.numbers.iter().map(|&number| &weights.linears[number]);
            let maxima = weight_amax(self.backend, linears)?;
            for (linear, amax) in group.members.iter().zip(maxima) {
                healthy_weight(linear, amax)?;
            }
            let amax = crate::nvfp4::amax(&statistics[group.site].amax);
            healthy_input(group, layer, amax, job.quantized_inputs)?;
        }
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
        let (mut groups, mut started) = (Vec::new(), started);
        described.quantize(job.method, &mut folds, &mut statistics, &mut |group| {
            self.seconds += started.elapsed().as_secs_f64();
            let spec =
                quantized.iter().find(|spec| spec.site == group.site).expect("only these were asked for");
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
            groups.push(GroupRecord { site, input_amax: input, members: maxima, chosen });
            started = Instant::now();
            Ok(())
        })?;
        // Choosing codes may give up a fold, so norms and biases are known last.
        self.copy(part, &rewritten(job, layer, &folds)?)?;
        self.place(ToPlace::Part(part, groups))
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

    /// Carries tensors over, some of them rewritten.
    fn copy(&mut self, part: PartId, rewritten: &HashMap<String, Vec<u8>>) -> Result<()> {
        for name in &self.job.part(part).copied {
            self.place(match rewritten.get(name) {
                Some(bytes) => ToPlace::Made(name.clone(), bytes.clone()),
                None => ToPlace::Copied(self.job.checkpoint.tensor(name)?),
            })?;
        }
        Ok(())
    }

    /// Memory for `bytes` bytes, that of a tensor which has been placed where there was one.
    fn spare(&mut self, bytes: usize) -> Vec<u8> {
        for spare in self.placed.try_iter() {
            self.spare.entry(spare.len()).or_default().push(spare);
        }
        self.spare.get_mut(&bytes).and_then(Vec::pop).unwrap_or_default()
    }

    /// Waits until everything has been placed: a layer that was taken sooner would keep the walk waiting for the disk.
    fn settle(&self) -> Result<()> {
        self.place(ToPlace::Settle)?;
        self.settled.recv().map_err(|_| placer_ended())
    }

    fn place(&self, tensor: ToPlace) -> Result<()> {
        self.places.send(tensor).map_err(|_| placer_ended())
    }
}

/// The thread that places tensors says why itself.
fn placer_ended() -> Error {
    Error::run("the writing thread ended early")
}

/// The norms and biases of a layer that folds may change, as they are stored.
struct Stored {
    /// By the norms' numbers.
    norms: Vec<Option<(Dtype, Vec<f32>)>>,
    /// By the linears' numbers.
    biases: Vec<Option<(Dtype, Vec<f32>)>>,
}

impl Stored {
    fn of(job: &Job, layer: usize) -> Result<Stored> {
        let read = |name: Option<String>| -> Result<Option<(Dtype, Vec<f32>)>> {
            let Some(name) = name else { return Ok(None) };
            let tensor = job.checkpoint.tensor(&name)?;
            Ok(Some((tensor.dtype, widen(&tensor)?)))
        };
        let spec = &job.model.layers[layer];
        let norm = |norm: &Norm| read(norm.weight.as_ref().map(|spec| spec.name.clone()));
        Ok(Stored {
            norms: spec.norms.iter().map(norm).collect::<Result<_>>()?,
            biases: spec.linears.iter().map(|linear| read(linear.bias())).collect::<Result<_>>()?,
        })
    }

    /// What storing `x` in a norm makes of it.
    fn round(&self, norm: usize, x: f32) -> f32 {
        self.norms[norm].as_ref().map_or(x, |(dtype, _)| stored(*dtype, x))
    }

    /// Whether an element of a linear's bias, if it has one, can hold a factor.
    fn holds(&self, linear: usize, row: usize, factor: f32) -> bool {
        let bias = &self.biases[linear];
        bias.as_ref().is_none_or(|(dtype, bias)| stored(*dtype, bias[row] * factor).is_finite())
    }
}

/// The norms and biases that folds change, in the dtypes of the source.
pub fn rewritten(job: &Job, layer: usize, folds: &Folds) -> Result<HashMap<String, Vec<u8>>> {
    let spec = &job.model.layers[layer];
    let mut tensors = HashMap::new();
    let mut scale = |name: String, factors: &[f32]| -> Result<()> {
        let bias = job.checkpoint.tensor(&name)?;
        let values: Vec<f32> = widen(&bias)?.iter().zip(factors).map(|(bias, f)| bias * f).collect();
        tensors.insert(name, narrow(bias.dtype, &values));
        Ok(())
    };
    for (number, linear) in spec.linears.iter().enumerate() {
        if let (Some(name), Some(factors)) = (linear.bias(), folds.rows(number, linear.rows)) {
            scale(name, &factors)?;
        }
    }
    for (number, _, factors) in folds.norms() {
        if let Some(bias) = &spec.norms[number].bias {
            scale(bias.name.clone(), factors)?;
        }
    }
    for (number, weights, _) in folds.norms() {
        if let Some(weight) = &spec.norms[number].weight {
            let dtype = job.checkpoint.entry(&weight.name)?.dtype;
            tensors.insert(weight.name.clone(), narrow(dtype, weights));
        }
    }
    Ok(tensors)
}
