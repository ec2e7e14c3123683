//! Matrices on the GPU.

use cudarc::driver::{CudaSlice, DevicePtr};
use half::bf16;

use super::Cuda;
use crate::backend::Compute;
use crate::backend::cpu;
use crate::checkpoint::SourceTensor;
use crate::error::{Error, Result};

/// A row-major matrix on the GPU, in the backend's compute dtype.
pub struct Tensor {
    /// Rows in use.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    data: CudaSlice<u8>,
}

impl Tensor {
    pub(super) fn zeros(cuda: &Cuda, rows: usize, cols: usize) -> Result<Tensor> {
        let bytes = (rows * cols * cuda.compute.bytes()).max(1);
        let data = cuda
            .stream
            .alloc_zeros(bytes)
            .map_err(|e| cuda.failed(&format!("allocate {}", crate::units::binary(bytes as u64)), e))?;
        Ok(Tensor { rows, cols, data })
    }

    pub(super) fn constant(cuda: &Cuda, values: &[f32], cols: usize) -> Result<Tensor> {
        let mut tensor = Tensor::zeros(cuda, values.len() / cols.max(1), cols)?;
        match cuda.compute {
            Compute::F32 => tensor.upload(cuda, bytemuck::cast_slice(values))?,
            Compute::Bf16 => {
                let values: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                tensor.upload(cuda, bytemuck::cast_slice(&values))?;
            }
        }
        Ok(tensor)
    }

    /// A stored tensor in the compute dtype: BF16 as it is, everything else by the CPU backend's conversion,
    /// which is exact for matrices.
    pub(super) fn load(cuda: &Cuda, source: &SourceTensor) -> Result<Tensor> {
        let here = cpu::Tensor::from_source(cuda.compute, source)?;
        let mut tensor = Tensor::zeros(cuda, here.rows, here.cols)?;
        match (here.view(), cuda.compute) {
            (cpu::View::Bf16(x), Compute::Bf16) => tensor.upload(cuda, bytemuck::cast_slice(x))?,
            (cpu::View::F32(x), Compute::F32) => tensor.upload(cuda, bytemuck::cast_slice(x))?,
            (cpu::View::Bf16(x), Compute::F32) => {
                let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
                tensor.upload(cuda, bytemuck::cast_slice(&wide))?;
            }
            (cpu::View::F32(_), Compute::Bf16) => {
                return Err(Error::run("an F32 matrix in a BF16 computation").tensor(&source.name));
            }
        }
        Ok(tensor)
    }

    pub(super) fn pointer(&self, cuda: &Cuda) -> u64 {
        self.data.device_ptr(&cuda.stream).0
    }

    pub(super) fn set_rows(&mut self, rows: usize) {
        self.rows = rows;
    }

    fn bytes(&self, cuda: &Cuda) -> usize {
        self.rows * self.cols * cuda.compute.bytes()
    }

    pub(super) fn upload(&mut self, cuda: &Cuda, bytes: &[u8]) -> Result<()> {
        let expected = self.bytes(cuda);
        if bytes.len() != expected {
            return Err(Error::run(format!("a matrix of {} bytes where {expected} belong", bytes.len())));
        }
        if expected == 0 {
            return Ok(());
        }
        let mut place = self.data.slice_mut(..expected);
        cuda.stream.memcpy_htod(bytes, &mut place).map_err(|e| cuda.failed("copy to the card", e))
    }

    pub(super) fn download(&self, cuda: &Cuda, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.resize(self.bytes(cuda), 0);
        let from = self.data.slice(..bytes.len());
        cuda.stream
            .memcpy_dtoh(&from, bytes.as_mut_slice())
            .map_err(|e| cuda.failed("copy from the card", e))?;
        cuda.synchronize()
    }
}
