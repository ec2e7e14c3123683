//! Every operation on a GPU against the CPU, on random inputs. Run on a machine with a GPU:
//!
//! ```text
//! make gpu-test
//! ```
//!
//! Without a GPU the tests say so and end; `make gpu-test` fails there. `make test` compiles the kernels all the same.

#![allow(clippy::print_stdout)] // figures, for `--nocapture`

mod skipped;

use distq::backend::cpu::Cpu;
use distq::backend::cuda::{Cuda, available};
use distq::backend::{
    Activation, AttentionShape, Backend, Compute, Gamma, Heads, NormKind, Rotation, Solver,
};
use distq::checkpoint::{Checkpoint, SourceTensor};
use distq::nvfp4::GlobalScale;
use half::bf16;
use safetensors::Dtype;

/// Numbers that differ from run to run would hide what failed; these differ from call to call.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 2.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| bf16::from_f32(self.next() * 2.0).to_f32()).collect()
    }
}

/// Both backends, or none where there is no GPU.
fn backends(compute: Compute) -> Option<(Cpu, Cuda)> {
    if available() == 0 {
        skipped::skipped("there is no GPU here");
        return None;
    }
    Some((Cpu::new(compute, 4).unwrap(), Cuda::new(compute, 0).unwrap()))
}

fn bytes(compute: Compute, values: &[f32]) -> Vec<u8> {
    match compute {
        Compute::F32 => bytemuck::cast_slice(values).to_vec(),
        Compute::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

fn values(compute: Compute, bytes: &[u8]) -> Vec<f32> {
    match compute {
        Compute::F32 => bytemuck::pod_collect_to_vec(bytes),
        Compute::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    }
}

/// An activation with these values.
fn upload<B: Backend>(backend: &B, rows: usize, cols: usize, x: &[f32]) -> B::Tensor {
    let mut tensor = backend.activation(rows, cols).unwrap();
    backend.upload(&bytes(backend.compute(), x), &mut tensor).unwrap();
    tensor
}

/// An output full of NaN: an element that is not written shows.
fn poisoned<B: Backend>(backend: &B, rows: usize, cols: usize) -> B::Tensor {
    upload(backend, rows, cols, &vec![f32::NAN; rows * cols])
}

fn download<B: Backend>(backend: &B, x: &B::Tensor) -> Vec<f32> {
    let mut bytes = vec![];
    backend.download(x, &mut bytes).unwrap();
    values(backend.compute(), &bytes)
}

/// What an operation gives on a backend.
trait Operation {
    fn on<B: Solver>(&self, backend: &B) -> Vec<f32>;
}

fn agree(name: &str, operation: &impl Operation) {
    for (compute, tolerance) in [(Compute::Bf16, 1e-2), (Compute::F32, 1e-5)] {
        let Some((cpu, cuda)) = backends(compute) else { return };
        let (expected, got) = (operation.on(&cpu), operation.on(&cuda));
        assert_eq!(expected.len(), got.len());
        let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
        let difference = squares(&mut expected.iter().zip(&got).map(|(a, b)| (a - b) as f64));
        let error = (difference / squares(&mut expected.iter().map(|&x| x as f64))).sqrt();
        assert!(error < tolerance, "{name} in {compute:?}: relative error {error:e}");
    }
}

#[test]
fn fp8_weights_are_loaded_as_their_bf16_export() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8");
    for compute in [Compute::Bf16, Compute::F32] {
        let Some((_, cuda)) = backends(compute) else { return };
        for form in ["block_partial", "block_e8m0", "tensor_static", "channel"] {
            let [fp8, bf16] =
                ["fp8", "bf16"].map(|kind| Checkpoint::open(&fixtures.join(form).join(kind)).unwrap());
            for name in bf16.tensors.keys().filter(|name| name.ends_with("_proj.weight")) {
                let [ours, theirs] = [&fp8, &bf16].map(|checkpoint| {
                    download(&cuda, &cuda.load(&checkpoint.tensor(name).unwrap()).unwrap())
                });
                assert!(!ours.is_empty() && ours == theirs, "{form} {name} in {compute:?}");
            }
        }
    }
}

struct Linear(usize, usize, usize, bool);

impl Operation for Linear {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Linear(m, n, k, biased)) = (Random(1), self);
        let (x, w, bias) =
            (upload(b, m, k, &r.values(m * k)), upload(b, n, k, &r.values(n * k)), r.values(n));
        let bias = biased.then(|| b.constant(&bias, n).unwrap());
        let mut out = poisoned(b, m, n);
        b.linear(&x, &w, bias.as_ref(), &mut out).unwrap();
        download(b, &out)
    }
}

