//! The global scale of a tensor, of a fused group or of a linear's input.

use super::{e2m1, e4m3};

/// The f32 by which codes and block scales are multiplied, `amax / 2688`, and its reciprocal. Layouts store the one or
/// the other, and what is stored is what a loader computes with, so neither is made of the other twice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlobalScale {
    multiplier: f32,
    divisor: f32,
}

/// The largest product of a code and a block scale: 6 · 448.
const LARGEST: f32 = e2m1::MAGNITUDES[7] * e4m3::MAX;

impl GlobalScale {
    /// The scale that maps `amax` to the largest code under the largest block scale. An `amax` of zero, or
    /// one so small that the quotient would be subnormal, gives 1.0: such a tensor has no scale of its own
    /// and all its codes are zero.
    pub fn from_amax(amax: f32) -> GlobalScale {
        let multiplier = if amax < LARGEST * f32::MIN_POSITIVE { 1.0 } else { amax / LARGEST };
        GlobalScale::from_multiplier(multiplier)
    }

    /// A scale read from a checkpoint, as a multiplier.
    pub fn from_multiplier(multiplier: f32) -> GlobalScale {
        GlobalScale { multiplier, divisor: 1.0 / multiplier }
    }

    /// A scale read from a checkpoint, as a divisor.
    pub fn from_divisor(divisor: f32) -> GlobalScale {
        GlobalScale { multiplier: 1.0 / divisor, divisor }
    }

    /// As the ModelOpt layout stores it (`weight_scale_2`, `input_scale`).
    pub fn multiplier(self) -> f32 {
        self.multiplier
    }

    /// As the compressed-tensors layout stores it (`weight_global_scale`, `input_global_scale`).
    pub fn divisor(self) -> f32 {
        self.divisor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_layout_stores_is_what_is_computed_with() {
        for i in 1..5000 {
            let stored = i as f32 * 0.377;
            assert_eq!(GlobalScale::from_divisor(stored).divisor(), stored);
            assert_eq!(GlobalScale::from_multiplier(stored).multiplier(), stored);
            // The writer's scale, in either layout, divides inputs by the same number when it is read.
            let written = GlobalScale::from_amax(stored);
            assert_eq!(GlobalScale::from_divisor(written.divisor()).divisor(), written.divisor());
            assert_eq!(GlobalScale::from_multiplier(written.multiplier()).divisor(), written.divisor());
        }
    }
}
