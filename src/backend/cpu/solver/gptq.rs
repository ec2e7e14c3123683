//! GPTQ with one Cholesky factor and no inverse: rounding errors of a column are made good by the columns
//! that follow.
//!
//! With `H + λI = Uᵀ·U` (U upper) and `e = w − q` a row's loss splits into columns:
//!
//! ```text
//! e · (H + λI) · eᵀ = Σ_t U_tt² (target_t − q_t)²      target_t = w_t + (Σ_{j>t} U_tj e_j) / U_tt
//! ```
//!
//! so columns are visited from the last to the first, and each is a plain rounding of its target. The codes
//! are those of the published algorithm (arXiv 2210.17323: inverse, second Cholesky) in the opposite order.
//! A block's scale is chosen when its first column is visited, by exact search on the sixteen targets with the
//! weights `U_tt²`. The blocks with the largest inputs go last, that is, are rounded first; blocks stay whole,
//! so columns return to their places and no loader needs an order.

use rayon::prelude::*;

use super::super::gemm::{Matrix, gemm};
use super::dense::cholesky;
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear, best_scale, e2m1, e4m3};
use crate::simd::wide;

/// Columns whose mutual feedback is applied one at a time; what comes from further right is a matrix product.
const PANEL: usize = 64;

/// Rows that one task takes: enough for the product, few enough to stay in cache.
const ROWS: usize = 64;

/// The factor of a damped Hessian in the order in which columns are visited.
pub struct Factor {
    /// `L = Uᵀ` `[n, n]`, lower.
    l: Vec<f32>,
    /// The original column at each place.
    order: Vec<usize>,
}

impl Factor {
    /// Factors `h + lambda · I` `[n, n]`, rows and columns in `order`; none where a pivot is not positive.
    pub fn new(h: &[f32], order: &[u32], lambda: f32) -> Option<Factor> {
        let n = order.len();
        let order: Vec<usize> = order.iter().map(|&column| column as usize).collect();
        let mut l = vec![0.0; n * n];
        l.par_chunks_mut(n).zip(&order).for_each(|(row, &i)| {
            row.iter_mut().zip(&order).for_each(|(to, &j)| *to = h[i * n + j]);
        });
        (0..n).for_each(|i| l[i * n + i] += lambda);
        cholesky(&mut l, n).ok().map(|()| Factor { l, order })
    }

    /// Quantizes the rows of `w` `[rows, n]`.
    pub fn quantize(&self, w: &[f32], global: GlobalScale) -> QuantizedLinear {
        let n = self.order.len();
        let mut codes = vec![0; w.len() / 2];
        let mut scales = vec![0; w.len() / BLOCK];
        w.par_chunks(ROWS * n)
            .zip(codes.par_chunks_mut(ROWS * n / 2))
            .zip(scales.par_chunks_mut(ROWS * n / BLOCK))
            .for_each(|((w, codes), scales)| {
                let places = |w: &[f32]| self.order.iter().map(|&i| w[i]).collect::<Vec<_>>();
                let w: Vec<f32> = w.chunks_exact(n).flat_map(places).collect();
                self.quantize_rows(&w, global, codes, scales);
            });
        QuantizedLinear { codes, scales }
    }

    /// The rows of one task, their columns already in the factor's order.
    fn quantize_rows(&self, w: &[f32], global: GlobalScale, codes: &mut [u8], scales: &mut [u8]) {
        let n = self.order.len();
        let rows = w.len() / n;
        let mut errors = vec![0.0; rows * n];
        let mut feedback = vec![0.0; rows * PANEL];
        let mut panel = Panel { code: vec![0; rows * PANEL], scale: vec![0; rows * PANEL / BLOCK] };
        for first in (0..n).step_by(PANEL).rev() {
            let width = PANEL.min(n - first);
            let right = first + width;
            feedback.fill(0.0);
            if right < n {
                let errors = Matrix::new(&errors[right..], rows, n - right, n);
                let l = Matrix::new(&self.l[right * n + first..], n - right, width, n);
                gemm(1.0, errors, l, 0.0, &mut feedback, PANEL);
            }
            round_panel(&self.l, n, first, width, w, global, &mut feedback, &mut errors, &mut panel);
            for row in 0..rows {
                for at in 0..width {
                    let column = self.order[first + at];
                    let code = panel.code[row * PANEL + at];
                    codes[(row * n + column) / 2] |= if column.is_multiple_of(2) { code } else { code << 4 };
                }
                for block in 0..width / BLOCK {
                    let column = self.order[first + block * BLOCK];
                    scales[(row * n + column) / BLOCK] = panel.scale[row * PANEL / BLOCK + block];
                }
            }
        }
    }
}

/// What was chosen for a panel's columns, in the factor's order.
struct Panel {
    code: Vec<u8>,
    scale: Vec<u8>,
}

wide! {
    #[allow(clippy::too_many_arguments)]
    fn round_panel(
        l: &[f32],
        n: usize,
        first: usize,
        width: usize,
        w: &[f32],
        global: GlobalScale,
        feedback: &mut [f32],
        errors: &mut [f32],
        panel: &mut Panel,
    ) => round_panel_body
}

