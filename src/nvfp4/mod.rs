//! The NVFP4 number format: E2M1 codes, E4M3 block scales, one f32 global scale. Pure functions on slices.

/// The f32 global scale of a tensor (or of a fused group): `amax / 2688`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlobalScale(pub f32);
