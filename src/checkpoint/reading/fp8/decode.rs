//! FP8 codes and scales to BF16.

use std::sync::OnceLock;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::nvfp4::e4m3;
use crate::simd::wide;

/// Elements that one thread decodes at a time.
const PART: usize = 1 << 16;

/// What turns the codes of a weight `[.., rows, cols]` into BF16: `bf16(f32(code) * scale)`, where the product is one
/// f32 multiplication and the rounding is to nearest, ties to even. That is what Transformers
/// (`integrations/finegrained_fp8.py`), compressed-tensors (of scales that were not rounded before) and vLLM compute.
#[derive(Debug)]
pub struct Decoder {
    /// By matrix, block row and block column; finite and positive.
    scales: Vec<f32>,
    /// Rows and columns that share a scale.
    block: [usize; 2],
    rows: usize,
    cols: usize,
    /// The whole weight, once somebody asked for it, and its first element that is not finite.
    whole: OnceLock<(Vec<u16>, Option<usize>)>,
}

impl Decoder {
    /// For a weight of this shape, with at least two axes, and scales that fit it.
    pub fn new(scales: Vec<f32>, block: [usize; 2], shape: &[usize]) -> Decoder {
        let [.., rows, cols] = *shape else { unreachable!("a weight with scales has rows and columns") };
        Decoder { scales, block, rows, cols, whole: OnceLock::new() }
    }

    /// Decodes the codes from element `first` of the weight on into BF16, little endian, two bytes for each. Returns
    /// the index in the weight of the first that is not finite: its code is NaN, or the product has no place in BF16.
    pub fn decode(&self, first: usize, codes: &[u8], out: &mut [u8]) -> Option<usize> {
        let (mut at, mut odd) = (first, None);
        let (mut codes, mut out) = (codes, out);
        while !codes.is_empty() {
            let run = self.run(at).min(codes.len());
            let (mine, later) = codes.split_at(run);
            let (place, rest) = std::mem::take(&mut out).split_at_mut(2 * run);
            if decode_run(self.scale(at), mine, place) && odd.is_none() {
                let is_odd = |value: &[u8; 2]| !bf16::from_le_bytes(*value).is_finite();
                odd = place.as_chunks::<2>().0.iter().position(is_odd).map(|within| at + within);
            }
            (at, codes, out) = (at + run, later, rest);
        }
        odd
    }

    /// All of the weight as BF16, little endian, and the first element that is not finite. Decoded at the first call.
    pub fn whole(&self, codes: &[u8]) -> (&[u8], Option<usize>) {
        if self.whole.get().is_none() {
            // Outside of the cell: a thread that waits for others may be given work that asks for this weight too.
            let decoded = self.all(codes);
            let _ = self.whole.set(decoded);
        }
        let (values, odd) = self.whole.get().expect("just decoded");
        (bytemuck::cast_slice(values), *odd)
    }

    fn all(&self, codes: &[u8]) -> (Vec<u16>, Option<usize>) {
        let mut values = vec![0u16; codes.len()];
        let parts = codes.par_chunks(PART).zip(values.par_chunks_mut(PART)).enumerate();
        let odd = parts.filter_map(|(i, (codes, values))| {
            self.decode(i * PART, codes, bytemuck::cast_slice_mut(values))
        });
        let odd = odd.min();
        (values, odd)
    }

    /// Elements from `at` on that lie in one row and have one scale.
    fn run(&self, at: usize) -> usize {
        let col = at % self.cols;
        (self.block[1] - col % self.block[1]).min(self.cols - col)
    }

    fn scale(&self, at: usize) -> f32 {
        let (row, col) = (at / self.cols, at % self.cols);
        let (matrix, row) = (row / self.rows, row % self.rows);
        let [down, across] = [self.rows.div_ceil(self.block[0]), self.cols.div_ceil(self.block[1])];
        self.scales[(matrix * down + row / self.block[0]) * across + col / self.block[1]]
    }
}

wide! {
    /// Codes that share a scale; whether one of them becomes NaN or infinite.
    fn decode_run(scale: f32, codes: &[u8], out: &mut [u8]) -> bool => decode_body
}

