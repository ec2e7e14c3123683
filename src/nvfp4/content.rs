//! What a quantized tensor is made of: shares that betray a degenerate one.

use super::BLOCK;

/// Counts over a tensor's codes and block scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Elements.
    pub elements: u64,
    /// Codes 0 and 8.
    pub zero_codes: u64,
    /// Codes of magnitude 6.
    pub saturated_codes: u64,
    /// Blocks whose codes are all zero.
    pub zero_blocks: u64,
    /// Block scales below the smallest normal E4M3 value (bytes under 0x08).
    pub subnormal_scales: u64,
    /// Block scales 0x00 over codes that are not all zero: such blocks lost their content.
    pub lost_blocks: u64,
    /// Block scales with the sign bit set, or NaN.
    pub invalid_scales: u64,
    /// The largest block scale byte.
    pub largest_scale: u8,
    /// Block scales by exponent: 0 holds the subnormal ones, 15 those from 256 on.
    pub exponents: [u64; 16],
}

impl Content {
    /// Counts codes and scales of whole blocks.
    pub fn of(codes: &[u8], scales: &[u8]) -> Content {
        let mut content = Content { elements: codes.len() as u64 * 2, ..Content::default() };
        for (packed, &scale) in codes.chunks_exact(BLOCK / 2).zip(scales) {
            let block = u64::from_le_bytes(packed.try_into().expect("blocks are eight bytes"));
            // Nibble-wise tests on 16 codes at once: `any` has bit 0 of a nibble set where the magnitude is
            // not zero, `all` where its three bits are all ones.
            let ones = 0x1111_1111_1111_1111u64;
            let any = (block | block >> 1 | block >> 2) & ones;
            let all = (block & block >> 1 & block >> 2) & ones;
            content.zero_codes += (BLOCK as u32 - any.count_ones()) as u64;
            content.saturated_codes += all.count_ones() as u64;
            content.zero_blocks += (any == 0) as u64;
            content.subnormal_scales += (scale < 0x08) as u64;
            content.lost_blocks += (scale == 0 && any != 0) as u64;
            content.invalid_scales += (scale >= 0x7F) as u64;
            content.largest_scale = content.largest_scale.max(scale);
            content.exponents[(scale >> 3 & 15) as usize] += 1;
        }
        content
    }

    /// This part and another of the same tensor.
    pub fn and(mut self, other: Content) -> Content {
        self.elements += other.elements;
        self.zero_codes += other.zero_codes;
        self.saturated_codes += other.saturated_codes;
        self.zero_blocks += other.zero_blocks;
        self.subnormal_scales += other.subnormal_scales;
        self.lost_blocks += other.lost_blocks;
        self.invalid_scales += other.invalid_scales;
        self.largest_scale = self.largest_scale.max(other.largest_scale);
        self.exponents.iter_mut().zip(other.exponents).for_each(|(sum, count)| *sum += count);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_counted_by_nibble() {
        // 0 8 | 7 F | 1 2 | 4 6 | and four zero pairs.
        let content = Content::of(&[0x80, 0xF7, 0x21, 0x64, 0, 0, 0, 0], &[0x07]);
        assert_eq!((content.zero_codes, content.saturated_codes, content.zero_blocks), (10, 2, 0));
        assert_eq!((content.subnormal_scales, content.lost_blocks, content.invalid_scales), (1, 0, 0));
    }

    #[test]
    fn bad_scales_are_counted() {
        let content = Content::of(&[0x11; 8], &[0x00])
            .and(Content::of(&[0x88; 8], &[0x80]))
            .and(Content::of(&[0x11; 8], &[0x7F]));
        assert_eq!((content.lost_blocks, content.invalid_scales, content.zero_blocks), (1, 2, 1));
        assert_eq!(content.largest_scale, 0x80);
        assert_eq!((content.exponents[0], content.exponents[15]), (2, 1));
    }
}
