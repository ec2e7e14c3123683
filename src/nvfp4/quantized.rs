//! A linear as codes and block scales, and the plain ways to make one from f32 weights. Rows in parallel; every
//! block is chosen by itself, so results depend on nothing else.

use rayon::prelude::*;

use super::{BLOCK, GlobalScale, dequantize, quantize, quantize_searched};

/// A linear's codes `[rows, cols / 2]` (two a byte) and E4M3 block scales `[rows, cols / 16]`.
#[derive(Default)]
pub struct QuantizedLinear {
    /// Packed E2M1 codes.
    pub codes: Vec<u8>,
    /// E4M3 block scales.
    pub scales: Vec<u8>,
}

impl QuantizedLinear {
    /// Rows of `cols` elements with max scales.
    pub fn max(w: &[f32], cols: usize, global: GlobalScale) -> QuantizedLinear {
        QuantizedLinear::by_rows(w, cols, |w, codes, scales| quantize(w, global, codes, scales))
    }

    /// Rows of `importance.len()` elements with searched scales.
    pub fn searched(w: &[f32], importance: &[f32], global: GlobalScale) -> QuantizedLinear {
        let row = |w: &[f32], codes: &mut [u8], scales: &mut [u8]| {
            quantize_searched(w, importance, global, codes, scales)
        };
        QuantizedLinear::by_rows(w, importance.len(), row)
    }

    fn by_rows(w: &[f32], cols: usize, row: impl Fn(&[f32], &mut [u8], &mut [u8]) + Sync) -> QuantizedLinear {
        let mut q = QuantizedLinear { codes: vec![0; w.len() / 2], scales: vec![0; w.len() / BLOCK] };
        let rows = q.codes.par_chunks_mut(cols / 2).zip(q.scales.par_chunks_mut(cols / BLOCK));
        w.par_chunks(cols).zip(rows).for_each(|(w, (codes, scales))| row(w, codes, scales));
        q
    }

    /// The weights that it stands for.
    pub fn values(&self, cols: usize, global: GlobalScale) -> Vec<f32> {
        let mut w = vec![0.0; self.codes.len() * 2];
        let rows = self.codes.par_chunks(cols / 2).zip(self.scales.par_chunks(cols / BLOCK));
        w.par_chunks_mut(cols)
            .zip(rows)
            .for_each(|(w, (codes, scales))| dequantize(codes, scales, global, w));
        w
    }
}
