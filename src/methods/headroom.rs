//! Room above the largest input that calibration saw.
//!
//! A linear's inputs have a static global scale, and block scales in E4M3 under it. A block beyond the calibrated
//! maximum is clipped, while below it E4M3 has more range than inputs use. Doubling the maximum halves every block
//! scale, which is exact as long as the scale stays a normal number: codes don't change, and twice the range is there
//! for what calibration did not see.

use crate::nvfp4::{BLOCK, amax};

/// The most room, as a multiple of the calibrated maximum.
const MOST: f32 = 16.0;

/// The largest block over the smallest one whose scale is normal: 448 / 2^-6.
const NORMAL: f32 = 28672.0;

/// Blocks this much smaller than the largest have no say: they are zero in effect.
const NOTHING: f32 = 1e-6;

/// By how much the maximum `largest` of an input may be multiplied: the largest power of two that leaves 99 of 100
/// blocks of `rows`, which are whole blocks, a normal scale.
pub fn headroom(rows: &[f32], largest: f32) -> f32 {
    let blocks = rows.as_chunks::<BLOCK>().0.iter().map(|block| amax(block));
    let mut blocks: Vec<f32> = blocks.filter(|&block| block > NOTHING * largest).collect();
    if blocks.is_empty() {
        return 1.0;
    }
    let percentile = blocks.len() / 100;
    let (_, &mut small, _) = blocks.select_nth_unstable_by(percentile, f32::total_cmp);
    let mut room = 1.0;
    while room < MOST && 2.0 * room * largest <= NORMAL * small {
        room *= 2.0;
    }
    room
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvfp4::GlobalScale;
    use crate::nvfp4::activation::quantize_dequantize;

    /// Blocks whose maxima are these.
    fn rows(maxima: impl IntoIterator<Item = f32>) -> Vec<f32> {
        let shape = |i: usize| if i == 5 { 1.0 } else { (i as f32 - 8.0) / 11.0 };
        maxima.into_iter().flat_map(|max| (0..BLOCK).map(move |i| max * shape(i))).collect()
    }

    #[test]
    fn small_blocks_bound_the_room_and_one_in_a_hundred_has_no_say() {
        let spread = |small: f32| rows((0..1000).map(|i| if i < 20 { small } else { 1.0 }));
        assert_eq!(headroom(&spread(1.0), 1.0), 16.0);
        assert_eq!(headroom(&spread(8.0 / NORMAL), 1.0), 8.0);
        assert_eq!(headroom(&spread(7.9 / NORMAL), 1.0), 4.0);
        assert_eq!(headroom(&spread(0.5 / NORMAL), 1.0), 1.0);
        let few = rows((0..1000).map(|i| if i < 10 { 1e-5 } else { 1.0 }));
        assert_eq!(headroom(&few, 1.0), 16.0);
        let empty = rows((0..1000).map(|i| if i < 500 { 0.0 } else { 1.0 }));
        assert_eq!(headroom(&empty, 1.0), 16.0);
        assert_eq!(headroom(&[0.0; 64], 1.0), 1.0);
    }

    #[test]
    fn room_changes_no_block_with_a_normal_scale() {
        let rows = rows((0..3000).map(|i| (i as f32 * 0.37).sin().abs() * 20.0 + 0.05));
        let largest = amax(&rows);
        let room = headroom(&rows, largest);
        assert_eq!(room, 16.0);
        let (mut tight, mut roomy) = (rows.clone(), rows);
        quantize_dequantize(&mut tight, GlobalScale::from_amax(largest));
        quantize_dequantize(&mut roomy, GlobalScale::from_amax(room * largest));
        assert_eq!(tight, roomy);
    }
}
