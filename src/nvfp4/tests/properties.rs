//! Random blocks against a slow implementation that searches for the nearest value in f64.

use half::bf16;
use proptest::prelude::*;

use crate::nvfp4::*;

/// The nearest of `values` (ascending) to `x >= 0`, ties to the even index, by exhaustive search.
fn nearest(x: f64, values: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        let (now, then) = ((value - x).abs(), (values[best] - x).abs());
        if now < then || (now == then && i % 2 == 0) {
            best = i;
        }
    }
    best
}

/// One block, one f32 operation at a time, rounding by search.
fn slow(block: &[f32], global: f32) -> (u8, Vec<u8>) {
    let bytes: Vec<f64> = (0..127)
        .map(|c: i32| {
            let (e, m) = (c >> 3, (c & 7) as f64);
            if e == 0 { m * 2f64.powi(-9) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) }
        })
        .collect();
    let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let amax = block.iter().map(|w| w.abs()).fold(0.0f32, |a, b| if b > a { b } else { a });
    let ratio = amax / (6.0f32 * global);
    let ratio = if ratio == 0.0 { 1.0 } else { ratio };
    let clamped = (ratio as f64).clamp(bytes[1], bytes[126]);
    let scale = nearest(clamped, &bytes);
    let step = bytes[scale] as f32 * global;
    let codes = block.iter().map(|&w| {
        let x = w / step;
        nearest(x.abs() as f64, &magnitudes) as u8 + if x < 0.0 { 8 } else { 0 }
    });
    (scale as u8, codes.collect())
}

fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -1.0f32..1.0,
        2 => (-1.0f32..1.0, -40i32..20).prop_map(|(m, e)| m * 2f32.powi(e)),
        1 => (0usize..8, any::<bool>(), -8i32..8).prop_map(|(i, negative, e)| {
            let m = e2m1::MAGNITUDES[i] * 2f32.powi(e);
            if negative { -m } else { m }
        }),
        1 => Just(0.0),
        1 => Just(-0.0),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn blocks_equal_the_slow_search(w in prop::collection::vec(weight(), 64), shrink in 0i32..3) {
        let w: Vec<bf16> = w.into_iter().map(bf16::from_f32).collect();
        // A smaller global scale than the maximum asks for makes blocks saturate.
        let global = GlobalScale::from_amax(amax(&w) * 0.5f32.powi(shrink));
        let (mut codes, mut scales) = (vec![0; 32], vec![0; 4]);
        quantize(&w, global, &mut codes, &mut scales);
        for (b, block) in w.chunks(BLOCK).enumerate() {
            let block: Vec<f32> = block.iter().map(|w| w.to_f32()).collect();
            let (scale, expected) = slow(&block, global.multiplier());
            prop_assert_eq!(scales[b], scale);
            for (i, code) in expected.into_iter().enumerate() {
                let byte = codes[b * 8 + i / 2];
                prop_assert_eq!(if i % 2 == 0 { byte & 15 } else { byte >> 4 }, code, "element {}", i);
            }
        }
    }

    #[test]
    fn the_error_of_an_element_is_at_most_half_a_gap(w in prop::collection::vec(-1.0f32..1.0, 16)) {
        let global = GlobalScale::from_amax(amax(&w));
        let (mut codes, mut scales, mut back) = (vec![0; 8], vec![0; 1], vec![0.0; 16]);
        quantize(&w, global, &mut codes, &mut scales);
        dequantize(&codes, &scales, global, &mut back);
        // The widest gap is 2 (4 to 6); the block's largest element may lie up to one rounding of the
        // scale (1/16) above 6.
        let step = e4m3::decode(scales[0]) * global.multiplier();
        for (w, q) in w.iter().zip(back) {
            prop_assert!((w - q).abs() <= step * 1.001, "{} became {}", w, q);
        }
    }

    #[test]
    fn e4m3_is_the_nearest_value(x in 0.0f32..500.0) {
        let values: Vec<f64> = (0..127).map(|c| e4m3::decode(c) as f64).collect();
        prop_assert_eq!(e4m3::encode(x) as usize, nearest(x.min(448.0) as f64, &values));
    }
}
