//! How far a quantized tensor is from its source.

use super::{BLOCK, Element, GlobalScale, dequantize};

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
        let mut q = [0f32; BLOCK];
        let blocks = codes.chunks_exact(BLOCK / 2).zip(scales);
        // In units of the global scale, so that squares neither overflow nor vanish.
        let unit = global.divisor();
        for ((packed, scale), w) in blocks.zip(source.chunks_exact(BLOCK)) {
            dequantize(packed, std::slice::from_ref(scale), global, &mut q);
            let pairs: [(f32, f32); BLOCK] = std::array::from_fn(|i| (w[i].to_f32() * unit, q[i] * unit));
            // Sixteen terms in f32 are exact enough; blocks are added in f64.
            let total = |f: fn(f32, f32) -> f32| pairs.iter().map(|&(w, q)| f(w, q)).sum::<f32>() as f64;
            sum.add(Distance {
                source: total(|w, _| w * w),
                quantized: total(|_, q| q * q),
                product: total(|w, q| w * q),
                difference: total(|w, q| (w - q) * (w - q)),
            });
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
