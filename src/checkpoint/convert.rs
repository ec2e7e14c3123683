//! Stored elements as f32 and back.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::SourceTensor;
use crate::error::{Error, Result};

/// The elements of a BF16, F16 or F32 tensor, which are exact in f32.
///
/// # Errors
/// Exit code 3 for every other dtype, and as [`SourceTensor::checked`].
pub fn widen(tensor: &SourceTensor) -> Result<Vec<f32>> {
    let bytes = tensor.checked()?;
    let pair = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    Ok(match tensor.dtype {
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| f32::from_bits((pair(b) as u32) << 16)).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_bits(pair(b)).to_f32()).collect(),
        Dtype::F32 => bytemuck::pod_collect_to_vec(bytes),
        other => {
            return Err(Error::input(format!("the dtype is {other:?}"))
                .tensor(&tensor.name)
                .fix("use a checkpoint in BF16, F16 or F32"));
        }
    })
}

/// The index of the first element that is NaN or infinite: where all bits of the exponent are set. At the rate of memory,
/// on several threads.
pub fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    /// Bytes that one thread looks at.
    const PART: usize = 1 << 20;
    fn find<const N: usize>(bytes: &[u8], exponent: [u8; N]) -> Option<usize> {
        // Without a branch for each element, so that the compiler makes vectors of it.
        let is_odd = |x: &[u8]| x.iter().zip(&exponent).all(|(x, mask)| x & mask == *mask);
        let any = |part: &[u8]| part.chunks_exact(N).fold(false, |odd, x| odd | is_odd(x));
        let part = bytes.par_chunks(PART).position_first(any)?;
        let within = bytes[part * PART..].chunks_exact(N).position(is_odd)?;
        Some(part * PART / N + within)
    }
    match dtype {
        Dtype::BF16 => find(bytes, [0x80, 0x7F]),
        Dtype::F16 => find(bytes, [0x00, 0x7C]),
        Dtype::F32 => find(bytes, [0x00, 0x00, 0x80, 0x7F]),
        _ => None,
    }
}

/// What storing `x` as BF16 or F16 makes of it, to nearest, ties to even; every other dtype keeps f32.
pub fn stored(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The bytes of values stored as BF16, F16 or F32, little endian.
pub fn narrow(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_not_finite_is_found_wherever_it_is() {
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            // The largest finite values, zeros of both signs, a subnormal; in more than one part.
            let largest = if dtype == Dtype::F16 { 65504.0 } else { 3e38 };
            let mut values: Vec<f32> = [largest, -largest, 0.0, -0.0, 1e-7, 1.0].repeat(200_000);
            assert_eq!(first_not_finite(dtype, &narrow(dtype, &values)), None, "{dtype:?}");
            for (at, odd) in [(1_100_000, f32::NAN), (600_001, f32::NEG_INFINITY), (0, f32::INFINITY)] {
                values[at] = odd;
                assert_eq!(first_not_finite(dtype, &narrow(dtype, &values)), Some(at), "{dtype:?}");
            }
        }
        assert_eq!(first_not_finite(Dtype::BF16, &[]), None);
    }

    #[test]
    fn values_survive_the_way_there_and_back() {
        let values = [1.5f32, -0.25, 0.0, -3.0];
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            let tensor = SourceTensor::from_bytes("w", dtype, &[4], &narrow(dtype, &values)).unwrap();
            assert_eq!(widen(&tensor).unwrap(), values);
        }
        assert_eq!(stored(Dtype::BF16, 1.001), 1.0);
        assert_eq!(stored(Dtype::F32, 1.001), 1.001);
    }
}
