//! Hidden states after every layer, and the maxima that calibration observes, as Transformers computes them
//! (tests/fixtures/make_families.py).

use std::path::{Path, PathBuf};

use distq::backend::cpu::Cpu;
use distq::backend::{Backend, Compute};
use distq::checkpoint::{Checkpoint, Layout, Scheme};
use distq::model::{Decoder, LayerWeights, ModelConfig, Site};
use distq::pipeline::Inventory;
use half::bf16;
use safetensors::SafeTensors;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families")
}

fn floats(expected: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(expected.tensor(name).unwrap().data())
}

fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = squares(&mut got.iter().zip(expected).map(|(a, b)| *a as f64 - *b as f64));
    (difference / squares(&mut expected.iter().map(|b| *b as f64))).sqrt()
}

fn widened(backend: &Cpu, bytes: &[u8]) -> Vec<f32> {
    match backend.compute() {
        Compute::F32 => bytemuck::pod_collect_to_vec(bytes),
        Compute::Bf16 => {
            let values: Vec<bf16> = bytemuck::pod_collect_to_vec(bytes);
            values.into_iter().map(bf16::to_f32).collect()
        }
    }
}

/// Runs both documents of a variation as one micro-batch and compares everything.
fn check(dir: &Path) {
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = ModelConfig::parse(&checkpoint.config).unwrap();
    let layout = Layout::CompressedTensors;
    let compute = Inventory::new(&checkpoint, &model, layout, Scheme::Nvfp4, &[]).unwrap().compute;
    let (tolerance, amax_tolerance) = match compute {
        Compute::F32 => (1e-4, 1e-4),
        Compute::Bf16 => (1e-2, 1e-2),
    };
    let stored = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&stored).unwrap();
    let ids: Vec<Vec<u32>> = (0..2)
        .map(|d| bytemuck::pod_collect_to_vec(expected.tensor(&format!("ids.{d}")).unwrap().data()))
        .collect();
    let lengths: Vec<usize> = ids.iter().map(Vec::len).collect();

    let backend = Cpu::new(compute, 2).unwrap();
    let table = model.rope.table(&lengths);
    let decoder = Decoder::new(&backend, &model, &table).unwrap();
    let batch = decoder.batch(&table, 0, &lengths).unwrap();
    let mut work = decoder.workspace(batch.tokens).unwrap();
    let mut x = backend.activation(batch.tokens, model.hidden).unwrap();
    let embedding = backend.load(&checkpoint.tensor(&model.embedding().name).unwrap()).unwrap();
    backend.embed(&embedding, &backend.index(&ids.concat()).unwrap(), &mut x).unwrap();
    for layer in 0..model.layers {
        let weights =
            LayerWeights::load(&backend, &model, layer, &|name: &str| checkpoint.tensor(name)).unwrap();
        let mut amax = backend.amax(Site::ALL.len()).unwrap();
        let mut observe = |site: Site, x: &mut _| backend.observe(x, &mut amax, site as usize);
        decoder.layer(&weights, &batch, &mut work, &mut x, &mut observe).unwrap();
        let mut bytes = vec![];
        backend.download(&x, &mut bytes).unwrap();
        let hidden = widened(&backend, &bytes);
        let (first, second) = hidden.split_at(lengths[0] * model.hidden);
        for (document, got) in [first, second].into_iter().enumerate() {
            let error = relative_error(got, &floats(&expected, &format!("hidden.{document}.{layer}")));
            assert!(error < tolerance, "{name}: layer {layer}, document {document}: {error:e}");
        }
        for group in model.groups(layer) {
            let got = amax[group.site as usize];
            for linear in &group.members {
                let want = floats(&expected, &format!("amax.{}", linear.name))[0];
                assert!(
                    (got / want - 1.0).abs() < amax_tolerance,
                    "{name}: {}: {got} for {want}",
                    linear.name
                );
            }
        }
    }
}

#[test]
fn every_variation_agrees_with_transformers() {
    let mut variations: Vec<PathBuf> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    variations.sort();
    assert!(variations.len() >= 16, "the fixtures are there");
    variations.iter().for_each(|dir| check(dir));
}
