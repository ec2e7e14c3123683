//! E4M3FN: 8-bit floats with bias 7, no infinity, NaN at 0x7F and 0xFF. Block scales use the
//! non-negative half.

/// The largest finite value, byte 0x7E.
pub const MAX: f32 = 448.0;
/// The smallest positive value, byte 0x01: 2^-9.
pub const MIN_POSITIVE: f32 = 1.0 / 512.0;

/// The byte nearest to a non-negative `x`; ties go to the even byte, values beyond 448 saturate.
/// `x` must not be NaN.
#[inline(always)]
pub fn encode(x: f32) -> u8 {
    let x = x.min(MAX);
    // 2^14 + x has an ulp of 2^-9, the spacing of E4M3's subnormals: the f32 addition rounds to nearest,
    // ties to even, exactly as the format asks.
    let subnormal = (x + 16384.0).to_bits() as u8;
    // Normal values drop 20 of 23 mantissa bits: add just under half of the last kept place, plus its own
    // lowest bit, so that a tie rounds to even; then move the exponent's bias from 127 to 7.
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7_FFFF + ((bits >> 20) & 1)) >> 20;
    let normal = rounded.wrapping_sub((127 - 7) << 3) as u8;
    if x < 1.0 / 64.0 { subnormal } else { normal }
}

/// The value of a byte; a set sign bit negates.
#[inline(always)]
pub fn decode(byte: u8) -> f32 {
    VALUES[byte as usize]
}

static VALUES: [f32; 256] = values();

const fn values() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (exponent, mantissa) = ((byte >> 3) & 15, byte & 7);
        let magnitude = if exponent == 15 && mantissa == 7 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 * MIN_POSITIVE
        } else {
            f32::from_bits(((exponent as u32 + 127 - 7) << 23) | ((mantissa as u32) << 20))
        };
        table[byte] = if byte < 128 { magnitude } else { -magnitude };
        byte += 1;
    }
    table
}
