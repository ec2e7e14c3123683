//! Matrices in host memory.

use bytemuck::Pod;
use half::bf16;
use safetensors::Dtype;

use crate::backend::Compute;
use crate::checkpoint::{SourceTensor, widen};
use crate::error::{Error, Result};
use crate::nvfp4::Element;

/// A row-major matrix in host memory.
pub struct Tensor {
    /// Rows in use.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    data: Data,
}

enum Data {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
    /// A BF16 or F32 tensor used where its file is mapped.
    Mapped(SourceTensor),
}

/// A tensor's elements.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// BF16.
    Bf16(&'a [bf16]),
    /// F32.
    F32(&'a [f32]),
}

/// An activation's element: BF16 or F32, with the rounding that storing it implies.
pub trait Scalar: Element + Pod {
    /// The value, exact.
    #[inline(always)]
    fn get(self) -> f32 {
        self.to_f32()
    }
    /// The nearest value, ties to even.
    fn round(x: f32) -> Self;
    /// A tensor's elements, which must be of this type.
    fn of(tensor: &Tensor) -> &[Self];
    /// An owned tensor's elements, which must be of this type.
    fn of_mut(tensor: &mut Tensor) -> &mut [Self];
}

impl Scalar for f32 {
    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }

    fn of(tensor: &Tensor) -> &[f32] {
        match tensor.view() {
            View::F32(x) => x,
            View::Bf16(_) => unreachable!("activations have the compute dtype"),
        }
    }

    fn of_mut(tensor: &mut Tensor) -> &mut [f32] {
        let n = tensor.rows * tensor.cols;
        match &mut tensor.data {
            Data::F32(x) => &mut x[..n],
            _ => unreachable!("activations are owned and have the compute dtype"),
        }
    }
}

impl Scalar for bf16 {
    #[inline(always)]
    fn round(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        // Rounding could turn a NaN with a small payload into infinity; keep it a quiet NaN.
        let nan = (bits >> 16) | 0x40;
        bf16::from_bits(if bits & 0x7FFF_FFFF > 0x7F80_0000 { nan } else { rounded } as u16)
    }

    fn of(tensor: &Tensor) -> &[bf16] {
        match tensor.view() {
            View::Bf16(x) => x,
            View::F32(_) => unreachable!("activations have the compute dtype"),
        }
    }

    fn of_mut(tensor: &mut Tensor) -> &mut [bf16] {
        let n = tensor.rows * tensor.cols;
        match &mut tensor.data {
            Data::Bf16(x) => &mut x[..n],
            _ => unreachable!("activations are owned and have the compute dtype"),
        }
    }
}

impl Tensor {
    /// A matrix of zeros in the compute dtype.
    pub fn zeros(compute: Compute, rows: usize, cols: usize) -> Tensor {
        let data = match compute {
            Compute::Bf16 => Data::Bf16(vec![bf16::ZERO; rows * cols]),
            Compute::F32 => Data::F32(vec![0.0; rows * cols]),
        };
        Tensor { rows, cols, data }
    }

    /// f32 values, rounded to the compute dtype.
    pub fn from_f32(compute: Compute, values: &[f32], cols: usize) -> Tensor {
        let data = match compute {
            Compute::Bf16 => Data::Bf16(values.iter().map(|&x| bf16::round(x)).collect()),
            Compute::F32 => Data::F32(values.to_vec()),
        };
        Tensor { rows: values.len() / cols.max(1), cols, data }
    }

    /// A stored tensor. Matrices keep BF16 or F32 and stay where they are mapped (F16 becomes F32, which is
    /// exact); vectors become the compute dtype, since they only take part in activations.
    pub fn from_source(compute: Compute, source: &SourceTensor) -> Result<Tensor> {
        let bytes = source.checked()?;
        let (rows, cols) = match source.shape.as_slice() {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            shape => {
                return Err(Error::input(format!("a weight has one or two dimensions, not {shape:?}"))
                    .tensor(&source.name)
                    .fix("use a checkpoint of a supported architecture"));
            }
        };
        let vector = source.shape.len() == 1;
        let in_place = match source.dtype {
            Dtype::BF16 => bytemuck::try_cast_slice::<u8, bf16>(bytes).is_ok(),
            Dtype::F32 => bytemuck::try_cast_slice::<u8, f32>(bytes).is_ok(),
            _ => false,
        };
        let data = if vector {
            let values = widen(source)?;
            return Ok(Tensor::from_f32(compute, &values, cols));
        } else if in_place {
            Data::Mapped(source.clone())
        } else if source.dtype == Dtype::BF16 {
            Data::Bf16(bytemuck::pod_collect_to_vec(bytes))
        } else {
            Data::F32(widen(source)?)
        };
        Ok(Tensor { rows, cols, data })
    }

    /// The elements in use.
    pub fn view(&self) -> View<'_> {
        let n = self.rows * self.cols;
        match &self.data {
            Data::Bf16(x) => View::Bf16(&x[..n]),
            Data::F32(x) => View::F32(&x[..n]),
            Data::Mapped(source) if source.dtype == Dtype::BF16 => {
                View::Bf16(bytemuck::cast_slice(source.bytes()))
            }
            Data::Mapped(source) => View::F32(bytemuck::cast_slice(source.bytes())),
        }
    }

    /// Rows that fit.
    pub fn capacity(&self) -> usize {
        let n = match &self.data {
            Data::Bf16(x) => x.len(),
            Data::F32(x) => x.len(),
            Data::Mapped(_) => self.rows * self.cols,
        };
        n / self.cols.max(1)
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn rounding_to_bf16_is_to_nearest_even() {
        for bits in (0..u32::MAX - 7919).step_by(7919) {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (bf16::round(x), bf16::from_f32(x));
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
    }

    #[test]
    fn misaligned_and_narrow_sources_are_read_exactly() {
        let values = [1.5f32, -0.25, 3.0, 0.0];
        let halves: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let source = SourceTensor::from_bytes("w", Dtype::F16, &[2, 2], &halves).unwrap();
        let tensor = Tensor::from_source(Compute::F32, &source).unwrap();
        assert!(matches!(tensor.view(), View::F32(x) if x == values));
        let source = SourceTensor::from_bytes("norm", Dtype::F16, &[4], &halves).unwrap();
        let tensor = Tensor::from_source(Compute::Bf16, &source).unwrap();
        assert_eq!((tensor.rows, tensor.cols), (1, 4));
        assert!(matches!(tensor.view(), View::Bf16(x) if x[1].get() == -0.25));
    }
}
