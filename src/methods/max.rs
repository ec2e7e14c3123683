//! Max calibration: one global scale for a fused group, block scales from block maxima.

use crate::backend::Backend;
use crate::error::Result;
use crate::forward::Linear;
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear};

/// `max |w|` of each member of a fused group; NaN or infinite where an element is.
pub fn weight_amax<'a, B: Backend>(
    backend: &B,
    members: impl IntoIterator<Item = &'a Linear<B::Tensor>>,
) -> Result<Vec<f32>>
where
    B::Tensor: 'a,
{
    members.into_iter().map(|linear| backend.weight_amax(&linear.weight)).collect()
}

/// Quantizes one member of a group with the group's global scale. `spare` lends its memory.
pub fn quantize_linear<B: Backend>(
    backend: &B,
    member: &Linear<B::Tensor>,
    elements: usize,
    global: GlobalScale,
    spare: QuantizedLinear,
) -> Result<QuantizedLinear> {
    let QuantizedLinear { mut codes, mut scales } = spare;
    codes.resize(elements / 2, 0);
    scales.resize(elements / BLOCK, 0);
    backend.quantize(&member.weight, global, &mut codes, &mut scales)?;
    Ok(QuantizedLinear { codes, scales })
}
