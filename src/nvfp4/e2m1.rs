//! E2M1: 4-bit floats. A code is `sign << 3 | index`; the eight magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6.

/// Magnitudes by index.
pub const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The nearest code: ties go to the even index, values beyond 6 saturate. The sign bit is set for
/// `x < 0`, so -0.0 becomes code 0 and a negative value that rounds to zero becomes code 8.
#[inline(always)]
pub fn encode(x: f32) -> u8 {
    let a = x.abs();
    // The index is the number of thresholds passed. Between an even index and the odd one above it the
    // midpoint belongs to the even one (`>`), between odd and even likewise (`>=`). Counting instead of
    // branching lets the compiler turn a block into vector compares.
    let index = (a > 0.25) as u8
        + (a >= 0.75) as u8
        + (a > 1.25) as u8
        + (a >= 1.75) as u8
        + (a > 2.5) as u8
        + (a >= 3.5) as u8
        + (a > 5.0) as u8;
    index | (((x < 0.0) as u8) << 3)
}

/// The value of the nearest code, as a sum of the steps that are passed: selects instead of a table keep this in
/// vectors.
#[inline(always)]
pub fn nearest(x: f32) -> f32 {
    let a = x.abs();
    let on = |passed: bool, by: f32| if passed { by } else { 0.0 };
    let magnitude = on(a > 0.25, 0.5)
        + on(a >= 0.75, 0.5)
        + on(a > 1.25, 0.5)
        + on(a >= 1.75, 0.5)
        + on(a > 2.5, 1.0)
        + on(a >= 3.5, 1.0)
        + on(a > 5.0, 2.0);
    magnitude.copysign(x)
}

/// The value of a code (only the low four bits count). Code 8 is -0.0.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    let magnitude = MAGNITUDES[(code & 7) as usize];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The value of a code, computed rather than looked up, which keeps loops in vectors: from index 2 on, an index is
/// the exponent and the mantissa bit of an f32.
#[inline(always)]
pub fn value(code: u8) -> f32 {
    let index = (code & 7) as u32;
    let normal = f32::from_bits((126 << 23) + (index << 22));
    let magnitude = if index < 2 { index as f32 * 0.5 } else { normal };
    f32::from_bits(magnitude.to_bits() | ((code & 8) as u32) << 28)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computed_values_are_those_of_the_table() {
        for code in 0..16 {
            assert_eq!(value(code).to_bits(), decode(code).to_bits(), "{code}");
        }
        for step in -700..=700 {
            let x = step as f32 / 100.0;
            assert_eq!(nearest(x), decode(encode(x)), "{x}");
        }
    }
}
