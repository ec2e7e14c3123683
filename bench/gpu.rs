//! Where a layer's time goes on one GPU, each operation beside what limits it.
//!
//! ```text
//! cargo bench --bench gpu -- CHECKPOINT [TOKENS]
//! ```
//!
//! CHECKPOINT is one of `bench/make_checkpoint.py` or any other of a supported family; TOKENS (default 65536) are
//! random ids in documents of 150 to 1200. Bytes are those that an operation must move, each input read once and
//! each output written once; the ceilings are a copy on the card and cuBLAS on the layer's own shapes. Medians of
//! five.

#![allow(clippy::print_stdout)] // a table is what it is for

use std::path::Path;
use std::time::Instant;

use cudarc::driver::CudaContext;
use distq::backend::cuda::{Cuda, Tensor, available};
use distq::backend::{Activation, AttentionShape, Backend, Compute, Gamma, Heads, NormKind, Rotation};
use distq::calibration::micro_batches;
use distq::checkpoint::Checkpoint;
use distq::error::Result;
use distq::forward::{Decoder, LayerWeights, Tables};
use distq::model::Model;
use distq::nvfp4::GlobalScale;

const RUNS: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let Some(checkpoint) = arguments.first() else {
        return println!("skipped: name a checkpoint, as in `cargo bench --bench gpu -- DIR`");
    };
    if available() == 0 {
        return println!("skipped: there is no GPU here");
    }
    let tokens = arguments.get(1).map_or(65536, |tokens| tokens.parse().expect("a number of tokens"));
    measure(Path::new(checkpoint), tokens).unwrap_or_else(|error| panic!("{error}"));
}

