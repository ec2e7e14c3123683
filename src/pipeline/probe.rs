//! How fast this rank's device is at what a run consists of, measured briefly: one made-up decoder layer of the
//! model's proportions, by the code that computes the real ones.

use std::time::Instant;

use half::bf16;
use safetensors::Dtype;

use super::operations::{operations, pairs, weights};
use crate::backend::{Backend, Channels, Compute, Gathered, OnBackend, Solver};
use crate::calibration::Sampling;
use crate::checkpoint::SourceTensor;
use crate::error::Result;
use crate::methods::layer::Layer;
use crate::methods::{Method, SiteStatistics, quantize_linear, weight_amax};
use crate::model::{Batch, Decoder, LayerWeights, ModelConfig, Site};
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear};

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

/// What is measured.
pub struct Probe<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// How codes are chosen.
    pub method: Method,
    /// Whether inputs are quantized when served.
    pub quantized_inputs: bool,
    /// Tokens of the calibration documents.
    pub lengths: &'a [usize],
    /// Tokens to measure with.
    pub tokens: usize,
}

/// Weights of the layer that the forward pass is measured with at most, for each token: a few dozen milliseconds
/// on a device that `tokens` suit.
const WEIGHTS: usize = 1 << 14;

/// Choosing codes takes this many times longer, so that layer is as many times smaller.
const SMALLER: usize = 8;

/// Seconds of choosing codes that say enough.
const ENOUGH: f64 = 0.1;

/// How much larger the next layer is where they do not, and the weights beyond which none is made up.
const LARGER: usize = 8;
const LARGEST: usize = 1 << 26;

/// Milliseconds of repetitions.
const LONG_ENOUGH: u128 = 60;

