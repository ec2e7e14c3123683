//! Matrix products `out = x · wᵀ` with f32 sums.
//!
//! The order of the sums behind one element of `out` depends on the inner dimension only, never on how many
//! rows or columns there are, on tiles or threads: a token's result is the same whatever it is batched with.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod matrix;
mod portable;

pub use matrix::{Matrix, gemm};

use half::bf16;

use super::tensor::View;

/// `x [m, k] · wᵀ`, with `w [n, k]`; `finish(row, column, sums)` takes runs of consecutive columns of a row.
pub struct Product<'a> {
    /// Rows of `x`.
    pub m: usize,
    /// Rows of `w`.
    pub n: usize,
    /// The inner dimension.
    pub k: usize,
    /// Left side.
    pub x: View<'a>,
    /// Right side.
    pub w: View<'a>,
}

/// Receives finished sums: (row, first column, sums).
pub type Finish<'a> = &'a (dyn Fn(usize, usize, &[f32]) + Sync);

impl Product<'_> {
    /// Computes the product, in parallel in the current rayon pool.
    pub fn run(&self, finish: Finish<'_>) {
        match (self.x, self.w) {
            #[cfg(target_arch = "x86_64")]
            (View::Bf16(x), View::Bf16(w)) if avx512::available() => {
                // SAFETY: the processor has what the module needs.
                unsafe { avx512::product(self.m, self.n, self.k, x, w, finish) }
            }
            _ => portable::product(self, finish),
        }
    }
}

/// `x [m, k] · wᵀ [n, k]` on the calling thread alone, into `out [m, n]`: for the small products of attention.
pub fn small(m: usize, n: usize, k: usize, x: &[bf16], w: &[bf16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if avx512::available() {
        // SAFETY: the processor has what the module needs.
        return unsafe { avx512::small(m, n, k, x, w, out) };
    }
    let (x, w): (Vec<f32>, Vec<f32>) = (portable::widen(x), portable::widen(w));
    portable::sgemm(m, n, k, &x, &w, out);
}

/// The same in f32.
pub fn small_f32(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32]) {
    portable::sgemm(m, n, k, x, w, out);
}

/// The name of the kernel that BF16 products use on this processor.
pub fn kernel() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if avx512::available() {
        return "avx512-bf16";
    }
    "f32"
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::tensor::Scalar;
    use super::*;

    fn random(n: usize, seed: u32) -> Vec<bf16> {
        let mut state = seed.wrapping_mul(2654435761).max(1);
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                bf16::round(state as f32 / u32::MAX as f32 - 0.5)
            })
            .collect()
    }

    type Run = fn(&Product<'_>, Finish<'_>);
    const DISPATCHED: Run = |product, finish| product.run(finish);

    fn collect(product: &Product<'_>, run: Run) -> Vec<f32> {
        let out = Mutex::new(vec![f32::NAN; product.m * product.n]);
        run(product, &|row, col, sums| {
            let at = row * product.n + col;
            out.lock().unwrap()[at..at + sums.len()].copy_from_slice(sums);
        });
        out.into_inner().unwrap()
    }

    fn relative_error(got: &[f32], x: &[bf16], w: &[bf16], (m, n, k): (usize, usize, usize)) -> f64 {
        let (mut difference, mut norm) = (0.0, 0.0);
        for i in 0..m {
            for j in 0..n {
                let exact: f64 = (0..k).map(|l| x[i * k + l].to_f64() * w[j * k + l].to_f64()).sum();
                difference += (exact - got[i * n + j] as f64).powi(2);
                norm += exact * exact;
            }
        }
        (difference / norm).sqrt()
    }

    const SHAPES: [(usize, usize, usize); 8] = [
        (1, 1, 1),
        (1, 33, 16),
        (5, 7, 3),
        (12, 32, 64),
        (13, 65, 127),
        (40, 96, 576),
        (25, 31, 1537),
        (3, 200, 1030),
    ];

    #[test]
    fn every_kernel_agrees_with_exact_sums() {
        for (m, n, k) in SHAPES {
            let (x, w) = (random(m * k, 1), random(n * k, 2));
            let product = Product { m, n, k, x: View::Bf16(&x), w: View::Bf16(&w) };
            for got in [collect(&product, DISPATCHED), collect(&product, portable::product)] {
                let error = relative_error(&got, &x, &w, (m, n, k));
                assert!(error < 2e-6, "{m}x{n}x{k}: {error:e}");
            }
            let mut got = vec![f32::NAN; m * n];
            small(m, n, k, &x, &w, &mut got);
            assert!(relative_error(&got, &x, &w, (m, n, k)) < 2e-6, "{m}x{n}x{k}");
            let wide: Vec<f32> = x.iter().map(|x| x.get()).collect();
            let mixed = Product { m, n, k, x: View::F32(&wide), w: View::Bf16(&w) };
            assert!(relative_error(&collect(&mixed, DISPATCHED), &x, &w, (m, n, k)) < 2e-6);
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_company_or_on_threads() {
        let (m, n, k) = (29, 70, 1200);
        let (x, w) = (random(m * k, 3), random(n * k, 4));
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for run in [DISPATCHED, portable::product] {
            let product = Product { m, n, k, x: View::Bf16(&x), w: View::Bf16(&w) };
            let together = pool(2).install(|| collect(&product, run));
            for row in [0, 11, 12, 28] {
                let one = Product { m: 1, x: View::Bf16(&x[row * k..][..k]), ..product };
                let alone = pool(1).install(|| collect(&one, run));
                assert_eq!(alone, together[row * n..][..n], "row {row}");
            }
        }
    }
}