/// Rounds columns `first..first + width` of all rows, from right to left. `feedback` holds what the columns to
/// the right contribute to `R_t = Σ_{j>t} U_tj e_j`.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn round_panel_body(
    l: &[f32],
    n: usize,
    first: usize,
    width: usize,
    w: &[f32],
    global: GlobalScale,
    feedback: &mut [f32],
    errors: &mut [f32],
    panel: &mut Panel,
) {
    let rows = w.chunks_exact(n).zip(errors.chunks_exact_mut(n)).zip(feedback.chunks_exact_mut(PANEL));
    for (row, ((w, errors), feedback)) in rows.enumerate() {
        for block in (0..width / BLOCK).rev() {
            let start = block * BLOCK;
            let mut targets = [0f32; BLOCK];
            let mut importance = [0f32; BLOCK];
            for i in 0..BLOCK {
                let t = first + start + i;
                let pivot = l[t * n + t];
                targets[i] = w[t] + feedback[start + i] / pivot;
                importance[i] = pivot * pivot;
            }
            let scale = best_scale(&targets, &importance, global);
            let step = e4m3::decode(scale) * global.multiplier();
            panel.scale[row * PANEL / BLOCK + block] = scale;
            for i in (0..BLOCK).rev() {
                let (at, t) = (start + i, first + start + i);
                let code = e2m1::encode((w[t] + feedback[at] / l[t * n + t]) / step);
                let error = w[t] - e2m1::decode(code) * step;
                panel.code[row * PANEL + at] = code;
                errors[t] = error;
                for (sum, l) in feedback[..at].iter_mut().zip(&l[t * n + first..][..at]) {
                    *sum += error * l;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::dense::tests::{noise, second_moments};
    use super::*;
    use crate::nvfp4::amax;

    /// Inputs whose channels differ in size and depend on each other.
    fn inputs(rows: usize, n: usize) -> Vec<f32> {
        let mut x = noise(rows * n, 5);
        for row in x.chunks_exact_mut(n) {
            for i in 1..n {
                row[i] = (0.7 * row[i - 1] + row[i]) * if i % 11 == 0 { 3.0 } else { 1.0 } / 1.3;
            }
        }
        x
    }

    /// `Σ_rows e · H · eᵀ`, H damped.
    fn loss(e: &[f32], h: &[f32], n: usize, lambda: f64) -> f64 {
        let quadratic = |e: &[f32]| -> f64 {
            let rows = (0..n).map(|i| {
                let dot: f64 = (0..n).map(|j| h[i * n + j] as f64 * e[j] as f64).sum();
                e[i] as f64 * (dot + lambda * e[i] as f64)
            });
            rows.sum()
        };
        e.chunks_exact(n).map(quadratic).sum()
    }

    /// Any order that keeps blocks whole does: from the smallest column of a block to its largest.
    fn factor(h: &[f32], n: usize) -> Factor {
        let mut order: Vec<u32> = (0..n as u32).collect();
        let at = |i: &u32| h[*i as usize * (n + 1)];
        order.sort_by(|a, b| (a / 16 % 3, a / 16).cmp(&(b / 16 % 3, b / 16)).then(at(a).total_cmp(&at(b))));
        Factor::new(h, &order, (0.05 * mean_diagonal(h, n)) as f32).expect("damping mends a singular Hessian")
    }

    fn mean_diagonal(h: &[f32], n: usize) -> f64 {
        (0..n).map(|i| h[i * n + i] as f64).sum::<f64>() / n as f64
    }

    /// The published algorithm, slowly and in f64: invert, and after each column push its error into the
    /// columns that follow, in the given order, with given scales.
    fn textbook(w: &[f32], h: &[f32], n: usize, lambda: f64, visit: &[usize], step: &[f32]) -> Vec<f32> {
        let mut inverse = inverse(h, n, lambda);
        let mut w: Vec<f64> = w.iter().map(|&w| w as f64).collect();
        let mut q = vec![0.0; n];
        let mut left: Vec<usize> = visit.to_vec();
        for &t in visit {
            left.retain(|&j| j != t);
            q[t] = e2m1::decode(e2m1::encode((w[t] / step[t] as f64) as f32)) * step[t];
            let error = (w[t] - q[t] as f64) / inverse[t * n + t];
            left.iter().for_each(|&j| w[j] -= error * inverse[t * n + j]);
            // The inverse of the Hessian without column t.
            let row: Vec<f64> = (0..n).map(|j| inverse[t * n + j]).collect();
            for i in 0..n {
                for j in 0..n {
                    inverse[i * n + j] -= row[i] * row[j] / row[t];
                }
            }
        }
        q
    }

    /// Gauss-Jordan.
    fn inverse(h: &[f32], n: usize, lambda: f64) -> Vec<f64> {
        let mut a: Vec<f64> = h.iter().map(|&h| h as f64).collect();
        (0..n).for_each(|i| a[i * n + i] += lambda);
        let mut b = vec![0.0; n * n];
        (0..n).for_each(|i| b[i * n + i] = 1.0);
        for i in 0..n {
            let pivot = a[i * n + i];
            (0..n).for_each(|j| (a[i * n + j] /= pivot, b[i * n + j] /= pivot).0);
            for r in (0..n).filter(|&r| r != i) {
                let factor = a[r * n + i];
                for j in 0..n {
                    a[r * n + j] -= factor * a[i * n + j];
                    b[r * n + j] -= factor * b[i * n + j];
                }
            }
        }
        b
    }

    #[test]
    fn codes_equal_the_textbook_in_the_same_order() {
        let n = 96;
        let h = second_moments(&inputs(400, n), n);
        let factor = factor(&h, n);
        let lambda = 0.05 * mean_diagonal(&h, n);
        let visit: Vec<usize> = factor.order.iter().rev().copied().collect();
        let w = noise(8 * n, 7);
        let global = GlobalScale::from_amax(amax(&w));
        let quantized = factor.quantize(&w, global);
        let ours = (quantized).values(n, global);
        for (row, w) in w.chunks_exact(n).enumerate() {
            let scale =
                |t: usize| e4m3::decode(quantized.scales[(row * n + t) / BLOCK]) * global.multiplier();
            let step: Vec<f32> = (0..n).map(scale).collect();
            assert_eq!(textbook(w, &h, n, lambda, &visit, &step), ours[row * n..][..n], "row {row}");
        }
    }

    #[test]
    fn the_loss_is_the_sum_over_targets() {
        let n = 160;
        let h = second_moments(&inputs(700, n), n);
        let factor = factor(&h, n);
        let w = noise(4 * n, 8);
        let global = GlobalScale::from_amax(amax(&w));
        let q = (factor.quantize(&w, global)).values(n, global);
        let e: Vec<f32> = w.iter().zip(&q).map(|(w, q)| w - q).collect();
        let direct = loss(&e, &h, n, 0.05 * mean_diagonal(&h, n));
        let by_targets: f64 = e
            .chunks_exact(n)
            .flat_map(|e| (0..n).map(move |t| (e, t)))
            .map(|(e, t)| {
                // U_tt (target − q) = Σ_{j>=t} U_tj e_j, with U = Lᵀ.
                let sum: f64 = (t..n).map(|j| factor.l[j * n + t] as f64 * e[factor.order[j]] as f64).sum();
                sum * sum
            })
            .sum();
        assert!((direct / by_targets - 1.0).abs() < 1e-4, "{direct} {by_targets}");
    }

    #[test]
    fn without_correlation_it_is_the_weighted_search() {
        let n = 64;
        let mut h = vec![0.0; n * n];
        (0..n).for_each(|i| h[i * n + i] = 1.0 + (i * 7 % 13) as f32);
        let factor = factor(&h, n);
        let damped = (0.05 * mean_diagonal(&h, n)) as f32;
        let importance: Vec<f32> = (0..n).map(|i| (h[i * n + i] + damped).sqrt().powi(2)).collect();
        let w = noise(6 * n, 9);
        let global = GlobalScale::from_amax(amax(&w));
        let quantized = factor.quantize(&w, global);
        let expected = QuantizedLinear::searched(&w, &importance, global);
        assert_eq!((quantized.codes, quantized.scales), (expected.codes, expected.scales));
    }

    #[test]
    fn it_loses_less_than_rounding_and_less_with_the_right_order() {
        let n = 192;
        let h = second_moments(&inputs(900, n), n);
        let w = noise(16 * n, 10);
        let global = GlobalScale::from_amax(amax(&w));
        let diagonal: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
        let error = |q: &[f32]| -> f64 {
            let e: Vec<f32> = w.iter().zip(q).map(|(w, q)| w - q).collect();
            loss(&e, &h, n, 0.0)
        };
        let max = error(&QuantizedLinear::max(&w, n, global).values(n, global));
        let searched = error(&QuantizedLinear::searched(&w, &diagonal, global).values(n, global));
        let gptq = error(&(factor(&h, n).quantize(&w, global)).values(n, global));
        assert!(gptq < 0.8 * searched && searched < max, "{gptq} {searched} {max}");
    }

    #[test]
    fn dead_channels_and_singular_statistics_are_rounded_plainly() {
        let n = 64;
        let mut x = inputs(20, n);
        x.chunks_exact_mut(n).for_each(|row| (row[3] = 0.0, row[40] = 2.0).0);
        let h = second_moments(&x, n);
        let factor = factor(&h, n);
        let w = noise(2 * n, 11);
        let global = GlobalScale::from_amax(amax(&w));
        let quantized = factor.quantize(&w, global);
        let q = (quantized).values(n, global);
        for row in 0..2 {
            let at = row * n + 3;
            let step = e4m3::decode(quantized.scales[at / BLOCK]) * global.multiplier();
            assert_eq!(
                q[at],
                e2m1::decode(e2m1::encode(w[at] / step)) * step,
                "a dead channel keeps its weight"
            );
        }
    }
}
