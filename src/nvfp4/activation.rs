//! What an engine does to a linear's input at run time: a static global scale, a block scale from the
//! block's own maximum, rounding to nearest.

use super::{BLOCK, GlobalScale, e2m1, e4m3};
use crate::simd::wide;

wide! {
    /// Quantizes and dequantizes whole blocks in place, in f32, as stock engines do: the block scale is
    /// `E4M3(min(448, divisor · (amax · 1/6)))` without a lower clamp, and a block whose scale rounds to zero
    /// becomes zero.
    ///
    /// # Panics
    /// Where `x` is not a whole number of blocks.
    pub fn quantize_dequantize(x: &mut [f32], input: GlobalScale) => quantize_dequantize_body
}

#[inline(always)]
fn quantize_dequantize_body(x: &mut [f32], input: GlobalScale) {
    assert_eq!(x.len() % BLOCK, 0, "activations are whole blocks");
    let divisor = input.divisor();
    for block in x.as_chunks_mut::<BLOCK>().0 {
        // The bits of non-negative floats order like the floats, and an integer maximum vectorizes.
        let amax = block.iter().fold(0, |amax, x| (x.to_bits() & 0x7FFF_FFFF).max(amax));
        let amax = f32::from_bits(amax);
        let scale = e4m3::decode(e4m3::encode((divisor * (amax * (1.0 / 6.0))).min(e4m3::MAX)));
        if scale == 0.0 {
            block.fill(0.0);
            continue;
        }
        let step = scale / divisor;
        for x in block {
            *x = e2m1::nearest(*x / step) * step;
        }
    }
}