#[test]
fn linear() {
    for (m, n, k) in [(1, 16, 16), (7, 48, 32), (130, 576, 576), (300, 192, 1536)] {
        agree("linear", &Linear(m, n, k, false));
        agree("linear with bias", &Linear(m, n, k, true));
    }
}

/// Rows and columns, the kind, whether there is a bias.
struct Norm(usize, usize, NormKind, bool);

impl Operation for Norm {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Norm(rows, cols, kind, biased)) = (Random(2), self);
        let x = upload(b, rows, cols, &r.values(rows * cols));
        let (weight, bias) =
            (b.constant(&r.values(cols), cols).unwrap(), b.constant(&r.values(cols), cols).unwrap());
        let weight = (kind.gamma != Gamma::One).then_some(&weight);
        let mut out = poisoned(b, rows, cols);
        b.norm(&x, &kind, weight, biased.then_some(&bias), &mut out).unwrap();
        download(b, &out)
    }
}

fn kinds() -> Vec<NormKind> {
    let mut kinds = vec![];
    for gamma in [Gamma::Weight, Gamma::OnePlus, Gamma::OnePlusRounded, Gamma::One] {
        for (centers, rounds_first) in [(false, false), (false, true), (true, false)] {
            kinds.push(NormKind { centers, gamma, rounds_first, eps: 1e-5 });
        }
    }
    kinds
}

#[test]
fn norms() {
    for (rows, cols) in [(1, 16), (5, 576), (3, 12288), (64, 100), (9, 1023), (2, 1025)] {
        for kind in kinds() {
            agree(&format!("{kind:?} of {cols}"), &Norm(rows, cols, kind, false));
            if kind.gamma != Gamma::One {
                agree(&format!("{kind:?} of {cols} with bias"), &Norm(rows, cols, kind, true));
            }
        }
    }
}

/// Rows, heads, features of a head, the kind, whether each head has weights of its own.
struct NormHeads(usize, usize, usize, NormKind, bool);

impl Operation for NormHeads {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &NormHeads(rows, heads, dim, kind, own)) = (Random(31), self);
        let mut x = upload(b, rows, heads * dim, &r.values(rows * heads * dim));
        let cols = if own { heads * dim } else { dim };
        let weight = b.constant(&r.values(cols), cols).unwrap();
        b.norm_heads(&mut x, dim, &kind, (kind.gamma != Gamma::One).then_some(&weight)).unwrap();
        download(b, &x)
    }
}

#[test]
fn norms_of_heads() {
    for (rows, heads, dim) in [(1, 1, 16), (37, 9, 64), (5, 3, 10), (4, 2, 512), (3, 1, 4096), (2, 2, 1500)] {
        for kind in kinds() {
            for own in [false, true] {
                let name = format!("{kind:?} of {heads} heads of {dim}, own {own}");
                agree(&name, &NormHeads(rows, heads, dim, kind, own));
            }
        }
    }
}

/// Heads, turned features of each, the rotation, whether tables are exact.
struct Rope(usize, usize, Rotation, bool);

impl Operation for Rope {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Rope(heads, turned, rotation, exact)) = (Random(3), self);
        let (cols, half) = (heads * rotation.head_dim, turned / 2);
        let mut x = upload(b, 9, cols, &r.values(9 * cols));
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = (0..40 * half).map(|i| f(i as f32 * 0.37)).collect();
            if exact { b.exact_constant(&values, half) } else { b.constant(&values, half) }.unwrap()
        };
        let rows = b.index(&[0, 1, 2, 39, 5, 5, 7, 0, 11]).unwrap();
        b.rope(&mut x, &rotation, &table(f32::cos), &table(f32::sin), &rows).unwrap();
        download(b, &x)
    }
}

