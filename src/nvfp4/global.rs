//! The global scale of a tensor, of a fused group or of a linear's input.

use super::{e2m1, e4m3};

/// The f32 by which codes and block scales are multiplied: `amax / 2688`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlobalScale(f32);

/// The largest product of a code and a block scale: 6 · 448.
const LARGEST: f32 = e2m1::MAGNITUDES[7] * e4m3::MAX;

impl GlobalScale {
    /// The scale that maps `amax` to the largest code under the largest block scale. An `amax` of zero, or
    /// one so small that the quotient would be subnormal, gives 1.0: such a tensor has no scale of its own
    /// and all its codes are zero.
    pub fn from_amax(amax: f32) -> GlobalScale {
        if amax < LARGEST * f32::MIN_POSITIVE { GlobalScale(1.0) } else { GlobalScale(amax / LARGEST) }
    }

    /// A scale read from a checkpoint, as a multiplier.
    pub fn from_multiplier(multiplier: f32) -> GlobalScale {
        GlobalScale(multiplier)
    }

    /// As the ModelOpt layout stores it (`weight_scale_2`, `input_scale`).
    pub fn multiplier(self) -> f32 {
        self.0
    }

    /// As the compressed-tensors layout stores it (`weight_global_scale`, `input_global_scale`).
    pub fn divisor(self) -> f32 {
        1.0 / self.0
    }
}
