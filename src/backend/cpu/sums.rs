//! Sums over a site's inputs.

use rayon::prelude::*;

use super::gemm::Product;
use super::shared::Disjoint;
use super::tensor::{Scalar, Tensor, View};

/// Channels that one task takes.
const CHANNELS: usize = 64;

/// Running sums.
pub struct Sums {
    /// `max |x|` of each channel.
    pub amax: Vec<f32>,
    /// `Σ x²` of each channel.
    pub squares: Vec<f32>,
    /// `Σ xᵀ·x`, or nothing.
    pub products: Vec<f32>,
    /// Rows that are kept whole, by role.
    pub rows: [Vec<f32>; 2],
}

/// Nothing seen yet.
pub fn empty(cols: usize, products: bool) -> Sums {
    Sums {
        amax: vec![0.0; cols],
        squares: vec![0.0; cols],
        products: vec![0.0; if products { cols * cols } else { 0 }],
        rows: [vec![], vec![]],
    }
}

/// Adds rows to the sums by channel: every channel from the first row to the last.
pub fn add_channels<T: Scalar>(x: &[T], sums: &mut Sums) {
    let cols = sums.amax.len();
    let tasks = sums.amax.par_chunks_mut(CHANNELS).zip(sums.squares.par_chunks_mut(CHANNELS)).enumerate();
    tasks.for_each(|(task, (amax, squares))| {
        let first = task * CHANNELS;
        // One call's squares are summed apart, so that a long calibration adds few large terms.
        let mut mine = [0f32; CHANNELS];
        for row in x.chunks_exact(cols) {
            for ((x, amax), sum) in row[first..first + amax.len()].iter().zip(&mut *amax).zip(&mut mine) {
                let x = x.get().abs();
                *sum += x * x;
                // Bits of non-negative floats order like the floats, and NaN's are the largest.
                *amax = f32::from_bits(amax.to_bits().max(x.to_bits()));
            }
        }
        squares.iter_mut().zip(mine).for_each(|(sum, mine)| *sum += mine);
    });
}

/// `products += xᵀ · x`.
pub fn add_products(x: &Tensor, products: &mut [f32]) {
    match x.view() {
        View::Bf16(values) => add(View::Bf16(&transposed(values, x.cols)), x, products),
        View::F32(values) => add(View::F32(&transposed(values, x.cols)), x, products),
    }
}

fn add(channels: View<'_>, x: &Tensor, products: &mut [f32]) {
    let n = x.cols;
    let place = Disjoint::new(products);
    let product = Product { m: n, n, k: x.rows, x: channels, w: channels };
    product.run(&|row, col, sums| {
        // SAFETY: every run of columns of every row is finished once.
        let place = unsafe { place.range(row * n + col, sums.len()) };
        place.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
    });
}

/// Channels as rows.
fn transposed<T: Scalar>(x: &[T], cols: usize) -> Vec<T> {
    let rows = x.len() / cols;
    let mut out = vec![T::round(0.0); x.len()];
    out.par_chunks_mut(rows.max(1) * 16).enumerate().for_each(|(task, channels)| {
        for (at, row) in x.chunks_exact(cols).enumerate() {
            let from = &row[task * 16..];
            channels.chunks_exact_mut(rows).zip(from).for_each(|(channel, x)| channel[at] = *x);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backend::Compute;

    #[test]
    fn sums_agree_with_plain_loops() {
        let (rows, cols) = (37, 100);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 71 % 257) as f32 - 128.0) / 64.0).collect();
        for compute in [Compute::Bf16, Compute::F32] {
            let x = Tensor::from_f32(compute, &values, cols);
            let mut sums = empty(cols, true);
            for _ in 0..2 {
                match x.view() {
                    View::Bf16(x) => add_channels::<bf16>(x, &mut sums),
                    View::F32(x) => add_channels(x, &mut sums),
                }
                add_products(&x, &mut sums.products);
            }
            for (i, j) in [(0, 0), (3, 99), (64, 65), (99, 99)] {
                let exact: f64 =
                    (0..rows).map(|r| values[r * cols + i] as f64 * values[r * cols + j] as f64).sum();
                assert!((sums.products[i * cols + j] as f64 - 2.0 * exact).abs() < 1e-3);
                if i == j {
                    assert!((sums.squares[i] as f64 - 2.0 * exact).abs() < 1e-3);
                    let largest = (0..rows).map(|r| values[r * cols + i].abs()).fold(0.0, f32::max);
                    assert_eq!(sums.amax[i], largest);
                }
            }
        }
    }

    #[test]
    fn nan_sticks_to_its_channel() {
        let mut sums = empty(2, false);
        add_channels(&[1.0f32, f32::NAN, 5.0, 2.0], &mut sums);
        assert_eq!(sums.amax[0], 5.0);
        assert!(sums.amax[1].is_nan());
    }
}
