//! Max calibration: one global scale for a fused group, block scales from block maxima.

use crate::backend::Backend;
use crate::error::Result;
use crate::model::Linear;
use crate::nvfp4::{BLOCK, GlobalScale};

/// A linear's codes `[rows, cols / 2]` (two a byte) and E4M3 block scales `[rows, cols / 16]`.
pub struct QuantizedLinear {
    /// Packed E2M1 codes.
    pub codes: Vec<u8>,
    /// E4M3 block scales.
    pub scales: Vec<u8>,
}

/// `max |w|` of each member of a fused group; NaN or infinite where an element is.
pub fn weight_amax<B: Backend>(backend: &B, members: &[Linear<B::Tensor>]) -> Result<Vec<f32>> {
    members.iter().map(|linear| backend.weight_amax(&linear.weight)).collect()
}

/// Quantizes one member of a group with the group's global scale.
pub fn quantize_linear<B: Backend>(
    backend: &B,
    member: &Linear<B::Tensor>,
    elements: usize,
    global: GlobalScale,
) -> Result<QuantizedLinear> {
    let mut codes = vec![0; elements / 2];
    let mut scales = vec![0; elements / BLOCK];
    backend.quantize(&member.weight, global, &mut codes, &mut scales)?;
    Ok(QuantizedLinear { codes, scales })
}