#[inline(always)]
fn decode_body(scale: f32, codes: &[u8], out: &mut [u8]) -> bool {
    let mut odd = false;
    for (value, &code) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        let bits = (e4m3::decode(code) * scale).to_bits();
        // To nearest, ties to even. NaN stays NaN: that of the table has the highest bit of the mantissa only.
        let rounded = (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16;
        odd |= rounded & 0x7F80 == 0x7F80;
        *value = rounded.to_le_bytes();
    }
    odd
}

/// Scales as f32; none where the dtype is not one that scales have. An F8_E8M0 byte `b` means 2^(b - 127), and 255 NaN.
pub fn scales(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let pairs = bytes.as_chunks::<2>().0.iter();
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => pairs.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => pairs.map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F8_E8M0 => bytes
            .iter()
            .map(|&b| match b {
                0 => f32::from_bits(1 << 22),
                255 => f32::NAN,
                b => f32::from_bits(u32::from(b) << 23),
            })
            .collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A weight of two matrices whose last blocks are partial ones, with every code but NaN.
    fn partial() -> (Decoder, Vec<u8>) {
        let shape = [2, 300, 37];
        let codes = (0..2 * 300 * 37).map(|i| ((i * 7 + i / 256) % 256) as u8);
        let codes = codes.map(|code: u8| if code & 0x7F == 0x7F { 1 } else { code });
        let scales = (0..2 * 3 * 3).map(|i| 1.37e-3 * (i + 1) as f32).collect();
        (Decoder::new(scales, [128, 16], &shape), codes.collect())
    }

    #[test]
    fn elements_are_multiplied_by_the_scale_of_their_block_whatever_the_range() {
        let (decoder, codes) = partial();
        let mut expected = vec![];
        for matrix in 0..2 {
            for row in 0..300 {
                for col in 0..37 {
                    let scale = 1.37e-3 * (matrix * 9 + row / 128 * 3 + col / 16 + 1) as f32;
                    let code = codes[(matrix * 300 + row) * 37 + col];
                    expected.extend(bf16::from_f32(e4m3::decode(code) * scale).to_le_bytes());
                }
            }
        }
        assert_eq!(decoder.whole(&codes), (&expected[..], None));
        for range in [0..1, 5..5, 36..38, 11_050..11_200, 0..codes.len(), codes.len() - 3..codes.len()] {
            let mut out = vec![1; 2 * range.len()];
            assert_eq!(decoder.decode(range.start, &codes[range.clone()], &mut out), None);
            assert_eq!(out, expected[2 * range.start..2 * range.end], "{range:?}");
        }
    }

    #[test]
    fn the_first_element_that_is_no_number_is_found() {
        let (decoder, mut codes) = partial();
        (codes[9_000], codes[700]) = (0x7F, 0xFF);
        let (bytes, odd) = decoder.whole(&codes);
        assert_eq!(odd, Some(700));
        assert!(bf16::from_le_bytes([bytes[1400], bytes[1401]]).is_nan());
        assert_eq!(decoder.decode(701, &codes[701..], &mut vec![0; 2 * (codes.len() - 701)]), Some(9_000));
        let huge = Decoder::new(vec![1e36], [1, 2], &[1, 2]);
        assert_eq!(huge.whole(&[0x38, 0x7E]).1, Some(1));
    }

    #[test]
    fn scales_have_four_dtypes() {
        assert_eq!(scales(Dtype::F32, &0.3f32.to_le_bytes()), Some(vec![0.3]));
        assert_eq!(scales(Dtype::BF16, &bf16::from_f32(1.5).to_le_bytes()), Some(vec![1.5]));
        assert_eq!(scales(Dtype::F16, &half::f16::from_f32(0.75).to_le_bytes()), Some(vec![0.75]));
        let powers = scales(Dtype::F8_E8M0, &[0, 1, 127, 254, 255]).unwrap();
        assert_eq!(powers[..4], [2f32.powi(-127), 2f32.powi(-126), 1.0, 2f32.powi(127)]);
        assert!(powers[4].is_nan());
        assert_eq!(scales(Dtype::U8, &[1]), None);
    }
}
