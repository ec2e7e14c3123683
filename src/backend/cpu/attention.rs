//! Causal attention inside each document, a block of queries at a time, so that memory grows with the
//! document's length and not with its square.

use rayon::prelude::*;

use super::elementwise::{finish, softmax};
use super::gemm;
use super::shared::Disjoint;
use super::tensor::Scalar;
use crate::backend::Heads;

/// Queries that share one product with the keys.
const QUERIES: usize = 128;

/// An activation type with small products of its own.
pub trait Attend: Scalar {
    /// `out [m, n] = x [m, k] · wᵀ [n, k]` with f32 sums.
    fn product(m: usize, n: usize, k: usize, x: &[Self], w: &[Self], out: &mut [f32]);
}

impl Attend for half::bf16 {
    fn product(m: usize, n: usize, k: usize, x: &[Self], w: &[Self], out: &mut [f32]) {
        gemm::small(m, n, k, x, w, out);
    }
}

impl Attend for f32 {
    fn product(m: usize, n: usize, k: usize, x: &[Self], w: &[Self], out: &mut [f32]) {
        gemm::small_f32(m, n, k, x, w, out);
    }
}

/// See [`crate::backend::Backend::attention`].
#[allow(clippy::too_many_arguments)]
pub fn attention<T: Attend>(
    q: &[T],
    k: &[T],
    v: &[T],
    bounds: &[u32],
    heads: Heads,
    scale: f32,
    window: Option<usize>,
    out: &mut [T],
) {
    let out = Disjoint::new(out);
    let documents = bounds.windows(2).map(|pair| (pair[0] as usize, pair[1] as usize));
    let tasks: Vec<(usize, usize, usize)> =
        documents.flat_map(|(from, to)| (0..heads.heads).map(move |head| (from, to, head))).collect();
    tasks.into_par_iter().for_each(|(from, to, head)| {
        let kv_head = head / (heads.heads / heads.kv_heads);
        let (q_cols, kv_cols) = (heads.heads * heads.dim, heads.kv_heads * heads.dim);
        let q = gather(q, from..to, q_cols, head * heads.dim, heads.dim);
        let k = gather(k, from..to, kv_cols, kv_head * heads.dim, heads.dim);
        let v = transposed(&gather(v, from..to, kv_cols, kv_head * heads.dim, heads.dim), heads.dim);
        one_head(&q, &k, &v, heads.dim, scale, window, &mut |row, values| {
            // SAFETY: this task alone writes this head of this document's rows.
            let place = unsafe { out.range((from + row) * q_cols + head * heads.dim, heads.dim) };
            finish(values, None, place);
        });
    });
}

/// One head's columns of some rows, contiguous.
fn gather<T: Scalar>(x: &[T], rows: std::ops::Range<usize>, cols: usize, first: usize, dim: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(rows.len() * dim);
    rows.for_each(|row| out.extend_from_slice(&x[row * cols + first..][..dim]));
    out
}

/// `[n, dim]` as `[dim, n]`.
fn transposed<T: Scalar>(x: &[T], dim: usize) -> Vec<T> {
    let n = x.len() / dim;
    let mut out = vec![T::round(0.0); x.len()];
    for (row, values) in x.chunks_exact(dim).enumerate() {
        for (col, value) in values.iter().enumerate() {
            out[col * n + row] = *value;
        }
    }
    out
}

