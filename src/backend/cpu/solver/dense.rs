//! Products of dense f32 matrices and the Cholesky factor, in parallel over fixed tiles, so that results do not depend on
//! threads.

use rayon::prelude::*;

use super::super::gemm::{Matrix, gemm};
use super::super::shared::Disjoint;

/// Rows that one task takes.
const TILE: usize = 64;

/// Output features that one task of a product takes: a sample of a few hundred rows alone is too few tasks.
const FEATURES: usize = 256;

/// `x · wᵀ`: x `[rows, k]`, w `[n, k]`, result `[rows, n]`.
pub fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (rows, n) = (x.len() / k, w.len() / k);
    let mut out = vec![0.0; rows * n];
    let place = Disjoint::new(&mut out);
    let tiles = x.par_chunks(TILE * k).enumerate().flat_map(|tile| {
        let features = w.par_chunks(FEATURES * k).enumerate();
        features.map(move |features| (tile, features))
    });
    tiles.for_each(|((tile, x), (first, w))| {
        let (rows, features) = (x.len() / k, w.len() / k);
        let mut part = vec![0.0; rows * features];
        let (x, w) = (Matrix::new(x, rows, k, k), Matrix::new(w, features, k, k).transposed());
        gemm(1.0, x, w, 0.0, &mut part, features);
        for (row, part) in part.chunks_exact(features).enumerate() {
            let at = (tile * TILE + row) * n + first * FEATURES;
            // SAFETY: each pair of a tile of rows and some features is one task's.
            unsafe { place.range(at, features) }.copy_from_slice(part);
        }
    });
    out
}

/// A pivot that is not positive, at this row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotPositive(pub usize);

/// Replaces the lower triangle of the symmetric `a` `[n, n]` by its Cholesky factor `L`, `a = L · Lᵀ`. The
/// strict upper triangle is left as it is.
///
/// # Errors
/// The first row whose pivot is not positive and finite.
pub fn cholesky(a: &mut [f32], n: usize) -> Result<(), NotPositive> {
    for first in (0..n).step_by(TILE) {
        let width = TILE.min(n - first);
        let (top, below) = a[first * n..].split_at_mut(width * n);
        factor(top, first, width, n)?;
        // L21 = A21 · L11⁻ᵀ, a row at a time.
        let top = &*top;
        below.par_chunks_mut(n).for_each(|row| {
            let row = &mut row[first..first + width];
            for j in 0..width {
                let l = &top[j * n + first..][..j + 1];
                let sum: f32 = row[..j].iter().zip(l).map(|(a, b)| a * b).sum();
                row[j] = (row[j] - sum) / l[j];
            }
        });
        // A22 -= L21 · L21ᵀ, tiles of rows from the left to the diagonal.
        let panel: Vec<f32> = below.chunks(n).flat_map(|row| &row[first..first + width]).copied().collect();
        below.par_chunks_mut(TILE * n).enumerate().for_each(|(tile, rows)| {
            let count = rows.len() / n;
            let upto = tile * TILE + count;
            let mine = Matrix::new(&panel[tile * TILE * width..], count, width, width);
            let theirs = Matrix::new(&panel, upto, width, width).transposed();
            gemm(-1.0, mine, theirs, 1.0, &mut rows[first + width..], n);
        });
    }
    Ok(())
}

/// The factor of a diagonal tile, in f64 inside.
fn factor(tile: &mut [f32], first: usize, width: usize, n: usize) -> Result<(), NotPositive> {
    for i in 0..width {
        for j in 0..=i {
            let dot: f64 =
                (0..j).map(|k| tile[i * n + first + k] as f64 * tile[j * n + first + k] as f64).sum();
            let rest = tile[i * n + first + j] as f64 - dot;
            tile[i * n + first + j] = if i != j {
                (rest / tile[j * n + first + j] as f64) as f32
            } else if rest > 0.0 && rest.is_finite() {
                rest.sqrt() as f32
            } else {
                return Err(NotPositive(first + i));
            };
        }
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Numbers in [-1, 1) that look random and are always the same.
    pub fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// `xᵀ · x / rows`.
    pub fn second_moments(x: &[f32], n: usize) -> Vec<f32> {
        let rows = x.len() / n;
        let mut h = vec![0.0; n * n];
        let x = Matrix::new(x, rows, n, n);
        gemm(1.0 / rows as f32, x.transposed(), x, 0.0, &mut h, n);
        h
    }

    #[test]
    fn products_agree_with_sums() {
        let (rows, n, k) = (130, 33, 70);
        let (x, w) = (noise(rows * k, 1), noise(n * k, 2));
        let got = product(&x, &w, k);
        for (r, c) in [(0, 0), (63, 32), (64, 5), (129, 31)] {
            let exact: f64 = (0..k).map(|i| x[r * k + i] as f64 * w[c * k + i] as f64).sum();
            assert!((got[r * n + c] as f64 - exact).abs() < 1e-5);
        }
    }

    #[test]
    fn the_factor_gives_the_matrix_back() {
        for n in [1, 16, 64, 65, 200] {
            let mut h = second_moments(&noise(3 * n * n, 3), n);
            (0..n).for_each(|i| h[i * n + i] += 0.1);
            let mut l = h.clone();
            cholesky(&mut l, n).unwrap();
            for i in 0..n {
                for j in 0..=i {
                    let sum: f64 = (0..=j).map(|k| l[i * n + k] as f64 * l[j * n + k] as f64).sum();
                    assert!((sum - h[i * n + j] as f64).abs() < 1e-5, "{n}: {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused_at_its_row() {
        let mut a = vec![0.0; 100 * 100];
        (0..100).for_each(|i| a[i * 100 + i] = 1.0);
        a[70 * 100 + 70] = -1.0;
        assert_eq!(cholesky(&mut a, 100), Err(NotPositive(70)));
        a[0] = f32::NAN;
        assert_eq!(cholesky(&mut a, 100), Err(NotPositive(0)));
    }
}
