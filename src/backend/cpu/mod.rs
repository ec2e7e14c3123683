//! The CPU backend: host memory, a thread pool of its own, BF16 or F32 arithmetic.

mod attention;
mod elementwise;
pub mod gemm;
mod shared;
mod solver;
mod sums;
mod tensor;
#[cfg(test)]
mod tests;

use std::time::Instant;

use half::bf16;
use rayon::ThreadPool;
use rayon::prelude::*;

use attention::Attend;
pub(crate) use elementwise::exp;
use shared::Disjoint;
#[cfg(test)]
pub(crate) use solver::noise;
pub use solver::{Factor, Matrix};
pub use sums::Sums;
use tensor::Scalar;
pub use tensor::{Tensor, View};

use super::operations::{Shape, fit, fit_columns, fit_factors};
use super::{Activation, AttentionShape, Backend, Channels, Compute, Gamma, NormKind, Rotation};
use crate::checkpoint::SourceTensor;
use crate::error::{Error, Result};
use crate::nvfp4::activation::quantize_dequantize;
use crate::nvfp4::{self, BLOCK, GlobalScale};
use crate::threads;

/// The CPU backend.
pub struct Cpu {
    compute: Compute,
    pool: ThreadPool,
}

/// Elements that one task of an elementwise operation or of quantizing takes: large against the cost of a
/// task, small against a matrix.
const CHUNK: usize = 1 << 16;

impl Cpu {
    /// A backend with `threads` threads.
    ///
    /// # Errors
    /// Exit code 5 where the threads can't be started.
    pub fn new(compute: Compute, threads: usize) -> Result<Cpu> {
        Ok(Cpu { compute, pool: threads::pool("compute", threads)? })
    }