#[test]
fn rope() {
    for (heads, head_dim, turned) in
        [(3, 64, 64), (2, 10, 10), (3, 128, 64), (2, 96, 48), (2, 10, 4), (1, 512, 512), (2, 100, 64)]
    {
        for flags in 0..8 {
            let rotation = Rotation { head_dim, interleaved: flags & 1 > 0, rounds_once: flags & 2 > 0 };
            let exact = flags & 4 > 0;
            let name = format!("{rotation:?} of {turned}, exact tables {exact}");
            agree(&name, &Rope(heads, turned, rotation, exact));
        }
    }
}

struct Elementwise(usize, usize);

impl Operation for Elementwise {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Elementwise(rows, cols)) = (Random(4), self);
        let mut gate = upload(b, rows, cols, &r.values(rows * cols));
        let up = upload(b, rows, cols, &r.values(rows * cols));
        b.add(&mut gate, &up).unwrap();
        let table = upload(b, 50, 24, &r.values(50 * 24));
        let mut embedded = poisoned(b, 4, 24);
        b.embed(&table, &b.index(&[49, 0, 7, 7]).unwrap(), &mut embedded).unwrap();
        let mut all = [download(b, &gate), download(b, &embedded)].concat();
        b.gate_by_sigmoid(&mut gate, &up).unwrap();
        all.extend(download(b, &gate));
        b.multiply(&mut gate, 3.87).unwrap();
        all.extend(download(b, &gate));
        let at: Vec<u32> = (0..rows as u32).map(|row| row * 7 % 5).collect();
        let factors = upload(b, 5, 1, &[1.0, 1.25, 0.5, 3.0, 1.0625]);
        b.multiply_rows(&mut gate, &factors, &b.index(&at).unwrap()).unwrap();
        all.extend(download(b, &gate));
        b.softcap(&mut gate, 2.5).unwrap();
        all.extend(download(b, &gate));
        for (first, part) in [(0, cols), (8, 16), (3, 5)] {
            let mut to = poisoned(b, rows, part);
            b.copy_columns(&gate, first, &mut to).unwrap();
            all.extend(download(b, &to));
        }
        all
    }
}

#[test]
fn elementwise() {
    for (rows, cols) in [(33, 96), (3, 37)] {
        agree("add, embed, gates, factors, caps, columns", &Elementwise(rows, cols));
    }
}

struct Activated(Activation, usize, usize);

impl Operation for Activated {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Activated(activation, rows, cols)) = (Random(32), self);
        let mut gate = upload(b, rows, cols, &r.values(rows * cols));
        let up = upload(b, rows, cols, &r.values(rows * cols));
        b.activate_mul(&mut gate, &up, activation).unwrap();
        let mut alone = up;
        b.activate(&mut alone, activation).unwrap();
        [download(b, &gate), download(b, &alone)].concat()
    }
}

#[test]
fn activations() {
    let xielu = Activation::Xielu { alpha_p: 0.8125, alpha_n: 1.3125 };
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu2, xielu] {
        for (rows, cols) in [(33, 96), (3, 37)] {
            agree(&format!("{activation:?}"), &Activated(activation, rows, cols));
        }
    }
}

/// Bounds, the shape (its scale aside), whether there are sinks.
struct Attention(Vec<u32>, AttentionShape, bool);

impl Operation for Attention {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, Attention(bounds, shape, sunk)) = (Random(5), self);
        let (n, h) = (*bounds.last().unwrap() as usize, shape.heads);
        let (q_cols, kv_cols) = (h.heads * h.dim, h.kv_heads * h.dim);
        let q = upload(b, n, q_cols, &r.values(n * q_cols));
        let k = upload(b, n, kv_cols, &r.values(n * kv_cols));
        let v = upload(b, n, kv_cols, &r.values(n * kv_cols));
        let sinks = b.constant(&r.values(h.heads), h.heads).unwrap();
        let mut out = poisoned(b, n, q_cols);
        let bounds = b.index(bounds).unwrap();
        b.attention(&q, &k, &v, &bounds, shape, sunk.then_some(&sinks), &mut out).unwrap();
        download(b, &out)
    }
}

