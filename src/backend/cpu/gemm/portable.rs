//! f32 products by `matrixmultiply`, with BF16 weights widened a panel at a time.

use half::bf16;
use rayon::prelude::*;

use super::super::tensor::{Scalar, View};
use super::{Finish, Matrix, Product, gemm};

/// Rows of `w` that are widened and multiplied together. Fixed, so that results depend on nothing else.
const PANEL: usize = 128;

/// The whole product, panels in parallel.
pub fn product(p: &Product<'_>, finish: Finish<'_>) {
    let widened;
    let x = match p.x {
        View::F32(x) => x,
        View::Bf16(x) => {
            widened = widen(x);
            &widened
        }
    };
    (0..p.n.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
        let rows = panel * PANEL..p.n.min((panel + 1) * PANEL);
        let widened;
        let w = match p.w {
            View::F32(w) => &w[rows.start * p.k..rows.end * p.k],
            View::Bf16(w) => {
                widened = widen(&w[rows.start * p.k..rows.end * p.k]);
                &widened
            }
        };
        let mut out = vec![0.0; p.m * rows.len()];
        sgemm(p.m, rows.len(), p.k, x, w, &mut out);
        for (row, sums) in out.chunks_exact(rows.len()).enumerate() {
            finish(row, rows.start, sums);
        }
    });
}

/// BF16 as f32.
pub fn widen(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.get()).collect()
}

/// `out [m, n] = x [m, k] · wᵀ [n, k]`.
pub fn sgemm(m: usize, n: usize, k: usize, x: &[f32], w: &[f32], out: &mut [f32]) {
    gemm(1.0, Matrix::new(x, m, k, k), Matrix::new(w, n, k, k).transposed(), 0.0, out, n);
}