    /// Which matrix kernel runs, for the report.
    pub fn kernel(&self) -> &'static str {
        match self.compute {
            Compute::Bf16 => gemm::kernel(),
            Compute::F32 => "f32",
        }
    }

    fn product(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) {
        match self.compute {
            Compute::Bf16 => self.product_into::<bf16>(x, w, bias, out),
            Compute::F32 => self.product_into::<f32>(x, w, bias, out),
        }
    }

    fn product_into<T: Scalar>(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) {
        debug_assert_eq!((x.cols, w.rows, x.rows), (w.cols, out.cols, out.rows), "shapes fit");
        let bias = bias.map(T::of);
        let (m, n, k) = (x.rows, w.rows, x.cols);
        let product = gemm::Product { m, n, k, x: x.view(), w: w.view() };
        let out = Disjoint::new(T::of_mut(out));
        self.pool.install(|| {
            product.run(&|row, col, sums| {
                // SAFETY: every run of columns of every row is finished once.
                let place = unsafe { out.range(row * n + col, sums.len()) };
                elementwise::finish(sums, bias.map(|bias| &bias[col..col + sums.len()]), place);
            });
        });
    }

    /// Calls `f` with equal parts of two slices, in parallel.
    fn zip<A: Send, B: Sync>(&self, a: &mut [A], b: &[B], f: impl Fn(&mut [A], &[B]) + Sync) {
        self.pool.install(|| {
            a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK)).for_each(|(a, b)| f(a, b));
        });
    }

    /// Calls `f` with parts of a slice, in parallel.
    fn each<A: Send>(&self, a: &mut [A], f: impl Fn(&mut [A]) + Send + Sync) {
        self.pool.install(|| a.par_chunks_mut(CHUNK).for_each(f));
    }

    fn norm_as<T: Scalar>(
        &self,
        x: &Tensor,
        kind: &NormKind,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        out: &mut Tensor,
    ) {
        let (cols, gamma, bias) = (x.cols, factors(self.compute, kind.gamma, weight, x.cols), bias.map(wide));
        self.pool.install(|| {
            let rows = T::of_mut(out).par_chunks_exact_mut(cols).zip(T::of(x).par_chunks_exact(cols));
            rows.with_min_len(16)
                .for_each(|(out, x)| elementwise::norm(x, kind, &gamma, bias.as_deref(), out));
        });
    }

    fn norm_heads_as<T: Scalar>(&self, x: &mut Tensor, dim: usize, kind: &NormKind, weight: Option<&Tensor>) {
        let (cols, gamma) = (x.cols, factors(self.compute, kind.gamma, weight, dim));
        self.pool.install(|| {
            let rows = T::of_mut(x).par_chunks_exact_mut(cols).with_min_len(16);
            rows.for_each_init(
                || vec![T::round(0.0); dim],
                |before, row| {
                    for (head, gamma) in row.chunks_exact_mut(dim).zip(gamma.chunks_exact(dim).cycle()) {
                        before.copy_from_slice(head);
                        elementwise::norm(before, kind, gamma, None, head);
                    }
                },
            );
        });
    }

    fn quantize_input_as<T: Scalar>(&self, x: &mut Tensor, input: GlobalScale) {
        let cols = x.cols;
        self.pool.install(|| {
            T::of_mut(x).par_chunks_exact_mut(cols).with_min_len(16).for_each_init(
                || vec![0.0; cols],
                |wide, row| {
                    wide.iter_mut().zip(&*row).for_each(|(wide, x)| *wide = x.get());
                    quantize_dequantize(wide, input);
                    row.iter_mut().zip(wide).for_each(|(x, wide)| *x = T::round(*wide));
                },
            );
        });
    }

    fn rope_as<T: Scalar>(
        &self,
        x: &mut Tensor,
        rotation: &Rotation,
        cos: &Tensor,
        sin: &Tensor,
        rows: &[u32],
    ) {
        let (cols, pairs) = (x.cols, cos.cols);
        self.pool.install(|| {
            let tokens = T::of_mut(x).par_chunks_exact_mut(cols).zip(rows.par_iter());
            tokens.with_min_len(16).for_each_init(
                || (vec![0f32; pairs], vec![0f32; pairs]),
                |(c, s), (token, &row)| {
                    row_of(cos, row as usize, c);
                    row_of(sin, row as usize, s);
                    for head in token.chunks_exact_mut(rotation.head_dim) {
                        elementwise::rotate(head, c, s, rotation);
                    }
                },
            );
        });
    }

    fn attention_as<T: Attend>(
        &self,
        [q, k, v]: [&Tensor; 3],
        bounds: &[u32],
        shape: &AttentionShape,
        sinks: Option<&Tensor>,
        out: &mut Tensor,
    ) {
        let (sinks, out) = (sinks.map(T::of), T::of_mut(out));
        self.pool.install(|| attention::attention([q, k, v].map(T::of), bounds, shape, sinks, out));
    }

    fn activate_mul_as<T: Scalar>(&self, gate: &mut Tensor, up: &Tensor, activation: Activation) {
        let one = |gate: &mut [T], up: &[T]| elementwise::activate_mul(gate, up, activation);
        self.zip(T::of_mut(gate), T::of(up), one);
    }

    fn activate_as<T: Scalar>(&self, x: &mut Tensor, activation: Activation) {
        self.each(T::of_mut(x), |x| elementwise::activate(x, activation));
    }

    fn gate_by_sigmoid_as<T: Scalar>(&self, x: &mut Tensor, gate: &Tensor) {
        self.zip(T::of_mut(x), T::of(gate), elementwise::gate_by_sigmoid);
    }

    fn multiply_as<T: Scalar>(&self, x: &mut Tensor, factor: f32) {
        self.each(T::of_mut(x), |x| elementwise::multiply(x, factor));
    }

    fn multiply_rows_as<T: Scalar>(&self, x: &mut Tensor, factors: &Tensor, rows: &[u32]) {
        let (cols, factors) = (x.cols, T::of(factors));
        self.pool.install(|| {
            let tokens = T::of_mut(x).par_chunks_exact_mut(cols).zip(rows.par_iter());
            tokens
                .with_min_len(16)
                .for_each(|(token, &row)| elementwise::multiply(token, factors[row as usize].get()));
        });
    }

    fn softcap_as<T: Scalar>(&self, x: &mut Tensor, cap: f32) {
        self.each(T::of_mut(x), |x| elementwise::softcap(x, cap));
    }

    fn copy_columns_as<T: Scalar>(&self, from: &Tensor, first: usize, to: &mut Tensor) {
        let (all, part) = (from.cols, to.cols);
        self.pool.install(|| {
            let rows = T::of_mut(to).par_chunks_exact_mut(part).zip(T::of(from).par_chunks_exact(all));
            rows.with_min_len(16).for_each(|(to, from)| to.copy_from_slice(&from[first..first + part]));
        });
    }

    fn embed_as<T: Scalar>(&self, table: &Tensor, ids: &[u32], out: &mut Tensor) {
        let cols = table.cols;
        let row = |(out, &id): (&mut [T], &u32)| {
            let at = id as usize * cols..(id as usize + 1) * cols;
            match table.view() {
                View::Bf16(table) => out.iter_mut().zip(&table[at]).for_each(|(o, x)| *o = T::round(x.get())),
                View::F32(table) => out.iter_mut().zip(&table[at]).for_each(|(o, x)| *o = T::round(*x)),
            }
        };
        let rows = T::of_mut(out).par_chunks_exact_mut(cols).zip(ids.par_iter());
        self.pool.install(|| rows.with_min_len(16).for_each(row));
    }

    fn quantize_as<E: nvfp4::Element>(
        &self,
        w: &[E],
        global: GlobalScale,
        codes: &mut [u8],
        scales: &mut [u8],
    ) {
        self.pool.install(|| {
            w.par_chunks(CHUNK)
                .zip(codes.par_chunks_mut(CHUNK / 2))
                .zip(scales.par_chunks_mut(CHUNK / BLOCK))
                .for_each(|((w, codes), scales)| nvfp4::quantize(w, global, codes, scales));
        });
    }

    fn amax_as<E: nvfp4::Element>(&self, w: &[E]) -> f32 {
        let max = |a: f32, b: f32| if a.is_nan() || a > b { a } else { b };
        self.pool.install(|| w.par_chunks(CHUNK).map(nvfp4::amax).reduce(|| 0.0, max))
    }
}