/// Attention of one head over one document: `q`, `k` `[n, dim]`, `v` `[dim, n]`.
fn one_head<T: Attend>(
    q: &[T],
    k: &[T],
    v: &[T],
    dim: usize,
    scale: f32,
    window: Option<usize>,
    emit: &mut dyn FnMut(usize, &[f32]),
) {
    let n = q.len() / dim;
    let reach = window.unwrap_or(n);
    let zero = T::round(0.0);
    let (mut scores, mut probabilities, mut values, mut part) = (vec![], vec![], vec![], vec![]);
    for first in (0..n).step_by(QUERIES) {
        let last = n.min(first + QUERIES);
        // The keys that any query of this block sees.
        let start = (first + 1).saturating_sub(reach);
        let (rows, width) = (last - first, last - start);
        scores.resize(rows * width, 0.0);
        T::product(rows, width, dim, &q[first * dim..last * dim], &k[start * dim..last * dim], &mut scores);
        probabilities.clear();
        probabilities.resize(rows * width, zero);
        let mut sums = [0f32; QUERIES];
        for (row, sum) in sums[..rows].iter_mut().enumerate() {
            let query = first + row;
            let seen = (query + 1).saturating_sub(reach).max(start) - start..query + 1 - start;
            let at = row * width + seen.start..row * width + seen.end;
            *sum = softmax(&scores[at.clone()], scale, &mut probabilities[at]);
        }
        part.clear();
        (0..dim).for_each(|col| part.extend_from_slice(&v[col * n + start..col * n + last]));
        values.resize(rows * dim, 0.0);
        T::product(rows, dim, width, &probabilities, &part, &mut values);
        for (row, values) in values.chunks_exact_mut(dim).enumerate() {
            values.iter_mut().for_each(|value| *value /= sums[row]);
            emit(first + row, values);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| bf16::from_f32(((i as f32 + 1.0) * seed).sin() * 2.0).to_f32()).collect()
    }

    /// The definition, in f64.
    fn slow(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        bounds: &[u32],
        h: Heads,
        scale: f32,
        window: usize,
    ) -> Vec<f64> {
        let (q_cols, kv_cols) = (h.heads * h.dim, h.kv_heads * h.dim);
        let mut out = vec![0.0; q.len()];
        for document in bounds.windows(2) {
            for i in document[0] as usize..document[1] as usize {
                for head in 0..h.heads {
                    let kv = head * h.kv_heads / h.heads * h.dim;
                    let dot = |j: usize| -> f64 {
                        (0..h.dim)
                            .map(|c| q[i * q_cols + head * h.dim + c] as f64 * k[j * kv_cols + kv + c] as f64)
                            .sum()
                    };
                    let seen: Vec<usize> = (document[0] as usize..=i).filter(|&j| j + window > i).collect();
                    let weights: Vec<f64> = seen.iter().map(|&j| (dot(j) * scale as f64).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for c in 0..h.dim {
                        let value: f64 =
                            seen.iter().zip(&weights).map(|(&j, w)| w * v[j * kv_cols + kv + c] as f64).sum();
                        out[i * q_cols + head * h.dim + c] = value / sum;
                    }
                }
            }
        }
        out
    }

    fn error<T: Attend>(bounds: &[u32], heads: Heads, window: Option<usize>) -> f64 {
        let n = *bounds.last().unwrap() as usize;
        let (q, k, v) = (
            values(n * heads.heads * heads.dim, 0.7),
            values(n * heads.kv_heads * heads.dim, 1.3),
            values(n * heads.kv_heads * heads.dim, 2.1),
        );
        let cast = |x: &[f32]| -> Vec<T> { x.iter().map(|&x| T::round(x)).collect() };
        let mut out = vec![T::round(f32::NAN); q.len()];
        attention(&cast(&q), &cast(&k), &cast(&v), bounds, heads, 0.4, window, &mut out);
        let exact = slow(&q, &k, &v, bounds, heads, 0.4, window.unwrap_or(usize::MAX / 2));
        let difference: f64 = out.iter().zip(&exact).map(|(a, b)| (a.get() as f64 - b).powi(2)).sum();
        (difference / exact.iter().map(|b| b * b).sum::<f64>()).sqrt()
    }

    #[test]
    fn documents_heads_and_windows() {
        let grouped = Heads { heads: 4, kv_heads: 2, dim: 8 };
        let odd = Heads { heads: 3, kv_heads: 1, dim: 10 };
        for (bounds, heads, window) in [
            (&[0, 1][..], grouped, None),
            (&[0, 5, 6, 30], grouped, None),
            (&[0, 300], odd, None),
            (&[0, 300], odd, Some(1)),
            (&[0, 40, 340], grouped, Some(17)),
            (&[0, 260], grouped, Some(200)),
        ] {
            assert!(error::<f32>(bounds, heads, window) < 1e-5, "{bounds:?} {window:?}");
            assert!(error::<bf16>(bounds, heads, window) < 6e-3, "{bounds:?} {window:?}");
        }
    }
}
