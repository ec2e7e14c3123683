//! Folds change no function: hidden states after every layer with and without them, on a tiny checkpoint of every
//! family (tests/fixtures/families) with outliers at all four sites.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

use super::statistics::Gathering;
use crate::backend::cpu::{Cpu, Tensor};
use crate::backend::{Backend, Compute, Solver};
use crate::calibration::{Sampling, micro_batches};
use crate::checkpoint::{Checkpoint, Layout, Scheme, SourceTensor, narrow, stored, widen};
use crate::finish::rewritten;
use crate::forward::{Decoder, LayerWeights, Tables};
use crate::job::{Inventory, Job};
use crate::methods::Method;
use crate::methods::layer::Layer;
use crate::model::{Model, Norm, Producer};

/// Tensors that replace the checkpoint's.
type Replaced = HashMap<String, SourceTensor>;

/// Called with every site's input.
type Observe<'a> = &'a mut dyn FnMut(usize, usize, &Tensor);

/// What is multiplied to plant an outlier, and where: channels of norms, rows of v and up.
const OUTLIERS: [(&str, &[usize]); 4] = [
    ("input_layernorm.weight", &[3, 20]),
    ("post_attention_layernorm.weight", &[9]),
    ("v_proj", &[1]),
    ("up_proj", &[5, 40]),
];