/// Rows and columns.
fn shape(x: &Tensor) -> Shape {
    (x.rows, x.cols)
}

/// A matrix's values.
fn wide(x: &Tensor) -> Vec<f32> {
    match x.view() {
        View::Bf16(x) => x.iter().map(|x| x.get()).collect(),
        View::F32(x) => x.to_vec(),
    }
}

/// One row's values.
fn row_of(x: &Tensor, row: usize, to: &mut [f32]) {
    let at = row * x.cols..(row + 1) * x.cols;
    match x.view() {
        View::Bf16(x) => to.iter_mut().zip(&x[at]).for_each(|(to, x)| *to = x.get()),
        View::F32(x) => to.copy_from_slice(&x[at]),
    }
}

/// What normalized values are multiplied with: as many as the weight has, `n` without one.
fn factors(compute: Compute, gamma: Gamma, weight: Option<&Tensor>, n: usize) -> Vec<f32> {
    let mut factors = weight.map_or_else(|| vec![1.0; n], wide);
    match (gamma, compute) {
        (Gamma::Weight | Gamma::One, _) => {}
        (Gamma::OnePlusRounded, Compute::Bf16) => {
            factors.iter_mut().for_each(|w| *w = <bf16 as Scalar>::round(1.0 + *w).get());
        }
        (Gamma::OnePlus | Gamma::OnePlusRounded, _) => factors.iter_mut().for_each(|w| *w += 1.0),
    }
    factors
}