fn shape(heads: usize, kv_heads: usize, dim: usize, window: Option<usize>) -> AttentionShape {
    let scale = (dim as f32).powf(-0.5);
    AttentionShape { heads: Heads { heads, kv_heads, dim }, scale, window, softcap: None }
}

#[test]
fn attention() {
    for (bounds, shape) in [
        (vec![0, 1], shape(2, 1, 16, None)),
        (vec![0, 64, 65, 193], shape(9, 3, 64, None)),
        (vec![0, 300], shape(4, 2, 128, Some(1))),
        (vec![0, 40, 340], shape(4, 2, 128, Some(70))),
        (vec![0, 513], shape(3, 3, 10, None)),
        (vec![0, 130], shape(2, 1, 256, Some(64))),
    ] {
        agree("attention", &Attention(bounds, shape, false));
    }
}

#[test]
fn attention_with_softcaps_sinks_and_wide_heads() {
    for dim in [64, 80, 96, 128, 168, 192, 256, 258, 320, 512] {
        for (softcap, sunk) in [(None, false), (Some(1.5), false), (None, true), (Some(1.5), true)] {
            for window in [None, Some(70)] {
                let shape = AttentionShape { softcap, ..shape(4, 2, dim, window) };
                let name = format!("attention {shape:?}, sinks {sunk}");
                agree(&name, &Attention(vec![0, 1, 40, 215], shape, sunk));
            }
        }
    }
}

/// Weights with ties, zeros, tiny and huge blocks, negative zeros.
fn edge_weights() -> Vec<f32> {
    let mut r = Random(6);
    let mut w = r.values(64 * 256);
    for (i, block) in w.chunks_mut(16).enumerate() {
        match i % 7 {
            1 => block.fill(0.0),
            2 => block.iter_mut().for_each(|x| *x *= 1e-9),
            3 => block.iter_mut().for_each(|x| *x = -0.0 * x.signum()),
            4 => block.copy_from_slice(&[
                0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0,
                -6.0,
            ]),
            5 => block.iter_mut().for_each(|x| *x *= 1e-3),
            _ => {}
        }
    }
    w
}

#[test]
fn quantizing_gives_the_bytes_of_the_cpu() {
    for (compute, dtype) in [(Compute::Bf16, Dtype::BF16), (Compute::F32, Dtype::F32)] {
        let Some((cpu, cuda)) = backends(compute) else { return };
        let w = edge_weights();
        let source = SourceTensor::from_bytes("w", dtype, &[64, 256], &bytes(compute, &w)).unwrap();
        let (here, there) = (cpu.load(&source).unwrap(), cuda.load(&source).unwrap());
        let amax = cpu.weight_amax(&here).unwrap();
        assert_eq!(cuda.weight_amax(&there).unwrap(), amax);
        for global in [amax, amax / 5.0, 2688.0, 0.0].map(GlobalScale::from_amax) {
            let empty = || (vec![0xAA; 64 * 128], vec![0xAA; 64 * 16]);
            let (mut expected, mut got) = (empty(), empty());
            cpu.quantize(&here, global, &mut expected.0, &mut expected.1).unwrap();
            cuda.quantize(&there, global, &mut got.0, &mut got.1).unwrap();
            assert_eq!(got, expected, "{compute:?} {global:?}");
        }
    }
}

struct Sums(usize, usize);

impl Operation for Sums {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Sums(rows, cols)) = (Random(12), self);
        let mut sums = b.sums(cols, true, [2 * rows, 0]).unwrap();
        let last = b.index(&[rows as u32 - 1]).unwrap();
        for _ in 0..2 {
            let x = upload(b, rows, cols, &r.values(rows * cols));
            b.add_channels(&x, &mut sums).unwrap();
            b.add_products(&x, &mut sums).unwrap();
            b.add_rows(&x, &last, 0, &mut sums).unwrap();
        }
        let channels = b.read_channels(&sums).unwrap();
        assert!(channels.amax.iter().all(|&amax| amax > 0.0 && amax <= 2.0));
        let gathered = b.gathered(sums).unwrap();
        let products = b.read(&gathered.products.unwrap()).unwrap();
        [channels.squares, products, b.read(&gathered.rows[0]).unwrap()].concat()
    }
}

