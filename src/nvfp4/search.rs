//! Block scales by exact search: the E4M3 scale under which a block's codes lose least.
//!
//! `L(c) = Σ ω_i (w_i − s·E2M1(w_i / s))²` with `s = E4M3[c] · global`, for weights `ω >= 0`. Scales smaller than
//! the block's maximum asks for clip it, and what clipping alone loses only grows as `s` shrinks, so the search
//! downwards ends exactly where that reaches the best loss so far. Upwards the best scale lies at most seven
//! codes above (arXiv 2606.07618). The result equals a search over all 126 scales (`properties`), at the cost
//! of about ten.

use super::{BLOCK, GlobalScale, e2m1, e4m3};
use crate::simd::wide;

/// How far above the maximum's scale the best one can lie, in codes.
const ABOVE: u8 = 7;

/// The largest code: E4M3's 448.
const LAST: u8 = 0x7E;

wide! {
    /// Quantizes rows of `importance.len()` elements, concatenated in `w`, each block under the scale whose
    /// squared error, weighted by its columns' `importance`, is smallest. `codes` and `scales` as in
    /// [`super::quantize`]. Of equal scales the first in the order of [`best_scale`] is kept.
    ///
    /// # Panics
    /// Where the lengths do not fit.
    pub fn quantize_searched(w: &[f32], importance: &[f32], global: GlobalScale, codes: &mut [u8], scales: &mut [u8])
        => quantize_searched_body
}

#[inline(always)]
fn quantize_searched_body(
    w: &[f32],
    importance: &[f32],
    global: GlobalScale,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let cols = importance.len();
    assert!(cols.is_multiple_of(BLOCK) && w.len().is_multiple_of(cols), "rows are whole blocks");
    assert_eq!((codes.len() * 2, scales.len() * BLOCK), (w.len(), w.len()), "outputs fit the weights");
    let blocks = w.as_chunks::<BLOCK>().0.iter().zip(importance.as_chunks::<BLOCK>().0.iter().cycle());
    for ((w, importance), (packed, scale)) in blocks.zip(codes.chunks_exact_mut(BLOCK / 2).zip(scales)) {
        *scale = best_scale(w, importance, global);
        let step = e4m3::decode(*scale) * global.multiplier();
        let mut code = [0u8; BLOCK];
        for (code, w) in code.iter_mut().zip(w) {
            *code = e2m1::encode(w / step);
        }
        for (byte, pair) in packed.iter_mut().zip(code.chunks_exact(2)) {
            *byte = pair[0] | (pair[1] << 4);
        }
    }
}

/// The E4M3 byte under which a block loses least. A block of zeros takes 1.0, as with max scales. Of equal
/// losses the first wins, in this order: the maximum's scale, larger ones upwards, smaller ones downwards.
#[inline(always)]
pub fn best_scale(w: &[f32; BLOCK], importance: &[f32; BLOCK], global: GlobalScale) -> u8 {
    let global = global.multiplier();
    let amax = w.iter().fold(0f32, |amax, w| amax.max(w.abs()));
    if amax == 0.0 {
        return 0x38;
    }
    let first = e4m3::encode((amax / (6.0 * global)).clamp(e4m3::MIN_POSITIVE, e4m3::MAX));
    let (mut best, mut least) = (first, loss(w, importance, e4m3::decode(first) * global));
    let mut try_scale = |byte: u8, least: &mut f32| {
        let loss = loss(w, importance, e4m3::decode(byte) * global);
        if loss < *least {
            (best, *least) = (byte, loss);
        }
    };
    for byte in first + 1..=(first + ABOVE).min(LAST) {
        try_scale(byte, &mut least);
    }
    for byte in (1..first).rev() {
        if clipped(w, importance, 6.0 * e4m3::decode(byte) * global) >= least {
            break;
        }
        try_scale(byte, &mut least);
    }
    best
}

/// `Σ ω (w − q)²` of a block under a step.
#[inline(always)]
fn loss(w: &[f32; BLOCK], importance: &[f32; BLOCK], step: f32) -> f32 {
    let mut terms = [0f32; BLOCK];
    for ((term, w), importance) in terms.iter_mut().zip(w).zip(importance) {
        let error = w - e2m1::nearest(w / step) * step;
        *term = importance * (error * error);
    }
    total(terms)
}

