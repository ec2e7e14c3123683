//! Measures for a short time how fast this rank's device is. One decoder layer of random weights, with the model's
//! proportions, is computed and quantized by the code that handles the real layers.

use std::time::Instant;

use half::bf16;
use safetensors::Dtype;

use super::operations::operations;
use crate::backend::{Backend, Channels, Compute, Gathered, OnBackend, Solver};
use crate::calibration::{Sampling, pairs};
use crate::checkpoint::SourceTensor;
use crate::error::Result;
use crate::forward::{Batch, Decoder, LayerWeights, Tables, Workspace};
use crate::methods::layer::Layer;
use crate::methods::{Method, SiteStatistics, quantize_linear, weight_amax};
use crate::model::{Model, Norm, Site};
use crate::nvfp4::{GlobalScale, QuantizedLinear};

/// Rates in FLOP/s.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Rates {
    /// The forward pass.
    pub forward: f64,
    /// The forward pass with statistics.
    pub statistics: f64,
    /// Choosing codes.
    pub solving: f64,
}

/// What to measure with.
pub struct Probe<'a> {
    /// The model.
    pub model: &'a Model,
    /// How codes are chosen.
    pub method: Method,
    /// Whether engines quantize the inputs of linears when they run the model.
    pub quantized_inputs: bool,
    /// Tokens of the calibration documents.
    pub lengths: &'a [usize],
    /// Tokens to measure with.
    pub tokens: usize,
}

/// Weights of the layer that the forward pass is measured with at most, for each token: a few dozen milliseconds
/// on a device that `tokens` suit.
const WEIGHTS: usize = 1 << 14;

/// Choosing codes takes this many times longer than the forward pass, so its layer is this many times smaller.
const SMALLER: usize = 8;

/// A measurement of choosing codes that takes at least these seconds is precise enough.
const ENOUGH: f64 = 0.1;

/// Where it took less, the next measurement has a layer this many times larger, up to this many weights.
const LARGER: usize = 8;
const LARGEST: usize = 1 << 26;

/// Milliseconds for which a measurement is repeated.
const LONG_ENOUGH: u128 = 60;

impl OnBackend for Probe<'_> {
    type Output = Result<Rates>;

    fn run<B: Solver>(self, backend: &B) -> Result<Rates> {
        let lengths = self.documents();
        let model = self.model.shrunk(WEIGHTS * self.tokens);
        let counted = operations(&model.layers[0], self.method);
        let tokens = lengths.iter().sum::<usize>() as f64;
        let forward = tokens * counted.token + pairs(counted.window, &lengths) as f64 * counted.pair;
        let mut layer = Sample::new(backend, &model, &lengths)?;
        let seconds = fastest(|| layer.pass(&mut |_, _| Ok(())))?;
        let mut rates = Rates { forward: forward / seconds, statistics: forward / seconds, solving: 0.0 };
        if self.method.needs_statistics() {
            let mut sums = layer.sums(self.method)?;
            let seconds = fastest(|| layer.pass(&mut |site, x| add(backend, x, &mut sums[site])))?;
            rates.statistics = (forward + tokens * counted.statistics) / seconds;
        }
        if self.method.needs_statistics() {
            // A GPU's kernels are compiled when they are first needed.
            Sample::new(backend, &self.model.shrunk(1), &lengths)?.solve(&self)?;
        }
        let all = self.model.layers[self.model.largest_layer()].weights();
        let mut most = WEIGHTS * self.tokens / SMALLER;
        loop {
            let small = self.model.shrunk(most);
            let mut layer = Sample::new(backend, &small, &lengths)?;
            let mut seconds =
                if self.method.needs_statistics() { layer.solve(&self)? } else { layer.round()? };
            if self.method.needs_statistics() && seconds > ENOUGH {
                // A library loads its kernels for a shape when it is first asked for.
                seconds = seconds.min(layer.solve(&self)?);
            }
            rates.solving = operations(&small.layers[0], self.method).solving / seconds;
            // A GPU only shows what it can do with a layer that keeps it busy.
            if !self.method.needs_statistics() || seconds > ENOUGH || most > LARGEST || most >= all {
                return Ok(rates);
            }
            most *= LARGER;
        }
    }
}

