//! Quantizing, packing and dequantizing rows.

use half::bf16;

use super::{BLOCK, GlobalScale, e2m1, e4m3};
use crate::simd::wide;

/// A weight's element type: exact in f32.
pub trait Element: Copy + Send + Sync {
    /// The value.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
}

wide! {
    /// `max |x|`; NaN if any element is NaN, infinite if any is infinite and none is NaN. 0 for no elements.
    pub fn amax<T: Element>(x: &[T]) -> f32 => amax_body
}

#[inline(always)]
fn amax_body<T: Element>(x: &[T]) -> f32 {
    // Non-negative floats order like their bits, and NaN's bits are above infinity's, so an integer maximum
    // keeps NaN and vectorizes.
    let mut lanes = [0u32; 32];
    let mut chunks = x.chunks_exact(32);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = (*lane).max(value.to_f32().to_bits() & 0x7FFF_FFFF);
        }
    }
    let tail = chunks.remainder().iter().map(|v| v.to_f32().to_bits() & 0x7FFF_FFFF);
    f32::from_bits(lanes.into_iter().chain(tail).max().unwrap_or(0))
}

/// The index of the first NaN or infinity.
pub fn first_non_finite<T: Element>(x: &[T]) -> Option<usize> {
    x.iter().position(|value| !value.to_f32().is_finite())
}

wide! {
    /// Quantizes rows of `16 · n` finite elements, concatenated in `w`: `codes` takes two codes a byte (the
    /// even column in the low nibble), `scales` one E4M3 byte a block.
    ///
    /// # Panics
    /// Where the lengths do not fit: `w` is a multiple of 16, `codes` half and `scales` a sixteenth of it.
    pub fn quantize<T: Element>(w: &[T], global: GlobalScale, codes: &mut [u8], scales: &mut [u8]) => quantize_body
}

#[inline(always)]
fn quantize_body<T: Element>(w: &[T], global: GlobalScale, codes: &mut [u8], scales: &mut [u8]) {
    assert_eq!(w.len() % BLOCK, 0, "rows are whole blocks");
    assert_eq!((codes.len() * 2, scales.len() * BLOCK), (w.len(), w.len()), "outputs fit the weights");
    let global = global.multiplier();
    for ((block, packed), scale) in w.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(BLOCK / 2)).zip(scales) {
        let mut x = [0f32; BLOCK];
        // The bits of non-negative floats order like the floats, and an integer maximum vectorizes.
        let mut amax = 0u32;
        for (x, w) in x.iter_mut().zip(block) {
            *x = w.to_f32();
            amax = amax.max(x.to_bits() & 0x7FFF_FFFF);
        }
        let amax = f32::from_bits(amax);
        let s = amax / (6.0 * global);
        let s = if s == 0.0 { 1.0 } else { s };
        *scale = e4m3::encode(s.clamp(e4m3::MIN_POSITIVE, e4m3::MAX));
        let step = e4m3::decode(*scale) * global;
        let mut code = [0u8; BLOCK];
        for (code, x) in code.iter_mut().zip(x) {
            *code = e2m1::encode(x / step);
        }
        for (byte, pair) in packed.iter_mut().zip(code.chunks_exact(2)) {
            *byte = pair[0] | (pair[1] << 4);
        }
    }
}

wide! {
    /// The weights that codes and scales stand for: `e2m1(code) · (e4m3(scale) · global)`.
    ///
    /// # Panics
    /// Where the lengths do not fit.
    pub fn dequantize(codes: &[u8], scales: &[u8], global: GlobalScale, out: &mut [f32]) => dequantize_body
}

