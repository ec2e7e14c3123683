//! Stored elements as f32 and back.

use half::{bf16, f16};
use safetensors::Dtype;

use super::SourceTensor;
use crate::error::{Error, Result};

/// The elements of a BF16, F16 or F32 tensor, which are exact in f32.
///
/// # Errors
/// Exit code 3 for every other dtype.
pub fn widen(tensor: &SourceTensor) -> Result<Vec<f32>> {
    let bytes = tensor.bytes();
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