/// Runs a generic method with the activation type of the compute dtype.
macro_rules! as_compute {
    ($self:ident, $method:ident($($arg:expr),*)) => {
        match $self.compute {
            Compute::Bf16 => $self.$method::<bf16>($($arg),*),
            Compute::F32 => $self.$method::<f32>($($arg),*),
        }
    };
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Index = Vec<u32>;
    type Amax = Vec<f32>;
    type Sums = Sums;
    type Moment = Instant;

    fn compute(&self) -> Compute {
        self.compute
    }

    fn moment(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn seconds(&self, earlier: &Instant, later: &Instant) -> Result<f64> {
        Ok((*later - *earlier).as_secs_f64())
    }

    fn load(&self, source: &SourceTensor) -> Result<Tensor> {
        Tensor::from_source(self.compute, source)
    }

    fn activation(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Ok(Tensor::zeros(self.compute, rows, cols))
    }

    fn set_rows(&self, x: &mut Tensor, rows: usize) {
        assert!(rows <= x.capacity(), "{rows} rows in a matrix of {}", x.capacity());
        x.rows = rows;
    }

    fn upload(&self, bytes: &[u8], x: &mut Tensor) -> Result<()> {
        let place: &mut [u8] = match self.compute {
            Compute::Bf16 => bytemuck::cast_slice_mut(bf16::of_mut(x)),
            Compute::F32 => bytemuck::cast_slice_mut(f32::of_mut(x)),
        };
        if bytes.len() != place.len() {
            return Err(Error::run(format!(
                "a hidden state of {} bytes where {} belong",
                bytes.len(),
                place.len()
            )));
        }
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn arrived(&self, bytes: &[u8], cols: usize) -> Result<Tensor> {
        let rows = bytes.len() / (cols * self.compute.bytes()).max(1);
        let mut x = self.activation(rows, cols)?;
        self.upload(bytes, &mut x)?;
        Ok(x)
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        match self.compute {
            Compute::Bf16 => bf16::of_mut(to).copy_from_slice(bf16::of(from)),
            Compute::F32 => f32::of_mut(to).copy_from_slice(f32::of(from)),
        }
        Ok(())
    }

    fn download_as_of(&self, _: &Instant, x: &Tensor, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        bytes.extend_from_slice(match x.view() {
            View::Bf16(x) => bytemuck::cast_slice(x),
            View::F32(x) => bytemuck::cast_slice(x),
        });
        Ok(())
    }

    fn index(&self, values: &[u32]) -> Result<Vec<u32>> {
        Ok(values.to_vec())
    }

    fn constant(&self, values: &[f32], cols: usize) -> Result<Tensor> {
        Ok(Tensor::from_f32(self.compute, values, cols))
    }

    fn exact_constant(&self, values: &[f32], cols: usize) -> Result<Tensor> {
        Ok(Tensor::from_f32(Compute::F32, values, cols))
    }

    fn embed(&self, table: &Tensor, ids: &Vec<u32>, out: &mut Tensor) -> Result<()> {
        as_compute!(self, embed_as(table, ids, out));
        Ok(())
    }

    fn norm(
        &self,
        x: &Tensor,
        kind: &NormKind,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        kind.fit(shape(x), x.cols, weight.map(shape), bias.map(shape), shape(out))?;
        as_compute!(self, norm_as(x, kind, weight, bias, out));
        Ok(())
    }

    fn norm_heads(&self, x: &mut Tensor, dim: usize, kind: &NormKind, weight: Option<&Tensor>) -> Result<()> {
        kind.fit(shape(x), dim, weight.map(shape), None, shape(x))?;
        as_compute!(self, norm_heads_as(x, dim, kind, weight));
        Ok(())
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        self.product(x, weight, bias, out);
        Ok(())
    }

    fn rope(
        &self,
        x: &mut Tensor,
        rotation: &Rotation,
        cos: &Tensor,
        sin: &Tensor,
        rows: &Vec<u32>,
    ) -> Result<()> {
        rotation.fit(shape(x), shape(cos), shape(sin), rows)?;
        as_compute!(self, rope_as(x, rotation, cos, sin, rows));
        Ok(())
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        bounds: &Vec<u32>,
        how: &AttentionShape,
        sinks: Option<&Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        how.fit([shape(q), shape(k), shape(v), shape(out)], bounds, sinks.map(shape))?;
        as_compute!(self, attention_as([q, k, v], bounds, how, sinks, out));
        Ok(())
    }

    fn activate_mul(&self, gate: &mut Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        fit("activate_mul", shape(gate) == shape(up), &(shape(gate), shape(up)))?;
        as_compute!(self, activate_mul_as(gate, up, activation));
        Ok(())
    }

    fn activate(&self, x: &mut Tensor, activation: Activation) -> Result<()> {
        as_compute!(self, activate_as(x, activation));
        Ok(())
    }

    fn gate_by_sigmoid(&self, x: &mut Tensor, gate: &Tensor) -> Result<()> {
        fit("gate_by_sigmoid", shape(x) == shape(gate), &(shape(x), shape(gate)))?;
        as_compute!(self, gate_by_sigmoid_as(x, gate));
        Ok(())
    }

    fn multiply(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        as_compute!(self, multiply_as(x, factor));
        Ok(())
    }

    fn multiply_rows(&self, x: &mut Tensor, factors: &Tensor, rows: &Vec<u32>) -> Result<()> {
        fit_factors(shape(x), shape(factors), rows)?;
        as_compute!(self, multiply_rows_as(x, factors, rows));
        Ok(())
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        as_compute!(self, softcap_as(x, cap));
        Ok(())
    }

    fn copy_columns(&self, from: &Tensor, first: usize, to: &mut Tensor) -> Result<()> {
        fit_columns(shape(from), first, shape(to))?;
        as_compute!(self, copy_columns_as(from, first, to));
        Ok(())
    }

    fn quantize_input(&self, x: &mut Tensor, input: GlobalScale) -> Result<()> {
        as_compute!(self, quantize_input_as(x, input));
        Ok(())
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        match self.compute {
            Compute::Bf16 => self.zip(bf16::of_mut(x), bf16::of(y), elementwise::add),
            Compute::F32 => self.zip(f32::of_mut(x), f32::of(y), elementwise::add),
        }
        Ok(())
    }

    fn amax(&self, slots: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; slots])
    }

    fn observe(&self, x: &Tensor, amax: &mut Vec<f32>, slot: usize) -> Result<()> {
        let seen = self.weight_amax(x)?;
        if seen.is_nan() || seen > amax[slot] {
            amax[slot] = seen;
        }
        Ok(())
    }

    fn read_amax(&self, amax: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(amax.clone())
    }

    fn sums(&self, cols: usize, products: bool, _: [usize; 2]) -> Result<Sums> {
        Ok(sums::empty(cols, products))
    }

    fn add_rows(&self, x: &Tensor, rows: &Vec<u32>, role: usize, sums: &mut Sums) -> Result<()> {
        let to = &mut sums.rows[role];
        for &row in rows {
            let at = row as usize * x.cols..(row as usize + 1) * x.cols;
            match x.view() {
                View::Bf16(x) => to.extend(x[at].iter().map(|x| x.get())),
                View::F32(x) => to.extend_from_slice(&x[at]),
            }
        }
        Ok(())
    }

    fn add_channels(&self, x: &Tensor, sums: &mut Sums) -> Result<()> {
        self.pool.install(|| match x.view() {
            View::Bf16(x) => sums::add_channels(x, sums),
            View::F32(x) => sums::add_channels(x, sums),
        });
        Ok(())
    }

    fn add_products(&self, x: &Tensor, sums: &mut Sums) -> Result<()> {
        self.pool.install(|| sums::add_products(x, &mut sums.products));
        Ok(())
    }

    fn read_channels(&self, sums: &Sums) -> Result<Channels> {
        Ok(Channels { amax: sums.amax.clone(), squares: sums.squares.clone() })
    }

    fn values(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(self.pool.install(|| match x.view() {
            View::Bf16(x) => x.par_iter().map(|x| x.get()).collect(),
            View::F32(x) => x.par_iter().copied().collect(),
        }))
    }

    fn weight_amax(&self, weight: &Tensor) -> Result<f32> {
        Ok(match weight.view() {
            View::Bf16(w) => self.amax_as(w),
            View::F32(w) => self.amax_as(w),
        })
    }

    fn quantize(
        &self,
        weight: &Tensor,
        global: GlobalScale,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<()> {
        match weight.view() {
            View::Bf16(w) => self.quantize_as(w, global, codes, scales),
            View::F32(w) => self.quantize_as(w, global, codes, scales),
        }
        Ok(())
    }
}