#[test]
fn statistics() {
    for (rows, cols) in [(1, 16), (37, 100), (300, 576)] {
        agree("sums", &Sums(rows, cols));
    }
}

struct QuantizedInput(usize, usize, f32);

impl Operation for QuantizedInput {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &QuantizedInput(rows, cols, amax)) = (Random(13), self);
        let mut x = upload(b, rows, cols, &r.values(rows * cols));
        b.quantize_input(&mut x, GlobalScale::from_amax(amax)).unwrap();
        b.values(&x).unwrap()
    }
}

#[test]
fn quantized_inputs_are_those_of_the_cpu() {
    for amax in [2.0, 0.3, 5e4] {
        for compute in [Compute::Bf16, Compute::F32] {
            let Some((cpu, cuda)) = backends(compute) else { return };
            let operation = QuantizedInput(33, 160, amax);
            assert_eq!(operation.on(&cpu), operation.on(&cuda), "{compute:?} {amax}");
        }
    }
}

/// Every operation on matrices that is not about codes.
struct Matrices(usize, usize, usize);

impl Operation for Matrices {
    fn on<B: Solver>(&self, b: &B) -> Vec<f32> {
        let (mut r, &Matrices(t, rows, n)) = (Random(21), self);
        let weight = upload(b, rows, n, &r.values(rows * n));
        let mut w = b.widen(&weight).unwrap();
        let x = b.matrix(r.values(t * n), n).unwrap();
        let mut factors = |n: usize| -> Vec<f32> { r.values(n).iter().map(|f| f.abs() + 0.5).collect() };
        let (by_row, by_column) = (factors(rows), factors(n));
        b.scale(&mut w, Some(&by_row), Some(&by_column)).unwrap();
        b.scale(&mut w, None, Some(&by_column)).unwrap();
        let divided = b.divided(&w, &by_column).unwrap();
        let served = b.served(&x, &by_column, Some(GlobalScale::from_amax(3.0))).unwrap();
        let (plain, outputs) = (b.outputs(&x, &w).unwrap(), b.outputs(&served, &divided).unwrap());
        let columns = b.columns(&w).unwrap();
        let mut all = vec![b.largest(&w).unwrap(), b.relative_error(&outputs, &plain).unwrap() as f32];
        for matrix in [&w, &divided, &served, &plain, &outputs] {
            all.extend(b.read(matrix).unwrap());
        }
        all.extend(columns.amax);
        all.extend(columns.squares.iter().map(|&square| square as f32));
        all
    }
}

#[test]
fn matrices() {
    for (t, rows, n) in [(1, 3, 16), (33, 70, 160), (128, 300, 576)] {
        agree("matrices", &Matrices(t, rows, n));
    }
}

/// Codes and scales by max and by search, and the values that they stand for.
fn rounded<B: Solver>(b: &B, rows: usize, n: usize) -> (Vec<u8>, Vec<f32>) {
    let mut r = Random(22);
    let mut values = r.values(rows * n);
    values.chunks_mut(16).enumerate().for_each(|(i, block)| match i % 5 {
        1 => block.fill(0.0),
        2 => block.iter_mut().for_each(|x| *x *= 1e-7),
        3 => block.iter_mut().for_each(|x| *x *= 1e-2),
        _ => {}
    });
    let w = b.matrix(values, n).unwrap();
    let importance: Vec<f32> = r.values(n).iter().map(|x| x * x).collect();
    let (mut bytes, mut meant) = (vec![], vec![]);
    for global in [2.0, 0.3].map(GlobalScale::from_amax) {
        for codes in [b.round_max(&w, global), b.round_searched(&w, &importance, global)] {
            let codes = codes.unwrap();
            meant.extend(b.read(&b.dequantize(&codes, n, global).unwrap()).unwrap());
            let read = b.read_codes(codes).unwrap();
            bytes.extend(read.codes.iter().chain(&read.scales));
        }
    }
    (bytes, meant)
}