impl OnBackend for Probe<'_> {
    type Output = Result<Rates>;

    fn run<B: Solver>(self, backend: &B) -> Result<Rates> {
        let lengths = self.documents();
        let model = shrunk(self.model, WEIGHTS * self.tokens);
        let counted = operations(&model, self.method);
        let tokens = lengths.iter().sum::<usize>() as f64;
        let forward = counted.forward(tokens as u64, pairs(&model, &lengths));
        let mut layer = Sample::new(backend, &model, &lengths)?;
        let seconds = fastest(|| layer.pass(&mut |_, _| Ok(())))?;
        let mut rates = Rates { forward: forward / seconds, statistics: forward / seconds, solving: 0.0 };
        if self.method.needs_statistics() {
            let mut sums = layer.sums(self.method)?;
            let seconds = fastest(|| layer.pass(&mut |site, x| add(backend, x, &mut sums[site as usize])))?;
            rates.statistics = (forward + tokens * counted.statistics) / seconds;
        }
        if self.method.needs_statistics() {
            // A GPU's kernels are compiled when they are first needed.
            Sample::new(backend, &shrunk(self.model, 1), &lengths)?.solve(&self)?;
        }
        let mut most = WEIGHTS * self.tokens / SMALLER;
        loop {
            let small = shrunk(self.model, most);
            let mut layer = Sample::new(backend, &small, &lengths)?;
            let mut seconds =
                if self.method.needs_statistics() { layer.solve(&self)? } else { layer.round()? };
            if self.method.needs_statistics() && seconds > ENOUGH {
                // A library loads its kernels for a shape when it is first asked for.
                seconds = seconds.min(layer.solve(&self)?);
            }
            rates.solving = operations(&small, self.method).solving / seconds;
            // A GPU only shows what it can do with a layer that keeps it busy.
            if !self.method.needs_statistics()
                || seconds > ENOUGH
                || most > LARGEST
                || most >= weights(self.model)
            {
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

/// A model of the same proportions whose layer has about as many `weights`, or the model where it has fewer. Inputs of
/// all its linears are whole blocks, also where those of the model are not, which `--ignore` allows.
fn shrunk(model: &ModelConfig, most: usize) -> ModelConfig {
    let factor = (weights(model) as f64 / most as f64).sqrt().max(1.0);
    let whole = Site::ALL.iter().all(|&site| model.site_features(site).is_multiple_of(BLOCK));
    if factor == 1.0 && whole {
        return model.clone();
    }
    let share = |n: usize, unit: usize| ((n as f64 / factor / unit as f64).round() as usize).max(1) * unit;
    // So many heads are whole blocks together: 16 divided by what it has in common with the size of a head, which is
    // a power of two.
    let unit = BLOCK >> model.head_dim.trailing_zeros().min(BLOCK.trailing_zeros());
    let kv_heads = share(model.kv_heads, unit);
    ModelConfig {
        hidden: share(model.hidden, BLOCK),
        intermediate: share(model.intermediate, BLOCK),
        heads: share(model.heads, 1).div_ceil(kv_heads) * kv_heads,
        kv_heads,
        ..model.clone()
    }
}

/// The shortest of a few: what else runs on the machine at start should not decide the plan.
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

/// A layer, hidden states to walk through it, and what they need.
struct Sample<'a, B: Backend> {
    backend: &'a B,
    model: &'a ModelConfig,
    decoder: Decoder<'a, B>,
    batch: Batch<B>,
    weights: LayerWeights<B::Tensor>,
    work: crate::model::Workspace<B::Tensor>,
    x: B::Tensor,
}

impl<'a, B: Solver> Sample<'a, B> {
    fn new(backend: &'a B, model: &'a ModelConfig, lengths: &[usize]) -> Result<Sample<'a, B>> {
        let table = model.rope.table(lengths);
        let decoder = Decoder::new(backend, model, &table)?;
        let batch = decoder.batch(&table, 0, lengths)?;
        let tensors = model.layer_tensors(0);
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
        let weights = LayerWeights::load(backend, model, 0, &source)?;
        let work = decoder.workspace(batch.tokens)?;
        Ok(Sample { backend, model, decoder, batch, weights, work, x })
    }

    /// One pass, waited for.
    fn pass(&mut self, take: &mut dyn FnMut(Site, &B::Tensor) -> Result<()>) -> Result<()> {
        let mut maxima = self.backend.amax(Site::ALL.len())?;
        self.decoder.layer(&self.weights, &self.batch, &mut self.work, &mut self.x, &mut |site, x| {
            self.backend.observe(x, &mut maxima, site as usize)?;
            take(site, x)
        })?;
        self.backend.read_amax(&maxima).map(|_| ())
    }

    fn sums(&self, method: Method) -> Result<Vec<(B::Sums, bool)>> {
        let products = method.needs_products();
        let sampled = [self.batch.tokens.min(Sampling::ROWS); 2];
        let sums =
            |site| Ok((self.backend.sums(self.model.site_features(site), products, sampled)?, products));
        Site::ALL.into_iter().map(sums).collect()
    }

    /// Chooses the layer's codes by its statistics; returns the seconds.
    fn solve(&mut self, probe: &Probe<'_>) -> Result<f64> {
        let (backend, model) = (self.backend, self.model);
        let mut sums = self.sums(probe.method)?;
        let sampled: Vec<u32> = (0..self.batch.tokens.min(Sampling::ROWS) as u32).collect();
        let index = backend.index(&sampled)?;
        self.pass(&mut |site, x| {
            add(backend, x, &mut sums[site as usize])?;
            (0..2).try_for_each(|role| backend.add_rows(x, &index, role, &mut sums[site as usize].0))
        })?;
        let mut statistics = Vec::new();
        for (sums, _) in sums {
            let channels = backend.read_channels(&sums)?;
            let Gathered { products, rows: [fit, judge] } = backend.gathered(sums)?;
            let held_out = probe.method.guard.then_some(judge);
            let Channels { amax, squares } = channels;
            statistics.push(SiteStatistics { products, fit, held_out, amax, squares });
        }
        let Ok(mut statistics) = <[_; 4]>::try_from(statistics) else { unreachable!("there are four sites") };
        let read = |site: Site| {
            self.weights.linears[site as usize].iter().map(|l| backend.widen(&l.weight)).collect()
        };
        let layer = Layer {
            solver: backend,
            quantized: [true; 4],
            weights: &read,
            norms: [vec![1.0; model.hidden], vec![1.0; model.hidden]],
            round_norm: &|x| x,
            bias_holds: &|_, _, _| true,
            heads: (model.heads / model.kv_heads, model.head_dim),
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
        let groups = self.model.groups(0);
        let mut spare = QuantizedLinear::default();
        fastest(|| {
            for (group, linears) in groups.iter().zip(&self.weights.linears) {
                let maxima = weight_amax(self.backend, linears)?;
                let global = GlobalScale::from_amax(maxima.into_iter().fold(0.0, f32::max));
                for (spec, linear) in group.members.iter().zip(linears) {
                    let elements = spec.rows * spec.cols;
                    spare =
                        quantize_linear(self.backend, linear, elements, global, std::mem::take(&mut spare))?;
                }
            }
            Ok(())
        })
    }
}

/// Values around `mean` in the compute dtype: a short sequence of noise, again and again.
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
    use proptest::prelude::*;

    use super::*;
    use crate::backend::cpu::Cpu;

    fn model() -> ModelConfig {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 192,
            "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 128,
        });
        ModelConfig::parse(config.as_object().unwrap()).unwrap()
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

    #[test]
    fn a_shrunk_model_keeps_its_proportions() {
        let large = ModelConfig {
            hidden: 12288,
            intermediate: 28672,
            heads: 96,
            kv_heads: 8,
            head_dim: 128,
            ..model()
        };
        let small = shrunk(&large, weights(&large) / 64);
        assert_eq!((small.hidden, small.intermediate, small.heads, small.kv_heads), (1536, 3584, 12, 1));
        assert_eq!(shrunk(&large, usize::MAX), large);
    }

    proptest! {
        #[test]
        fn a_made_up_layer_has_whole_blocks_and_whole_groups_of_heads_for_every_model(
            kv_heads in 1usize..=40, queries in 1usize..=16, half in 1usize..=128,
            hidden in 1usize..=2000, intermediate in 1usize..=4000, shift in 0u32..40,
        ) {
            let (heads, head_dim) = (kv_heads * queries, 2 * half);
            let model = ModelConfig { hidden, intermediate, heads, kv_heads, head_dim, ..model() };
            let small = shrunk(&model, 1 << shift);
            prop_assert!(small.heads.is_multiple_of(small.kv_heads));
            prop_assert_eq!(small.head_dim, head_dim);
            for site in Site::ALL {
                prop_assert!(small.site_features(site) > 0);
                prop_assert!(small.site_features(site).is_multiple_of(BLOCK), "{site:?}: {small:?}");
            }
            // What shares can be rounded up to: a block, and heads that are whole blocks.
            let least = ModelConfig { hidden: 16, intermediate: 16, heads: 8, kv_heads: 8, ..model.clone() };
            prop_assert!(weights(&small) <= 8 * (weights(&model).min(1 << shift) + weights(&least)), "{small:?}");
        }
    }
}
