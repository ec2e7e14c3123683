//! Causal attention inside each document, a block of queries at a time, so that memory grows with the
//! document's length and not with its square.

use rayon::prelude::*;

use super::elementwise::{cap_scores, exp, finish, softmax};
use super::gemm;
use super::shared::Disjoint;
use super::tensor::Scalar;
use crate::backend::AttentionShape;

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
pub fn attention<T: Attend>(
    [q, k, v]: [&[T]; 3],
    bounds: &[u32],
    shape: &AttentionShape,
    sinks: Option<&[T]>,
    out: &mut [T],
) {
    let heads = shape.heads;
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
        let sink = sinks.map(|sinks| sinks[head].get());
        one_head([&q, &k, &v], shape, sink, &mut |row, values| {
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
    [q, k, v]: [&[T]; 3],
    shape: &AttentionShape,
    sink: Option<f32>,
    emit: &mut dyn FnMut(usize, &[f32]),
) {
    let dim = shape.heads.dim;
    let n = q.len() / dim;
    let reach = shape.window.unwrap_or(n);
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
            *sum = weigh(&mut scores[at.clone()], shape, sink, &mut probabilities[at]);
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

/// Turns the scores of one query into unnormalized probabilities, and returns what they and the sink add up to.
fn weigh<T: Scalar>(
    scores: &mut [f32],
    shape: &AttentionShape,
    sink: Option<f32>,
    probabilities: &mut [T],
) -> f32 {
    let mut scale = shape.scale;
    if let Some(cap) = shape.softcap {
        cap_scores(scores, scale, cap);
        scale = 1.0;
    }
    let (sum, max) = softmax(scores, scale, probabilities);
    // The largest score counts 1, so nothing overflows: a sink that saturates leaves the values nothing.
    sum + sink.map_or(0.0, |sink| exp(sink - scale * max))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::Heads;

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| bf16::from_f32(((i as f32 + 1.0) * seed).sin() * 2.0).to_f32()).collect()
    }

    /// The definition, in f64.
    fn slow(
        [q, k, v]: [&[f32]; 3],
        bounds: &[u32],
        shape: &AttentionShape,
        sinks: Option<&[f32]>,
    ) -> Vec<f64> {
        let (h, window) = (shape.heads, shape.window.unwrap_or(usize::MAX / 2));
        let (q_cols, kv_cols) = (h.heads * h.dim, h.kv_heads * h.dim);
        let mut out = vec![0.0; q.len()];
        for document in bounds.windows(2) {
            for i in document[0] as usize..document[1] as usize {
                for head in 0..h.heads {
                    let kv = head * h.kv_heads / h.heads * h.dim;
                    let score = |j: usize| -> f64 {
                        let dot: f64 = (0..h.dim)
                            .map(|c| q[i * q_cols + head * h.dim + c] as f64 * k[j * kv_cols + kv + c] as f64)
                            .sum();
                        let scaled = dot * shape.scale as f64;
                        shape.softcap.map_or(scaled, |cap| cap as f64 * (scaled / cap as f64).tanh())
                    };
                    let seen: Vec<usize> = (document[0] as usize..=i).filter(|&j| j + window > i).collect();
                    let weights: Vec<f64> = seen.iter().map(|&j| score(j).exp()).collect();
                    let sink = sinks.map_or(0.0, |sinks| (sinks[head] as f64).exp());
                    let sum = weights.iter().sum::<f64>() + sink;
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

    fn error<T: Attend>(bounds: &[u32], shape: &AttentionShape, sinks: Option<&[f32]>) -> f64 {
        let (n, heads) = (*bounds.last().unwrap() as usize, shape.heads);
        let (q, k, v) = (
            values(n * heads.heads * heads.dim, 0.7),
            values(n * heads.kv_heads * heads.dim, 1.3),
            values(n * heads.kv_heads * heads.dim, 2.1),
        );
        let cast = |x: &[f32]| -> Vec<T> { x.iter().map(|&x| T::round(x)).collect() };
        let mut out = vec![T::round(f32::NAN); q.len()];
        let given = [&q[..], &k, &v];
        let [a, b, c] = given.map(cast);
        attention([&a, &b, &c], bounds, shape, sinks.map(cast).as_deref(), &mut out);
        let exact = slow(given, bounds, shape, sinks);
        let difference: f64 = out.iter().zip(&exact).map(|(a, b)| (a.get() as f64 - b).powi(2)).sum();
        (difference / exact.iter().map(|b| b * b).sum::<f64>()).sqrt()
    }

    fn check(bounds: &[u32], shape: &AttentionShape, sinks: Option<&[f32]>) {
        assert!(error::<f32>(bounds, shape, sinks) < 1e-5, "{bounds:?} {shape:?} {sinks:?}");
        assert!(error::<bf16>(bounds, shape, sinks) < 6e-3, "{bounds:?} {shape:?} {sinks:?}");
    }

    fn shape(heads: usize, kv_heads: usize, dim: usize) -> AttentionShape {
        AttentionShape { heads: Heads { heads, kv_heads, dim }, scale: 0.4, window: None, softcap: None }
    }

    #[test]
    fn documents_heads_and_windows() {
        let (grouped, odd) = (shape(4, 2, 8), shape(3, 1, 10));
        for (bounds, plain, window) in [
            (&[0, 1][..], grouped, None),
            (&[0, 5, 6, 30], grouped, None),
            (&[0, 300], odd, None),
            (&[0, 300], odd, Some(1)),
            (&[0, 40, 340], grouped, Some(17)),
            (&[0, 260], grouped, Some(200)),
        ] {
            check(bounds, &AttentionShape { window, ..plain }, None);
        }
    }

    #[test]
    fn softcaps_sinks_and_wide_heads() {
        for dim in [6, 64, 80, 96, 128, 256, 512] {
            let plain = AttentionShape { scale: (dim as f32).powf(-0.5), ..shape(2, 1, dim) };
            check(&[0, 5, 140], &plain, None);
            let capped = AttentionShape { softcap: Some(1.5), window: Some(33), ..plain };
            check(&[0, 5, 140], &capped, None);
            check(&[0, 5, 140], &capped, Some(&[0.75, -3.0]));
            check(&[0, 5, 140], &plain, Some(&[2.5, 0.0]));
        }
    }

    /// A sink that outweighs every key by more than f32 can say leaves nothing.
    #[test]
    fn a_sink_can_take_everything() {
        let mut out = [f32::NAN; 8];
        attention([&[1.0; 8], &[1.0; 8], &[3.0; 8]], &[0, 1], &shape(1, 1, 8), Some(&[400.0]), &mut out);
        assert!(out.iter().all(|x| x.abs() < 1e-30), "{out:?}");
    }
}