#[test]
fn rounding_and_searching_give_the_bytes_of_the_cpu() {
    for (rows, n) in [(3, 16), (70, 160), (64, 1024)] {
        for compute in [Compute::Bf16, Compute::F32] {
            let Some((cpu, cuda)) = backends(compute) else { return };
            let ((expected, here), (got, there)) = (rounded(&cpu, rows, n), rounded(&cuda, rows, n));
            assert_eq!(expected, got, "{rows} x {n}, {compute:?}");
            // The GPU multiplies with the global scale last, the CPU first: the last bit may differ.
            for (here, there) in here.into_iter().zip(there) {
                assert!((here - there).abs() <= here.abs() * 2.0 * f32::EPSILON, "{here} {there}");
            }
        }
    }
}

/// Codes by GPTQ for inputs whose channels depend on each other: the codes, and what they lose.
fn gptq<B: Solver>(b: &B, rows: usize, n: usize) -> (Vec<u8>, f64) {
    let mut r = Random(23);
    let mut x = r.values(3 * n * n);
    for row in x.chunks_mut(n) {
        (1..n).for_each(|i| row[i] = 0.6 * row[i - 1] + row[i] * if i % 11 == 0 { 3.0 } else { 1.0 });
    }
    let x = b.matrix(x, n).unwrap();
    let mut sums = b.sums(n, true, [0, 0]).unwrap();
    let inputs = upload(b, 3 * n, n, &b.read(&x).unwrap());
    b.add_products(&inputs, &mut sums).unwrap();
    let h = b.gathered(sums).unwrap().products.unwrap();
    let mean = b.diagonal(&h).unwrap().iter().sum::<f32>() / n as f32;
    let order: Vec<u32> = (0..n as u32 / 16).rev().flat_map(|block| block * 16..block * 16 + 16).collect();
    let factor = b.factor(&h, &order, 0.05 * mean).unwrap().expect("the Hessian is positive definite");
    assert!(b.factor(&h, &order, -2.0 * mean).unwrap().is_none(), "negative pivots are refused");
    let w = b.matrix(r.values(rows * n), n).unwrap();
    let global = GlobalScale::from_amax(b.largest(&w).unwrap());
    let codes = b.round_gptq(&w, &factor, global).unwrap();
    let values = b.dequantize(&codes, n, global).unwrap();
    let error = b.relative_error(&b.outputs(&x, &values).unwrap(), &b.outputs(&x, &w).unwrap()).unwrap();
    (b.read_codes(codes).unwrap().codes, error)
}

#[test]
fn gptq_loses_what_it_loses_on_the_cpu() {
    for (rows, n) in [(5, 16), (100, 80), (130, 576), (64, 4160)] {
        let Some((cpu, cuda)) = backends(Compute::F32) else { return };
        let ((here, expected), (there, got)) = (gptq(&cpu, rows, n), gptq(&cuda, rows, n));
        let differ = here.iter().zip(&there).filter(|(a, b)| a != b).count() as f64 / here.len() as f64;
        println!("GPTQ {rows} x {n}: loss {expected:e} and {got:e}, {:.2} % of bytes differ", 100.0 * differ);
        assert!((got / expected - 1.0).abs() < 0.02, "{rows} x {n}: {expected} {got}");
        assert_eq!(gptq(&cuda, rows, n), (there, got), "the same every time");
    }
}

#[test]
fn maxima_keep_nan() {
    let Some((_, cuda)) = backends(Compute::Bf16) else { return };
    let mut amax = Backend::amax(&cuda, 3).unwrap();
    let mut x = Random(8).values(1000);
    x[17] = -9.0;
    cuda.observe(&upload(&cuda, 10, 100, &x), &mut amax, 0).unwrap();
    x[999] = f32::NAN;
    cuda.observe(&upload(&cuda, 10, 100, &x), &mut amax, 2).unwrap();
    let got = cuda.read_amax(&amax).unwrap();
    assert_eq!((got[0], got[1]), (9.0, 0.0));
    assert!(got[2].is_nan());
}