/// Seconds that `work` takes on the card: the median of several times, after one that does not count.
fn seconds(cuda: &Cuda, tick: &Tensor, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    let mut bytes = Vec::new();
    for _ in 0..=RUNS {
        cuda.download(tick, &mut bytes)?; // waits for what came before
        let started = Instant::now();
        work()?;
        cuda.download(tick, &mut bytes)?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

/// Bytes per second, read and written together, of a copy on the card.
fn copy_rate() -> f64 {
    let stream = CudaContext::new(0).expect("a GPU").default_stream();
    let bytes = 1 << 30;
    let from = stream.alloc_zeros::<u8>(bytes).expect("memory");
    let mut to = stream.alloc_zeros::<u8>(bytes).expect("memory");
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        stream.synchronize().expect("a GPU");
        let started = Instant::now();
        (0..4).for_each(|_| stream.memcpy_dtod(&from, &mut to).expect("a copy"));
        stream.synchronize().expect("a GPU");
        best = best.min(started.elapsed().as_secs_f64() / 4.0);
    }
    2.0 * bytes as f64 / best
}

/// The operations that only families other than Llama's have, on this model's sizes: tokens, hidden and intermediate
/// features, those of all queries and of all keys.
fn other_families(
    cuda: &Cuda,
    tick: &Tensor,
    [t, h, i, q, kv]: [usize; 5],
    dim: usize,
    row: &dyn Fn(&str, usize, f64),
) -> Result<()> {
    let time = |work: &mut dyn FnMut() -> Result<()>| seconds(cuda, tick, work);
    let random = |rows: usize, cols: usize| -> Result<Tensor> {
        let values = (0..rows * cols).map(|i| (i * 7919 % 2001) as f32 / 1000.0 - 1.0);
        cuda.constant(&values.collect::<Vec<_>>(), cols)
    };
    let (narrow, mut x, weight, of_head) = (random(t, h)?, random(t, h)?, random(1, h)?, random(1, dim)?);
    let (mut queries, mut keys, gates) = (random(t, q)?, random(t, kv)?, random(t, q)?);
    let (mut wide, up) = (random(t, i)?, random(t, i)?);
    let rms = NormKind { gamma: Gamma::OnePlus, rounds_first: false, ..NormKind::llama(1e-6) };
    let centered = NormKind { centers: true, gamma: Gamma::Weight, ..rms };
    for (name, kind) in [("norm, 1 + w", rms), ("norm, centered", centered)] {
        row(name, 2 * 2 * t * h, time(&mut || cuda.norm(&narrow, &kind, Some(&weight), None, &mut x))?);
    }
    row("norm of the heads of q and k", 2 * 2 * t * (q + kv), {
        time(&mut || {
            cuda.norm_heads(&mut queries, dim, &rms, Some(&of_head))?;
            cuda.norm_heads(&mut keys, dim, &rms, Some(&of_head))
        })?
    });
    let rows = cuda.index(&(0..t as u32).map(|row| row % 1200).collect::<Vec<_>>())?;
    let angles = vec![0.5; 1200 * dim / 2];
    let tables = [cuda.constant(&angles, dim / 2)?, cuda.exact_constant(&angles, dim / 2)?];
    for (name, interleaved, table) in [("interleaved", true, 0), ("exact tables", false, 1)] {
        let rotation = Rotation { head_dim: dim, interleaved, rounds_once: true };
        row(&format!("rope on q, {name}"), 2 * 2 * t * q, {
            time(&mut || cuda.rope(&mut queries, &rotation, &tables[table], &tables[table], &rows))?
        });
    }
    let xielu = Activation::Xielu { alpha_p: 0.8, alpha_n: 1.3 };
    for activation in [Activation::GeluTanh, Activation::Gelu] {
        let name = format!("{activation:?} times up");
        row(&name, 3 * 2 * t * i, time(&mut || cuda.activate_mul(&mut wide, &up, activation))?);
    }
    for (name, activation) in [("squared relu", Activation::Relu2), ("xIELU", xielu)] {
        row(name, 2 * 2 * t * i, time(&mut || cuda.activate(&mut wide, activation))?);
    }
    row("gate of q by sigmoid", 3 * 2 * t * q, time(&mut || cuda.gate_by_sigmoid(&mut queries, &gates))?);
    row("multiply", 2 * 2 * t * h, time(&mut || cuda.multiply(&mut x, 1.0))?);
    let factors = cuda.constant(&[1.0; 1200], 1)?;
    row(
        "multiply rows of q",
        2 * 2 * t * q,
        time(&mut || cuda.multiply_rows(&mut queries, &factors, &rows))?,
    );
    row("softcap", 2 * 2 * t * i, time(&mut || cuda.softcap(&mut wide, 30.0))?);
    row(
        "columns of a fused output",
        2 * 2 * t * kv,
        time(&mut || cuda.copy_columns(&gates, q - kv, &mut keys))?,
    );
    Ok(())
}

fn measure(dir: &Path, tokens: usize) -> Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    let model = Model::of(&checkpoint)?;
    let spec = &model.layers[0];
    let cuda = Cuda::new(Compute::Bf16, 0)?;
    let copies = copy_rate();
    println!("{}: a copy moves {:.2} TB/s (read and written)\n", cuda.name(), copies / 1e12);

    // The loader by itself, from the page cache: the first round warms it.
    let source = |name: &str| checkpoint.tensor(name);
    let (mut weights, mut loading) = (None, vec![]);
    for round in 0..2 {
        for layer in model.layers.iter().take(3) {
            let started = Instant::now();
            weights = Some(LayerWeights::load(&cuda, layer, &source)?);
            if round > 0 {
                loading.push(started.elapsed().as_secs_f64());
            }
        }
    }
    let weights = weights.expect("a model has a layer");
    loading.sort_by(f64::total_cmp);
    let load = loading[loading.len() / 2];

    // Documents of 150 to 1200 tokens.
    let (mut lengths, mut sum, mut seed) = (vec![], 0, 1u64);
    while sum < tokens {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        lengths.push((150 + (seed >> 33) as usize % 1051).min(tokens - sum));
        sum += lengths.last().expect("just pushed");
    }
    let tables = Tables::new(&model, &lengths);
    let decoder = Decoder::new(&cuda, &model, &tables)?;
    let batches = micro_batches(&lengths, 8192);
    let batches = batches
        .iter()
        .map(|b| decoder.batch(&tables, b.samples.start, &lengths[b.samples.clone()]))
        .collect::<Result<Vec<_>>>()?;
    let most = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
    let mut work = decoder.workspace(most)?;
    let tick = cuda.activation(1, 1)?;
    let mut amax = cuda.amax(spec.sites.len())?;
    let attention = &spec.attention().next().expect("the first layer has attention").form;
    let (h, q, kv) = (model.hidden, attention.queries(), attention.keys());
    let i = spec.sites.last().map_or(h, |site| site.features);
    let values = |n: usize| -> Vec<f32> { (0..n).map(|i| (i * 7919 % 2001) as f32 / 1000.0 - 1.0).collect() };
    let random = |rows: usize, cols: usize| -> Result<Tensor> { cuda.constant(&values(rows * cols), cols) };
    let mut states = batches.iter().map(|b| random(b.tokens, h)).collect::<Result<Vec<_>>>()?;

    let forward = seconds(&cuda, &tick, || {
        for (batch, state) in batches.iter().zip(&mut states) {
            let mut observe = |site: usize, x: &mut Tensor| cuda.observe(x, &mut amax, site);
            decoder.layer(spec, &weights, batch, &mut work, state, &mut observe)?;
        }
        Ok(())
    })?;
    drop(states);

    // Every operation on the largest micro-batch, scaled to all tokens.
    let t = most;
    let share = tokens as f64 / t as f64;
    let (narrow, mut wide, wide2) = (random(t, h)?, random(t, i)?, random(t, i)?);
    let (mut x, mut out_q, mut out_kv) = (random(t, h)?, random(t, q)?, random(t, kv)?);
    let (k, v) = (random(t, kv)?, random(t, kv)?);
    let norm = random(1, h)?;
    let mut outputs = spec.linears.iter().map(|l| random(t, l.rows)).collect::<Result<Vec<_>>>()?;
    let inputs = spec.linears.iter().map(|l| random(t, l.cols)).collect::<Result<Vec<_>>>()?;
    let products = seconds(&cuda, &tick, || {
        let linears = weights.linears.iter().zip(&inputs).zip(&mut outputs);
        linears.into_iter().try_for_each(|((l, x), out)| cuda.linear(x, &l.weight, None, out))
    })? * share;
    drop((inputs, outputs));
    let down = weights.linears.last().expect("a layer has linears");
    let weights_in_layer = spec.weights() as f64;
    let flops = 2.0 * weights_in_layer * tokens as f64;

    println!("a layer over {tokens} tokens, in ms:\n");
    println!("| operation | limited by | amount | ms | rate | of the ceiling |");
    println!("|---|---|---|---|---|---|");
    println!(
        "| matrix products alone (cuBLAS) | arithmetic | {:.0} TFLOP | {:.1} | {:.0} TFLOP/s | 1 |",
        flops / 1e12,
        products * 1e3,
        flops / products / 1e12
    );
    let row = |name: &str, bytes: usize, time: f64| {
        let (bytes, time) = (bytes as f64 * share, time * share);
        let rate = bytes / time;
        println!(
            "| {name} | bytes | {:.1} GB | {:.1} | {:.2} TB/s | {:.2} |",
            bytes / 1e9,
            time * 1e3,
            rate / 1e12,
            rate / copies
        );
    };
    let heads = attention.heads;
    let (llama, rotation) = (NormKind::llama(1e-5), Rotation::llama(heads.dim));
    let time = |work: &mut dyn FnMut() -> Result<()>| seconds(&cuda, &tick, work);
    row(
        "rms_norm, twice",
        2 * t * h * 2 * 2,
        time(&mut || cuda.norm(&narrow, &llama, Some(&norm), None, &mut x))? * 2.0,
    );
    row("observe the inputs", 2 * t * (2 * h + q + i), {
        time(&mut || {
            cuda.observe(&narrow, &mut amax, 0)?;
            cuda.observe(&narrow, &mut amax, 1)?;
            cuda.observe(&out_q, &mut amax, 2)?;
            cuda.observe(&wide, &mut amax, 3)
        })?
    });
    let rows = cuda.index(&(0..t as u32).map(|row| row % 1200).collect::<Vec<_>>())?;
    let cos = random(1200, heads.dim / 2)?;
    row("rope on q and k", 2 * 2 * t * (q + kv), {
        time(&mut || {
            cuda.rope(&mut out_q, &rotation, &cos, &cos, &rows)?;
            cuda.rope(&mut out_kv, &rotation, &cos, &cos, &rows)
        })?
    });
    row("silu_mul", 3 * 2 * t * i, time(&mut || cuda.activate_mul(&mut wide, &wide2, Activation::Silu))?);
    row("add, twice", 2 * 3 * 2 * t * h, time(&mut || cuda.add(&mut x, &narrow))? * 2.0);
    other_families(&cuda, &tick, [t, h, i, q, kv], heads.dim, &row)?;

    let mut out = random(t, q)?;
    let mut attend = |length: usize, dim: usize, softcap: Option<f32>| -> Result<()> {
        if !kv.is_multiple_of(dim) {
            return Ok(());
        }
        let mut bounds: Vec<u32> = (0..t.div_ceil(length)).map(|i| (i * length) as u32).collect();
        bounds.push(t as u32);
        let bounds = cuda.index(&bounds)?;
        let heads = Heads { heads: q / dim, kv_heads: kv / dim, dim };
        let how = AttentionShape { heads, scale: (dim as f32).powf(-0.5), window: None, softcap };
        let taken = time(&mut || cuda.attention(&out_q, &k, &v, &bounds, &how, None, &mut out))? * share;
        // Half of a square of scores, a product with the keys and one with the values.
        let flops = 2.0 * tokens as f64 * length as f64 * q as f64;
        let capped = if softcap.is_some() { ", softcap" } else { "" };
        println!(
            "| attention, documents of {length}, heads of {dim}{capped} | arithmetic | {:.1} TFLOP | {:.1} | {:.0} TFLOP/s | {:.2} |",
            flops / 1e12,
            taken * 1e3,
            flops / taken / 1e12,
            flops / taken / (weights_in_layer * 2.0 * tokens as f64 / products)
        );
        Ok(())
    };
    for length in [675, 1200, t] {
        attend(length, heads.dim, None)?;
    }
    attend(1200, heads.dim, Some(50.0))?;
    attend(1200, 256, None)?;
    attend(1200, 512, None)?;

    let (mut codes, mut scales) = (vec![0; h * i / 2], vec![0; h * i / 16]);
    let scale = GlobalScale::from_amax(1.0);
    println!("\nper layer, whatever the tokens, in ms:\n\n| what | amount | ms | rate |\n|---|---|---|---|");
    let line = |name: &str, bytes: f64, time: f64| {
        println!("| {name} | {:.2} GB | {:.1} | {:.1} GB/s |", bytes / 1e9, time * 1e3, bytes / time / 1e9);
    };
    line("loading from the page cache", 2.0 * weights_in_layer, load);
    let maximum = time(&mut || cuda.weight_amax(&down.weight).map(|_| ()))?;
    line("maximum of down's weights", (2 * h * i) as f64, maximum);
    let quantize = time(&mut || cuda.quantize(&down.weight, scale, &mut codes, &mut scales))?;
    line("quantizing down, and its codes back to the host", (2 * h * i) as f64, quantize);
    println!(
        "\nforward pass with observers: {:.1} ms; matrix products alone {:.1} ms: {:.0} % of what cuBLAS reaches",
        forward * 1e3,
        products * 1e3,
        100.0 * products / forward
    );
    Ok(())
}
