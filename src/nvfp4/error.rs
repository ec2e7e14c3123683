//! How far a quantized tensor is from its source.

use super::{BLOCK, Element, GlobalScale, e2m1, e4m3};
use crate::simd::wide;

/// Sums over elements from which the relative error and the cosine follow. Sums of parts add up, in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    source: f64,
    quantized: f64,
    product: f64,
    difference: f64,
}

impl Distance {
    /// Compares `source` with what codes and scales stand for.
    pub fn between<T: Element>(source: &[T], codes: &[u8], scales: &[u8], global: GlobalScale) -> Distance {
        let mut sum = Distance::default();
        let parts = source.chunks(PART).zip(codes.chunks(PART / 2)).zip(scales.chunks(PART / BLOCK));
        for ((source, codes), scales) in parts {
            let mut part = [0.0; 4];
            sums(source, codes, scales, global, &mut part);
            let [source, quantized, product, difference] = part;
            sum.add(Distance { source, quantized, product, difference });
        }
        sum
    }

    /// Adds another part of the same tensor.
    pub fn add(&mut self, other: Distance) {
        self.source += other.source;
        self.quantized += other.quantized;
        self.product += other.product;
        self.difference += other.difference;
    }

    /// `‖w − q‖ / ‖w‖`; 0 where both are zero.
    pub fn relative(self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { (self.difference / self.source).sqrt() }
    }

    /// The cosine of the angle between source and quantized tensor; 1 where either is zero.
    pub fn cosine(self) -> f64 {
        let norms = (self.source * self.quantized).sqrt();
        if norms == 0.0 { 1.0 } else { self.product / norms }
    }
}

/// Elements that are added up in f32, in sixteen lanes, before the sum goes on in f64.
const PART: usize = 64 * BLOCK;

wide! {
    /// `Σ w²`, `Σ q²`, `Σ w·q` and `Σ (w − q)²`, in units of the global scale, so that squares neither overflow nor
    /// vanish.
    fn sums<T: Element>(source: &[T], codes: &[u8], scales: &[u8], global: GlobalScale, out: &mut [f64; 4])
        => sums_body
}

#[inline(always)]
fn sums_body<T: Element>(source: &[T], codes: &[u8], scales: &[u8], global: GlobalScale, out: &mut [f64; 4]) {
    let (unit, multiplier) = (global.divisor(), global.multiplier());
    let mut lanes = [[0f32; BLOCK]; 4];
    let blocks = source.as_chunks::<BLOCK>().0.iter().zip(codes.as_chunks::<{ BLOCK / 2 }>().0);
    for ((source, packed), &scale) in blocks.zip(scales) {
        let step = e4m3::decode(scale) * multiplier * unit;
        let mut code = [0u8; BLOCK];
        for (pair, byte) in code.chunks_exact_mut(2).zip(packed) {
            (pair[0], pair[1]) = (byte & 15, byte >> 4);
        }
        for i in 0..BLOCK {
            let (w, q) = (source[i].to_f32() * unit, e2m1::value(code[i]) * step);
            lanes[0][i] += w * w;
            lanes[1][i] += q * q;
            lanes[2][i] += w * q;
            lanes[3][i] += (w - q) * (w - q);
        }
    }
    *out = lanes.map(|lanes| lanes.iter().map(|&lane| lane as f64).sum());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_weights_have_no_error() {
        let w: Vec<f32> = super::super::e2m1::MAGNITUDES.iter().flat_map(|&m| [m, -m]).collect();
        let global = GlobalScale::from_multiplier(1.0);
        let (mut codes, mut scales) = (vec![0; 8], vec![0; 1]);
        super::super::quantize(&w, global, &mut codes, &mut scales);
        let distance = Distance::between(&w, &codes, &scales, global);
        assert_eq!(distance.relative(), 0.0);
        assert!((distance.cosine() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_error_is_relative_to_the_source() {
        let (w, global) = (vec![1.0f32; 16], GlobalScale::from_multiplier(1.0));
        // Code 3 under scale 1 stands for 1.5: half of each weight too much.
        let distance = Distance::between(&w, &[0x33; 8], &[0x38], global);
        assert!((distance.relative() - 0.5).abs() < 1e-7);
    }
}