#[test]
fn a_result_is_the_same_every_time() {
    let Some((_, cuda)) = backends(Compute::Bf16) else { return };
    let attention = Attention(vec![0, 300, 700], shape(9, 3, 64, None), false);
    let wide = Attention(vec![0, 300, 700], shape(2, 1, 512, None), false);
    let once = wide.on(&cuda);
    let (first, linear) = (attention.on(&cuda), Linear(700, 576, 1536, false).on(&cuda));
    for _ in 0..5 {
        assert_eq!(attention.on(&cuda), first);
        assert_eq!(wide.on(&cuda), once);
        assert_eq!(Linear(700, 576, 1536, false).on(&cuda), linear);
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    for compute in [Compute::Bf16, Compute::F32] {
        let Some((_, b)) = backends(compute) else { return };
        let some = |rows: usize, cols: usize| upload(&b, rows, cols, &vec![1.0; rows * cols]);
        let (x, mut out) = (some(4, 32), some(4, 48));
        assert!(b.linear(&x, &some(48, 64), None, &mut out).is_err());
        assert!(b.linear(&x, &some(40, 32), None, &mut out).is_err());
        assert!(b.linear(&x, &some(48, 32), Some(&some(1, 40)), &mut out).is_err());
        assert!(b.linear(&x, &some(48, 32), Some(&some(1, 48)), &mut out).is_ok());
        let llama = NormKind::llama(1e-5);
        assert!(b.norm(&x, &llama, Some(&some(1, 16)), None, &mut some(4, 32)).is_err());
        assert!(b.norm(&x, &llama, None, None, &mut some(4, 32)).is_err());
        assert!(b.norm_heads(&mut some(4, 32), 12, &llama, Some(&some(1, 12))).is_err());
        assert!(b.copy_columns(&x, 17, &mut some(4, 16)).is_err());
        assert!(b.multiply_rows(&mut out, &some(2, 1), &b.index(&[0, 1, 2, 0]).unwrap()).is_err());
        assert!(b.gate_by_sigmoid(&mut out, &x).is_err());
        assert!(b.embed(&x, &b.index(&[0, 4]).unwrap(), &mut some(2, 32)).is_err());
        assert!(b.add(&mut out, &x).is_err() && b.activate_mul(&mut out, &x, Activation::Silu).is_err());
        let (cos, rows) = (some(3, 8), b.index(&[0, 1, 2, 3]).unwrap());
        assert!(b.rope(&mut some(4, 32), &Rotation::llama(16), &cos, &cos, &rows).is_err());
        let how = shape(2, 1, 16, None);
        let (kv, bounds) = (some(4, 16), b.index(&[0, 5]).unwrap());
        assert!(b.attention(&x, &kv, &kv, &bounds, &how, None, &mut some(4, 32)).is_err());
        let (w, h) = (b.widen(&x).unwrap(), b.matrix(vec![1.0; 48 * 48], 48).unwrap());
        assert!(b.divided(&w, &[1.0; 16]).is_err() && b.outputs(&w, &h).is_err());
        assert!(b.factor(&h, &[48; 48], 1.0).is_err() && b.relative_error(&w, &h).is_err());
    }
}

/// A grid has at most 65,535 blocks in its second dimension.
#[test]
fn more_than_65535_inputs_have_a_factor() {
    let Some((_, b)) = backends(Compute::Bf16) else { return };
    let n = 65_552;
    if b.free_memory() < 40 << 30 {
        println!("skipped: {n} squared floats, twice, need 40 GiB");
        return;
    }
    let h = b.gathered(b.sums(n, true, [0, 0]).unwrap()).unwrap().products.unwrap();
    let order: Vec<u32> = (0..n as u32).collect();
    assert!(b.factor(&h, &order, 1.0).unwrap().is_some());
    assert!(b.factor(&h, &order, -1.0).unwrap().is_none());
}
