//! Matrices on the GPU.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use safetensors::Dtype;

use super::lane::Lane;
use super::{Cuda, PACK_BYTES};
use crate::backend::Compute;
use crate::backend::cpu;
use crate::checkpoint::SourceTensor;
use crate::error::{Error, Result};

/// A row-major matrix on the GPU, in the backend's compute dtype unless it is an exact constant.
pub struct Tensor {
    /// Rows in use.
    pub(super) rows: usize,
    /// Elements of a row.
    pub(super) cols: usize,
    /// Whether its elements are f32.
    pub(super) wide: bool,
    data: CudaSlice<u8>,
    /// For what comes by a lane, and is freed on another stream than it is used on: its last use by the forward pass.
    /// The finishing thread is done with weights before it lets go.
    last_use: Option<LastUse>,
}

struct LastUse {
    event: CudaEvent,
    freed_on: Arc<CudaStream>,
}

impl Drop for Tensor {
    /// The memory is given back when the last use has passed, not when it was asked for.
    fn drop(&mut self) {
        if let Some(LastUse { event, freed_on }) = &self.last_use {
            // A failure here shows in the next operation on the stream.
            let _ = freed_on.wait(event);
        }
    }
}

impl Tensor {
    pub(super) fn zeros(cuda: &Cuda, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::zeros_of(cuda, rows, cols, cuda.compute)
    }

    fn zeros_of(cuda: &Cuda, rows: usize, cols: usize, elements: Compute) -> Result<Tensor> {
        // Kernels walk over whole packs.
        let bytes = (rows * cols * elements.bytes()).max(1).next_multiple_of(PACK_BYTES);
        let data = cuda
            .stream
            .alloc_zeros(bytes)
            .map_err(|e| cuda.failed(&format!("allocate {}", crate::units::binary(bytes as u64)), e))?;
        Ok(Tensor { rows, cols, wide: elements == Compute::F32, data, last_use: None })
    }

    /// f32 values, stored as such elements.
    pub(super) fn constant(cuda: &Cuda, values: &[f32], cols: usize, elements: Compute) -> Result<Tensor> {
        let mut tensor = Tensor::zeros_of(cuda, values.len() / cols.max(1), cols, elements)?;
        match elements {
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
        let stored_as_computed = match cuda.compute {
            Compute::Bf16 => source.dtype == Dtype::BF16,
            Compute::F32 => source.dtype == Dtype::F32,
        };
        if let ([rows, cols], true) = (&source.shape[..], stored_as_computed) {
            let bytes = rows * cols * cuda.compute.bytes();
            return Tensor::uploaded(cuda, &cuda.weights, *rows, *cols, bytes, &|at, to| source.read(at, to));
        }
        let here = cpu::Tensor::from_source(cuda.compute, source)?;
        let wide: Vec<f32>;
        let bytes: &[u8] = match (here.view(), cuda.compute) {
            (cpu::View::Bf16(x), Compute::Bf16) => bytemuck::cast_slice(x),
            (cpu::View::F32(x), Compute::F32) => bytemuck::cast_slice(x),
            (cpu::View::Bf16(x), Compute::F32) => {
                wide = x.iter().map(|x| x.to_f32()).collect();
                bytemuck::cast_slice(&wide)
            }
            (cpu::View::F32(_), Compute::Bf16) => {
                return Err(Error::run("an F32 matrix in a BF16 computation").tensor(&source.name));
            }
        };
        Tensor::uploaded(cuda, &cuda.weights, here.rows, here.cols, bytes.len(), &|at, to| {
            to.copy_from_slice(&bytes[at..at + to.len()]);
            Ok(())
        })
    }

    /// A matrix whose bytes `read` gives, part by part, copied beside the forward pass.
    pub(super) fn uploaded(
        cuda: &Cuda,
        lane: &Lane,
        rows: usize,
        cols: usize,
        bytes: usize,
        read: &(dyn Fn(usize, &mut [u8]) -> Result<()> + Sync),
    ) -> Result<Tensor> {
        let failed = |e| cuda.failed("copy weights to the card", e);
        // SAFETY: the copy that follows writes every byte; behind them, kernels read a pack to its end and use nothing.
        let data = unsafe { lane.stream.alloc::<u8>(bytes.max(1).next_multiple_of(PACK_BYTES)) };
        let data = data.map_err(failed)?;
        // SAFETY: the memory was just allocated with this length.
        unsafe { lane.upload(bytes, read, data.device_ptr(&lane.stream).0) }.map_err(failed)??;
        let event = lane.stream.record_event(None).map_err(failed)?;
        let last_use = Some(LastUse { event, freed_on: lane.stream.clone() });
        Ok(Tensor { rows, cols, wide: cuda.compute == Compute::F32, data, last_use })
    }

    /// The address, for an operation on the forward pass's stream.
    pub(super) fn pointer(&self, cuda: &Cuda) -> u64 {
        self.data.device_ptr(&cuda.stream).0
    }

    /// The address, for an operation on the finishing stream.
    pub(super) fn pointer_for_finishing(&self, cuda: &Cuda) -> u64 {
        self.data.device_ptr(&cuda.finishing).0
    }

    /// Notes that the forward pass has just used this tensor.
    pub(super) fn used(&self, cuda: &Cuda) -> Result<()> {
        match &self.last_use {
            None => Ok(()),
            Some(last) => last.event.record(&cuda.stream).map_err(|e| cuda.failed("mark a tensor", e)),
        }
    }

    pub(super) fn set_rows(&mut self, rows: usize) {
        self.rows = rows;
        assert!(self.bytes() <= self.data.len(), "an activation has no more rows than it was made with");
    }

    /// Rows and columns in use.
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn bytes(&self) -> usize {
        let element = if self.wide { Compute::F32 } else { Compute::Bf16 };
        self.rows * self.cols * element.bytes()
    }

    pub(super) fn upload(&mut self, cuda: &Cuda, bytes: &[u8]) -> Result<()> {
        let expected = self.bytes();
        if bytes.len() != expected {
            return Err(Error::run(format!("a matrix of {} bytes where {expected} belong", bytes.len())));
        }
        if expected == 0 {
            return Ok(());
        }
        // As for reading: what comes before is waited for without the driver's lock.
        cuda.synchronize()?;
        let mut place = self.data.slice_mut(..expected);
        cuda.stream.memcpy_htod(bytes, &mut place).map_err(|e| cuda.failed("copy to the card", e))
    }

    pub(super) fn copy_from(&mut self, cuda: &Cuda, from: &Tensor) -> Result<()> {
        let (bytes, room) = (from.bytes(), self.bytes());
        if bytes != room {
            return Err(Error::run(format!("a matrix of {bytes} bytes where {room} belong")));
        }
        if bytes > 0 {
            let mut place = self.data.slice_mut(..bytes);
            cuda.stream
                .memcpy_dtod(&from.data.slice(..bytes), &mut place)
                .map_err(|e| cuda.failed("copy on the card", e))?;
        }
        from.used(cuda)
    }

    pub(super) fn download(&self, cuda: &Cuda, moment: &CudaEvent, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.resize(self.bytes(), 0);
        let failed = |e| cuda.failed("copy from the card", e);
        cuda.departures.stream.wait(moment).map_err(failed)?;
        // Without cudarc's own waiting, which would be for the last use, not for `moment`.
        let at = self.data.device_ptr(self.data.stream()).0;
        // SAFETY: the matrix has this many bytes, and is not freed while it is borrowed.
        unsafe { cuda.departures.download(at, bytes) }.map_err(failed)
    }
}