impl Probe<'_> {
    /// Documents of the calibration set's lengths, as many as have the tokens to measure with.
    fn documents(&self) -> Vec<usize> {
        let mut left = self.tokens;
        let mut documents = Vec::new();
        let known = self.lengths.iter().copied().chain(std::iter::repeat(self.tokens));
        for length in known.take_while(|&length| length > 0) {
            documents.push(length.min(left));
            left -= length.min(left);
            if left == 0 {
                break;
            }
        }
        documents
    }
}

/// The shortest of a few measurements, so that other programs that run for a moment do not influence the plan.
fn fastest(mut once: impl FnMut() -> Result<()>) -> Result<f64> {
    once()?;
    let (begun, mut best) = (Instant::now(), f64::INFINITY);
    while best.is_infinite() || begun.elapsed().as_millis() < LONG_ENOUGH {
        let started = Instant::now();
        once()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn add<B: Backend>(backend: &B, x: &B::Tensor, (sums, products): &mut (B::Sums, bool)) -> Result<()> {
    backend.add_channels(x, sums)?;
    if *products { backend.add_products(x, sums) } else { Ok(()) }
}

/// A layer, hidden states to pass it, and the memory that this needs.
struct Sample<'a, B: Backend> {
    backend: &'a B,
    model: &'a Model,
    decoder: Decoder<'a, B>,
    batch: Batch<B>,
    weights: LayerWeights<B::Tensor>,
    work: Workspace<B::Tensor>,
    x: B::Tensor,
}

impl<'a, B: Solver> Sample<'a, B> {
    fn new(backend: &'a B, model: &'a Model, lengths: &[usize]) -> Result<Sample<'a, B>> {
        let tables = Tables::new(model, lengths);
        let decoder = Decoder::new(backend, model, &tables)?;
        let batch = decoder.batch(&tables, 0, lengths)?;
        let tensors = model.layers[0].tensors();
        let source = |name: &str| {
            let spec = tensors.iter().find(|spec| spec.name == name).expect("a tensor of the layer");
            let (elements, cols) = (spec.shape.iter().product(), *spec.shape.last().unwrap_or(&1));
            let (mean, scale) =
                if spec.shape.len() == 1 { (1.0, 0.1) } else { (0.0, (cols as f32).powf(-0.5)) };
            let dtype = match backend.compute() {
                Compute::Bf16 => Dtype::BF16,
                Compute::F32 => Dtype::F32,
            };
            SourceTensor::from_bytes(name, dtype, &spec.shape, &noise(backend, elements, mean, scale))
        };
        let mut x = backend.activation(batch.tokens, model.hidden)?;
        backend.upload(&noise(backend, batch.tokens * model.hidden, 0.0, 1.0), &mut x)?;
        let weights = LayerWeights::load(backend, &model.layers[0], &source)?;
        let work = decoder.workspace(batch.tokens)?;
        Ok(Sample { backend, model, decoder, batch, weights, work, x })
    }

    /// One pass through the layer; waits until the device has completed it.
    fn pass(&mut self, take: &mut dyn FnMut(usize, &B::Tensor) -> Result<()>) -> Result<()> {
        let layer = &self.model.layers[0];
        let mut maxima = self.backend.amax(layer.sites.len())?;
        let (weights, batch, work, x) = (&self.weights, &self.batch, &mut self.work, &mut self.x);
        self.decoder.layer(layer, weights, batch, work, x, &mut |site, x| {
            self.backend.observe(x, &mut maxima, site)?;
            take(site, x)
        })?;
        self.backend.read_amax(&maxima).map(|_| ())
    }

    fn sums(&self, method: Method) -> Result<Vec<(B::Sums, bool)>> {
        let products = method.needs_products();
        let sampled = [self.batch.tokens.min(Sampling::ROWS); 2];
        let sums = |site: &Site| Ok((self.backend.sums(site.features, products, sampled)?, products));
        self.model.layers[0].sites.iter().map(sums).collect()
    }

    /// Chooses the layer's codes from its statistics; returns the seconds.
    fn solve(&mut self, probe: &Probe<'_>) -> Result<f64> {
        let (backend, model) = (self.backend, self.model);
        let mut sums = self.sums(probe.method)?;
        let sampled: Vec<u32> = (0..self.batch.tokens.min(Sampling::ROWS) as u32).collect();
        let index = backend.index(&sampled)?;
        self.pass(&mut |site, x| {
            add(backend, x, &mut sums[site])?;
            (0..2).try_for_each(|role| backend.add_rows(x, &index, role, &mut sums[site].0))
        })?;
        let mut statistics = Vec::new();
        for (sums, _) in sums {
            let channels = backend.read_channels(&sums)?;
            let Gathered { products, rows: [fit, judge] } = backend.gathered(sums)?;
            let held_out = probe.method.guard.then_some(judge);
            let Channels { amax, squares } = channels;
            statistics.push(SiteStatistics { products, fit, held_out, amax, squares });
        }
        let spec = &model.layers[0];
        let quantized: Vec<Vec<usize>> = spec.sites.iter().map(|site| site.members.clone()).collect();
        let read = |site: usize| {
            let weight = |&number: &usize| backend.widen(&self.weights.linears[number].weight);
            quantized[site].iter().map(weight).collect()
        };
        let ones = |norm: &Norm| norm.weight.as_ref().map(|spec| vec![1.0; spec.shape.iter().product()]);
        let layer = Layer {
            solver: backend,
            spec,
            quantized: &quantized,
            weights: &read,
            norms: spec.norms.iter().map(ones).collect(),
            round_norm: &|_, x| x,
            bias_holds: &|_, _, _| true,
            // As many as a Hessian is trusted with.
            tokens: usize::MAX / 2,
            quantized_inputs: probe.quantized_inputs,
        };
        let started = Instant::now();
        let mut folds = layer.folds(probe.method, &statistics)?;
        layer.quantize(probe.method, &mut folds, &mut statistics, &mut |_| Ok(()))?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Rounds the layer's weights with max scales; returns the seconds.
    fn round(&mut self) -> Result<f64> {
        let groups = self.model.layers[0].groups();
        let mut spare = QuantizedLinear::default();
        fastest(|| {
            for group in &groups {
                let linears = || group.numbers.iter().map(|&number| &self.weights.linears[number]);
                let maxima = weight_amax(self.backend, linears())?;
                let global = GlobalScale::from_amax(maxima.into_iter().fold(0.0, f32::max));
                for (spec, linear) in group.members.iter().zip(linears()) {
                    let elements = spec.rows * spec.cols;
                    let buffers = std::mem::take(&mut spare);
                    spare = quantize_linear(self.backend, linear, elements, global, buffers)?;
                }
            }
            Ok(())
        })
    }
}

/// Values around `mean` in the compute dtype: a short sequence of noise, repeated.
fn noise<B: Backend>(backend: &B, elements: usize, mean: f32, scale: f32) -> Vec<u8> {
    // A prime, so that rows differ.
    let mut state = 1u32;
    let sequence = (0..4093).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        mean + scale * (state as f32 / u32::MAX as f32 - 0.5) * 12f32.sqrt()
    });
    let sequence: Vec<u8> = match backend.compute() {
        Compute::Bf16 => sequence.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        Compute::F32 => sequence.flat_map(f32::to_le_bytes).collect(),
    };
    // Part by part: byte by byte a GPU's layer would take longer to make up than to walk through.
    let mut bytes = vec![0; elements * backend.compute().bytes()];
    bytes.chunks_mut(sequence.len()).for_each(|part| part.copy_from_slice(&sequence[..part.len()]));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    fn model() -> Model {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 192,
            "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 128,
        });
        Model::parse(config.as_object().unwrap(), &|_| false).unwrap()
    }

    #[test]
    fn rates_are_numbers_for_every_method_and_dtype() {
        for (method, compute) in
            [(Method::MAX, Compute::F32), (Method::BEST, Compute::Bf16), (Method::BEST, Compute::F32)]
        {
            let model = model();
            let lengths = [20, 30, 500];
            let probe =
                Probe { model: &model, method, quantized_inputs: true, lengths: &lengths, tokens: 64 };
            assert_eq!(probe.documents(), [20, 30, 14]);
            let Rates { forward, statistics, solving } = probe.run(&Cpu::new(compute, 1).unwrap()).unwrap();
            for rate in [forward, statistics, solving] {
                assert!(rate.is_finite() && rate > 0.0, "{method} {compute:?}: {rate}");
            }
        }
    }
}
