//! f32 matrices on the CPU, in parallel over fixed parts, so that results do not depend on threads.

mod dense;
mod gptq;

use rayon::prelude::*;

use super::sums::Sums;
use super::{Cpu, Tensor};
use crate::backend::{Backend, Columns, Gathered, Solver, relative};
use crate::error::Result;
use crate::nvfp4::activation::quantize_dequantize;
use crate::nvfp4::{GlobalScale, QuantizedLinear, amax};
#[cfg(test)]
pub(crate) use dense::tests::noise;
pub use gptq::Factor;

/// A row-major f32 matrix in host memory.
#[derive(Debug, PartialEq)]
pub struct Matrix {
    values: Vec<f32>,
    cols: usize,
}

/// Elements that one task of a sum takes.
const CHUNK: usize = 1 << 14;

/// Columns that one task of a sum by column takes.
const COLUMNS: usize = 64;

impl Cpu {
    /// A matrix whose rows come from those of `x`.
    fn by_rows(&self, x: &Matrix, row: impl Fn(&mut [f32]) + Send + Sync) -> Matrix {
        let mut values = x.values.clone();
        self.pool.install(|| values.par_chunks_mut(x.cols).for_each(row));
        Matrix { values, cols: x.cols }
    }
}

impl Solver for Cpu {
    type Matrix = Matrix;
    type Codes = QuantizedLinear;
    type Factor = Factor;

    fn gathered(&self, sums: Sums) -> Result<Gathered<Matrix>> {
        let cols = sums.amax.len();
        let products = (!sums.products.is_empty()).then_some(Matrix { values: sums.products, cols });
        Ok(Gathered { products, rows: sums.rows.map(|values| Matrix { values, cols }) })
    }

    fn widen(&self, weight: &Tensor) -> Result<Matrix> {
        Ok(Matrix { values: self.values(weight)?, cols: weight.cols })
    }

    fn matrix(&self, values: Vec<f32>, cols: usize) -> Result<Matrix> {
        Ok(Matrix { values, cols })
    }

    fn read(&self, x: &Matrix) -> Result<Vec<f32>> {
        Ok(x.values.clone())
    }

    fn diagonal(&self, x: &Matrix) -> Result<Vec<f32>> {
        Ok(x.values.iter().step_by(x.cols + 1).copied().collect())
    }

    fn columns(&self, x: &Matrix) -> Result<Columns> {
        let mut columns = Columns { amax: vec![0.0; x.cols], squares: vec![0.0; x.cols] };
        let tasks = columns.amax.par_chunks_mut(COLUMNS).zip(columns.squares.par_chunks_mut(COLUMNS));
        self.pool.install(|| {
            tasks.enumerate().for_each(|(task, (amax, squares))| {
                for row in x.values.chunks_exact(x.cols) {
                    let row = &row[task * COLUMNS..];
                    for ((amax, squares), &w) in amax.iter_mut().zip(&mut *squares).zip(row) {
                        *amax = amax.max(w.abs());
                        *squares += w as f64 * w as f64;
                    }
                }
            });
        });
        Ok(columns)
    }

    fn largest(&self, x: &Matrix) -> Result<f32> {
        let parts: Vec<f32> = self.pool.install(|| x.values.par_chunks(CHUNK).map(amax).collect());
        Ok(amax(&parts))
    }

    fn scale(&self, x: &mut Matrix, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()> {
        let cols = x.cols;
        self.pool.install(|| {
            x.values.par_chunks_mut(cols).enumerate().for_each(|(i, row)| {
                let by_row = rows.map_or(1.0, |rows| rows[i]);
                match columns {
                    None => row.iter_mut().for_each(|x| *x *= by_row),
                    Some(columns) => row.iter_mut().zip(columns).for_each(|(x, c)| *x *= by_row * c),
                }
            });
        });
        Ok(())
    }

    fn divided(&self, x: &Matrix, by: &[f32]) -> Result<Matrix> {
        Ok(self.by_rows(x, |row| row.iter_mut().zip(by).for_each(|(w, f)| *w /= f)))
    }

    fn served(&self, x: &Matrix, factors: &[f32], input: Option<GlobalScale>) -> Result<Matrix> {
        Ok(self.by_rows(x, |row| {
            row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
            if let Some(input) = input {
                quantize_dequantize(row, input);
            }
        }))
    }

    fn outputs(&self, x: &Matrix, w: &Matrix) -> Result<Matrix> {
        let values = self.pool.install(|| dense::product(&x.values, &w.values, w.cols));
        Ok(Matrix { values, cols: w.values.len() / w.cols })
    }

    fn relative_error(&self, a: &Matrix, b: &Matrix) -> Result<f64> {
        // Chunks in parallel, sums in order.
        let parts: Vec<(f64, f64)> = self.pool.install(|| {
            let chunks = a.values.par_chunks(CHUNK).zip(b.values.par_chunks(CHUNK));
            chunks
                .map(|(a, b)| {
                    let terms = a.iter().zip(b).map(|(a, b)| (((a - b) as f64).powi(2), (*b as f64).powi(2)));
                    terms.fold((0.0, 0.0), |sum, term| (sum.0 + term.0, sum.1 + term.1))
                })
                .collect()
        });
        let (error, norm) = parts.into_iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        Ok(relative(error, norm))
    }

    fn round_max(&self, w: &Matrix, global: GlobalScale) -> Result<QuantizedLinear> {
        Ok(self.pool.install(|| QuantizedLinear::max(&w.values, w.cols, global)))
    }

    fn round_searched(&self, w: &Matrix, importance: &[f32], global: GlobalScale) -> Result<QuantizedLinear> {
        Ok(self.pool.install(|| QuantizedLinear::searched(&w.values, importance, global)))
    }

    fn factor(&self, h: &Matrix, order: &[u32], lambda: f32) -> Result<Option<Factor>> {
        Ok(self.pool.install(|| Factor::new(&h.values, order, lambda)))
    }

    fn round_gptq(&self, w: &Matrix, factor: &Factor, global: GlobalScale) -> Result<QuantizedLinear> {
        Ok(self.pool.install(|| factor.quantize(&w.values, global)))
    }

    fn dequantize(&self, codes: &QuantizedLinear, cols: usize, global: GlobalScale) -> Result<Matrix> {
        Ok(Matrix { values: self.pool.install(|| codes.values(cols, global)), cols })
    }

    fn read_codes(&self, codes: QuantizedLinear) -> Result<QuantizedLinear> {
        Ok(codes)
    }
}