/// What clipping to `limit` alone loses.
#[inline(always)]
fn clipped(w: &[f32; BLOCK], importance: &[f32; BLOCK], limit: f32) -> f32 {
    let mut terms = [0f32; BLOCK];
    for ((term, w), importance) in terms.iter_mut().zip(w).zip(importance) {
        let beyond = (w.abs() - limit).max(0.0);
        *term = importance * (beyond * beyond);
    }
    total(terms)
}

/// A sum whose order is a tree, so that vectors can hold it.
#[inline(always)]
fn total(mut terms: [f32; BLOCK]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            terms[i] += terms[i + half];
        }
    }
    terms[0]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{amax, quantize};
    use super::*;

    /// The least loss over all 126 scales.
    fn exhaustive(w: &[f32; BLOCK], importance: &[f32; BLOCK], global: GlobalScale) -> f32 {
        let loss = |byte| loss(w, importance, e4m3::decode(byte) * global.multiplier());
        (1..=LAST).map(loss).fold(f32::INFINITY, f32::min)
    }

    fn block(spread: i32) -> impl Strategy<Value = [f32; BLOCK]> {
        prop::array::uniform16(prop_oneof![
            8 => (-1.0f32..1.0, -spread..=0).prop_map(|(m, e)| m * 2f32.powi(e)),
            1 => Just(0.0),
        ])
    }

    /// Weights as uneven as the second moments of real inputs: log-normal with up to two e-folds.
    fn importance() -> impl Strategy<Value = [f32; BLOCK]> {
        prop::array::uniform16(prop_oneof![9 => (-8.0f32..8.0).prop_map(f32::exp), 1 => Just(0.0)])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn the_search_equals_all_126_scales(w in block(6), importance in importance(), shrink in 0i32..8) {
            let global = GlobalScale::from_amax(amax(&w).max(1e-6) * 2f32.powi(shrink));
            let best = best_scale(&w, &importance, global);
            let found = loss(&w, &importance, e4m3::decode(best) * global.multiplier());
            prop_assert_eq!(found, if amax(&w) == 0.0 { 0.0 } else { exhaustive(&w, &importance, global) });
        }

        #[test]
        fn the_search_is_never_worse_than_max(w in block(4), importance in importance()) {
            let global = GlobalScale::from_amax(amax(&w).max(1e-6));
            let (mut codes, mut max, mut searched) = ([0; 8], [0; 1], [0; 1]);
            quantize(&w, global, &mut codes, &mut max);
            quantize_searched(&w, &importance, global, &mut codes, &mut searched);
            let loss = |byte| loss(&w, &importance, e4m3::decode(byte) * global.multiplier());
            prop_assert!(loss(searched[0]) <= loss(max[0]));
        }
    }

    #[test]
    fn codes_are_the_nearest_under_the_chosen_scale_and_columns_keep_their_importance() {
        // Two rows of two blocks; only the second block's columns matter, so the first keeps max's scale.
        let w: Vec<f32> = (0..64).map(|i| ((i * 29 % 64) as f32 - 31.5) / 31.5).collect();
        let mut importance = [0.0; 32];
        importance[16..].fill(1.0);
        let global = GlobalScale::from_amax(1.0);
        let (mut codes, mut scales) = (vec![0; 32], vec![0; 4]);
        quantize_searched(&w, &importance, global, &mut codes, &mut scales);
        let (mut max_codes, mut max_scales) = (vec![0; 32], vec![0; 4]);
        quantize(&w, global, &mut max_codes, &mut max_scales);
        assert_eq!([scales[0], scales[2]], [max_scales[0], max_scales[2]]);
        assert_eq!(codes[..8], max_codes[..8]);
        for (i, &scale) in scales.iter().enumerate() {
            let step = e4m3::decode(scale) * global.multiplier();
            let expected = e2m1::encode(w[i * 16 + 1] / step);
            assert_eq!(codes[i * 8] >> 4, expected);
        }
    }
}