/// A copy of a fixture with outliers.
fn planted(fixture: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture).unwrap() {
        let (from, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name());
        if from.extension().is_none_or(|extension| extension != "safetensors")
            || name == "expected.safetensors"
        {
            std::fs::copy(&from, dir.path().join(name)).unwrap();
            continue;
        }
        let bytes = std::fs::read(&from).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let changed: Vec<_> =
            tensors.iter().map(|(name, view)| (name, view.dtype(), outliers(name, &view))).collect();
        let views = changed.iter().map(|(name, dtype, bytes)| {
            (*name, TensorView::new(*dtype, tensors.tensor(name).unwrap().shape().to_vec(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &dir.path().join(name)).unwrap();
    }
    dir
}

fn outliers(name: &str, view: &TensorView<'_>) -> Vec<u8> {
    let source = SourceTensor::from_bytes(name, view.dtype(), view.shape(), view.data()).unwrap();
    let mut values = widen(&source).unwrap();
    let row = values.len() / view.shape().first().unwrap_or(&1);
    for (_, places) in OUTLIERS.iter().filter(|(part, _)| name.contains(part)) {
        // Towers beside the decoder have smaller norms.
        let end = values.len() / row;
        for &place in places.iter().filter(|place| **place < end) {
            values[place * row..(place + 1) * row].iter_mut().for_each(|x| *x *= 16.0);
        }
    }
    narrow(view.dtype(), &values)
}

/// Both documents of a fixture, as a job that quantizes them by every piece of `best`.
fn job(dir: &Path) -> Job {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::of(&checkpoint).unwrap();
    let inventory =
        Inventory::new(&checkpoint, &model, Layout::CompressedTensors, Scheme::Nvfp4, &[]).unwrap();
    let expected = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let ids: Vec<Vec<u32>> = ["ids.0", "ids.1"]
        .map(|name| bytemuck::pod_collect_to_vec(expected.tensor(name).unwrap().data()))
        .to_vec();
    let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();
    Job {
        model,
        checkpoint,
        inventory,
        layout: Layout::CompressedTensors,
        quantized_inputs: true,
        method: Method::BEST,
        sampling: Sampling::of(&lengths, false),
        micro_batches: micro_batches(&lengths, usize::MAX),
        lengths,
        ids: ids.concat(),
        done: Default::default(),
        observed: HashMap::new(),
        calibrates: true,
    }
}

/// Hidden states after every layer.
fn hidden_states(backend: &Cpu, job: &Job, replaced: &Replaced, observe: Observe<'_>) -> Vec<Vec<f32>> {
    let source = |name: &str| match replaced.get(name) {
        Some(tensor) => Ok(tensor.clone()),
        None => job.checkpoint.tensor(name),
    };
    let tables = Tables::new(&job.model, &job.lengths);
    let decoder = Decoder::new(backend, &job.model, &tables).unwrap();
    let batch = decoder.batch(&tables, 0, &job.lengths).unwrap();
    let mut work = decoder.workspace(batch.tokens).unwrap();
    let mut x = backend.activation(batch.tokens, job.model.hidden).unwrap();
    let embedding = backend.load(&source(&job.model.embedding.name).unwrap()).unwrap();
    backend.embed(&embedding, &backend.index(&job.ids).unwrap(), &mut x).unwrap();
    decoder.embedded(&mut x).unwrap();
    let layer = |layer: usize| {
        let spec = &job.model.layers[layer];
        let weights = LayerWeights::load(backend, spec, &source).unwrap();
        let mut observe = |site: usize, x: &mut Tensor| {
            observe(layer, site, x);
            Ok(())
        };
        decoder.layer(spec, &weights, &batch, &mut work, &mut x, &mut observe).unwrap();
        backend.values(&x).unwrap()
    };
    (0..job.model.layers.len()).map(layer).collect()
}

/// Every tensor that folding changes, linears in F32 and not quantized, and how many layers fold at each site that can
/// be folded.
fn folded(backend: &Cpu, job: &Job) -> (Replaced, BTreeMap<&'static str, usize>) {
    let gathering = Gathering::new(backend, job).unwrap();
    let mut sums: Vec<_> = job.model.layers.iter().map(|layer| gathering.layer(layer).unwrap()).collect();
    hidden_states(backend, job, &Replaced::new(), &mut |layer, site, x| {
        let features = job.model.layers[layer].sites[site].features;
        gathering.take(0, site, x, features, &mut sums[layer]).unwrap();
    });
    let (mut replaced, mut count) = (Replaced::new(), BTreeMap::new());
    let mut replace = |name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]| {
        replaced.insert(name.to_string(), SourceTensor::from_bytes(name, dtype, shape, bytes).unwrap());
    };
    for (layer, sums) in sums.into_iter().enumerate() {
        let statistics = gathering.finish(sums).unwrap();
        let spec = &job.model.layers[layer];
        let quantized: Vec<Vec<usize>> = spec.sites.iter().map(|site| site.members.clone()).collect();
        let read = |site: usize| {
            let weight = |&number: &usize| {
                let tensor = job.checkpoint.tensor(&spec.linears[number].weight())?;
                backend.widen(&backend.load(&tensor)?)
            };
            quantized[site].iter().map(weight).collect()
        };
        let stored_norm = |norm: &Norm| norm.weight.as_ref().map(|w| job.checkpoint.tensor(&w.name).unwrap());
        let norms: Vec<Option<SourceTensor>> = spec.norms.iter().map(stored_norm).collect();
        let described = Layer {
            solver: backend,
            spec,
            quantized: &quantized,
            weights: &read,
            norms: norms.iter().map(|norm| norm.as_ref().map(|norm| widen(norm).unwrap())).collect(),
            round_norm: &|norm, x| stored(norms[norm].as_ref().unwrap().dtype, x),
            bias_holds: &|_, _, _| true,
            tokens: job.ids.len(),
            quantized_inputs: true,
        };
        let folds = described.folds(job.method, &statistics).unwrap();
        for (number, site) in spec.sites.iter().enumerate() {
            if site.producer != Producer::Fixed {
                *count.entry(site.name).or_insert(0) += usize::from(folds.has(number));
            }
        }
        for (name, bytes) in rewritten(job, layer, &folds).unwrap() {
            let entry = job.checkpoint.entry(&name).unwrap();
            replace(&name, entry.dtype, &entry.shape, &bytes);
        }
        for (site, numbers) in quantized.iter().enumerate() {
            let mut members = read(site).unwrap();
            described.fold(site, &folds, &mut members).unwrap();
            for (linear, member) in numbers.iter().map(|&n| &spec.linears[n]).zip(&members) {
                let bytes = narrow(Dtype::F32, &backend.read(member).unwrap());
                replace(&linear.weight(), Dtype::F32, &[linear.rows, linear.cols], &bytes);
            }
        }
    }
    (replaced, count)
}

/// The largest relative difference after any layer.
fn difference(got: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| (x as f64).powi(2)).sum::<f64>();
    let relative = |(got, expected): (&Vec<f32>, &Vec<f32>)| {
        let differences = squares(&mut got.iter().zip(expected).map(|(a, b)| a - b));
        (differences / squares(&mut expected.iter().copied())).sqrt()
    };
    got.iter().zip(expected).map(relative).fold(0.0, f64::max)
}

#[test]
fn folded_models_compute_the_same_hidden_states() {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let inside = |folder: &str| {
        let entries = std::fs::read_dir(all.join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect::<Vec<_>>()
    };
    let mut fixtures: Vec<PathBuf> = [inside("families"), inside("dense")].concat();
    fixtures.sort();
    assert!(fixtures.len() >= 64, "the fixtures are there");
    let failed: Vec<String> = (fixtures.iter())
        .filter_map(|fixture| {
            let name = fixture.file_name().unwrap().to_string_lossy().into_owned();
            std::panic::catch_unwind(|| folds_change_nothing(fixture, &name)).err().map(|_| name)
        })
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}

/// Folds one fixture, and compares what it computes with what it computed.
fn folds_change_nothing(fixture: &Path, name: &str) {
    let dir = planted(fixture);
    let job = job(dir.path());
    let wide = Cpu::new(Compute::F32, 2).unwrap();
    let states =
        |backend: &Cpu, replaced: &Replaced| hidden_states(backend, &job, replaced, &mut |_, _, _| {});
    let (mut replaced, count) = folded(&wide, &job);
    assert!(count.values().all(|&layers| layers > 0), "{name}: layers that fold by site: {count:?}");

    let plain = states(&wide, &Replaced::new());
    let error = difference(&states(&wide, &replaced), &plain);
    // Folded biases are stored as the checkpoint stores them.
    let rounded = job.model.linears().any(|linear| linear.bias) && job.inventory.compute == Compute::Bf16;
    assert!(error < if rounded { 2e-3 } else { 1e-5 }, "{name}: {error:e}");

    if job.inventory.compute == Compute::Bf16 {
        let backend = Cpu::new(Compute::Bf16, 2).unwrap();
        for tensor in replaced.values_mut().filter(|tensor| tensor.shape.len() == 2) {
            let bytes = narrow(Dtype::BF16, &widen(tensor).unwrap());
            *tensor = SourceTensor::from_bytes(&tensor.name, Dtype::BF16, &tensor.shape, &bytes).unwrap();
        }
        let plain_bf16 = states(&backend, &Replaced::new());
        let (error, rounding) =
            (difference(&states(&backend, &replaced), &plain), difference(&plain_bf16, &plain));
        assert!(error < 2.0 * rounding, "{name}: {error:e} with folds, {rounding:e} without");
    }

    // A fold that its producer did not take makes another function.
    let holds = |producer: &&str| replaced.keys().any(|name| name.contains(producer));
    for producer in ["norm", "up_proj"].into_iter().filter(holds) {
        let mut broken = replaced.clone();
        broken.retain(|name, _| !name.contains(producer));
        let error = difference(&states(&wide, &broken), &plain);
        assert!(error > 0.05, "{name} without {producer}: {error:e}");
    }
}