#[inline(always)]
fn dequantize_body(codes: &[u8], scales: &[u8], global: GlobalScale, out: &mut [f32]) {
    assert_eq!((codes.len() * 2, scales.len() * BLOCK), (out.len(), out.len()), "inputs fit the output");
    let blocks = codes.as_chunks::<{ BLOCK / 2 }>().0.iter().zip(scales);
    for ((packed, &scale), out) in blocks.zip(out.as_chunks_mut::<BLOCK>().0) {
        let step = e4m3::decode(scale) * global.multiplier();
        for (i, out) in out.iter_mut().enumerate() {
            let code = packed[i / 2] >> (i % 2 * 4) & 15;
            *out = e2m1::value(code) * step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantized(w: &[f32], global: GlobalScale) -> (Vec<u8>, Vec<u8>) {
        let (mut codes, mut scales) = (vec![0xAA; w.len() / 2], vec![0xAA; w.len() / BLOCK]);
        quantize(w, global, &mut codes, &mut scales);
        (codes, scales)
    }

    #[test]
    fn the_even_column_is_the_low_nibble() {
        let mut w = [0.0; BLOCK];
        (w[0], w[1]) = (6.0, -3.0);
        let (codes, scales) = quantized(&w, GlobalScale::from_multiplier(1.0));
        assert_eq!((codes[0], scales[0]), (0x7 | 0xD << 4, 0x38));
    }

    #[test]
    fn an_all_zero_tensor_has_a_finite_scale_and_zero_codes() {
        let global = GlobalScale::from_amax(0.0);
        assert_eq!(global.multiplier(), 1.0);
        let (codes, scales) = quantized(&[0.0; 32], global);
        assert_eq!((codes, scales), (vec![0; 16], vec![0x38; 2]));
    }

    #[test]
    fn a_tensor_too_small_for_a_normal_scale_becomes_zero() {
        let w = [1e-36f32; BLOCK];
        let global = GlobalScale::from_amax(1e-36);
        assert_eq!(global.multiplier(), 1.0);
        assert_eq!(quantized(&w, global), (vec![0; 8], vec![0x01]));
    }

    #[test]
    fn tiny_blocks_take_the_smallest_scale() {
        let mut w = [1e-9f32; 32];
        w[0] = 1.0;
        w[31] = -1e-9;
        let (codes, scales) = quantized(&w, GlobalScale::from_amax(1.0));
        assert_eq!(scales, [0x7E, 0x01]);
        assert_eq!(codes[15], 0x80, "a negative value that rounds to zero keeps its sign");
    }

    #[test]
    fn values_beyond_the_group_maximum_saturate() {
        let (codes, scales) = quantized(&[100.0; BLOCK], GlobalScale::from_amax(1.0));
        assert_eq!((codes, scales), (vec![0x77; 8], vec![0x7E]));
    }

    #[test]
    fn the_top_block_always_takes_448() {
        for bits in (0x0080..0x7F80u16).step_by(7) {
            let amax = bf16::from_bits(bits).to_f32();
            let global = GlobalScale::from_amax(amax);
            if global.multiplier() != 1.0 {
                assert_eq!(quantized(&[amax; BLOCK], global).1, [0x7E], "{amax:e}");
            }
        }
    }

    #[test]
    fn amax_keeps_nan_and_infinity() {
        assert_eq!(amax::<f32>(&[]), 0.0);
        for n in [1, 31, 32, 33, 100] {
            let mut x: Vec<f32> = (0..n).map(|i| -(i as f32)).collect();
            assert_eq!(amax(&x), (n - 1) as f32);
            x[n / 2] = f32::NEG_INFINITY;
            assert_eq!(amax(&x), f32::INFINITY);
            x[n - 1] = f32::NAN;
            assert!(amax(&x).is_nan());
            assert_eq!(first_non_finite(&x), Some(n / 2));
        }
    }

    #[test]
    fn wide_and_portable_code_give_the_same_bytes() {
        let w: Vec<bf16> = (0..4096u32)
            .map(|i| bf16::from_bits((i.wrapping_mul(40503) >> 3) as u16))
            .map(|w| if w.is_finite() { w } else { bf16::ZERO })
            .collect();
        let global = GlobalScale::from_amax(amax(&w));
        assert_eq!(amax(&w), amax_body(&w));
        let mut here = (vec![0; w.len() / 2], vec![0; w.len() / 16]);
        let mut there = here.clone();
        quantize(&w, global, &mut here.0, &mut here.1);
        quantize_body(&w, global, &mut there.0, &mut there.1);
        assert_eq!(here, there);
    }
}
