//! Sums over a site's inputs, on the GPU.

use std::ffi::c_void;

use cudarc::cublas::{result as cublas, sys as cublas_sys};
use cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig};

use super::kernels::launch;
use super::{Cuda, Index, THREADS, Tensor};
use crate::backend::operations::fit;
use crate::backend::{Channels, Compute};
use crate::error::{Error, Result};

/// Running sums on the GPU.
pub struct DeviceSums {
    /// Bits of non-negative floats.
    amax: CudaSlice<u32>,
    squares: CudaSlice<f32>,
    /// f32 `[n, n]`, on and below the diagonal.
    products: Option<CudaSlice<u8>>,
    /// Rows that are kept whole, by role, in the dtype of activations, and how many are there.
    rows: [KeptRows; 2],
}

/// Room for rows, and how many are there.
type KeptRows = (CudaSlice<u8>, usize);

/// Columns of the products that are made at a time: what lies above the diagonal is left out but for their own width.
const STRIPE: usize = 2048;

impl DeviceSums {
    pub(super) fn new(cuda: &Cuda, cols: usize, products: bool, sampled: [usize; 2]) -> Result<DeviceSums> {
        let failed = |e| cuda.failed("allocate statistics", e);
        let room = |rows: usize| {
            let bytes = (rows * cols * cuda.compute.bytes()).max(1);
            Ok((cuda.stream.alloc_zeros(bytes).map_err(failed)?, 0))
        };
        Ok(DeviceSums {
            amax: cuda.stream.alloc_zeros(cols).map_err(failed)?,
            squares: cuda.stream.alloc_zeros(cols).map_err(failed)?,
            products: if products {
                Some(cuda.stream.alloc_zeros(4 * cols * cols).map_err(failed)?)
            } else {
                None
            },
            rows: [room(sampled[0])?, room(sampled[1])?],
        })
    }

    /// Keeps some rows of `x` whole, behind those of the same role that are there.
    pub(super) fn add_rows(&mut self, cuda: &Cuda, x: &Tensor, rows: &Index, role: usize) -> Result<()> {
        let cols = self.amax.len();
        let (room, there) = &mut self.rows[role];
        let row = cols * cuda.compute.bytes();
        let inside = rows.host.iter().all(|&row| (row as usize) < x.rows);
        let fits = x.cols == cols && inside && (*there + rows.host.len()) * row <= room.len();
        fit("sampled rows", fits, &(x.shape(), rows.host.len(), *there))?;
        let grid_dim = (rows.host.len() as u32, 1, 1);
        let config = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let to = room.device_ptr(&cuda.stream).0 + (*there * row) as u64;
        *there += rows.host.len();
        launch!(cuda, &cuda.kernels.embed, config, x.pointer(cuda), cuda.pointer(rows), cols as i32, to)
    }

    pub(super) fn add_channels(&mut self, cuda: &Cuda, x: &Tensor) -> Result<()> {
        fit("sums", x.cols == self.amax.len(), &(x.shape(), self.amax.len()))?;
        let config = LaunchConfig {
            grid_dim: (x.cols.div_ceil(32) as u32, 1, 1),
            block_dim: (512, 1, 1),
            shared_mem_bytes: 0,
        };
        let (amax, squares) = (self.amax.device_ptr(&cuda.stream).0, self.squares.device_ptr(&cuda.stream).0);
        let (rows, cols) = (x.rows as i32, x.cols as i32);
        launch!(cuda, &cuda.kernels.channel_sums, config, x.pointer(cuda), rows, cols, amax, squares)
    }

    /// `products += xᵀ · x`, on and below the diagonal. In cuBLAS's columns `x` is `[n, t]`, so this is `x · xᵀ` there.
    pub(super) fn add_products(&mut self, cuda: &Cuda, x: &Tensor) -> Result<()> {
        let Some(products) = &self.products else { return Ok(()) };
        let (n, t) = (x.cols, x.rows as i32);
        fit("products", n == self.amax.len(), &(x.shape(), self.amax.len()))?;
        if t == 0 {
            return Ok(());
        }
        let one = 1f32;
        let dtype = match cuda.compute {
            Compute::Bf16 => cublas_sys::cudaDataType::CUDA_R_16BF,
            Compute::F32 => cublas_sys::cudaDataType::CUDA_R_32F,
        };
        let (from, to) = (x.pointer(cuda), products.device_ptr(&cuda.stream).0);
        for first in (0..n).step_by(STRIPE) {
            let end = n.min(first + STRIPE);
            let stripe = from + (first * cuda.compute.bytes()) as u64;
            // SAFETY: `x` is [t, n] and the products are [n, n] in f32, both on this device until the stream has
            // passed; the stripe's rows first..end get their columns 0..end.
            let done = unsafe {
                cublas::gemm_ex(
                    *cuda.blas.handle(),
                    cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                    cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                    end as i32,
                    (end - first) as i32,
                    t,
                    (&raw const one).cast::<c_void>(),
                    from as *const c_void,
                    dtype,
                    n as i32,
                    stripe as *const c_void,
                    dtype,
                    n as i32,
                    (&raw const one).cast::<c_void>(),
                    (to + 4 * (first * n) as u64) as *mut c_void,
                    cublas_sys::cudaDataType::CUDA_R_32F,
                    n as i32,
                    cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            };
            done.map_err(|e| Error::run(format!("cuBLAS: a product of {n} channels failed: {e}")))?;
        }
        Ok(())
    }

    pub(super) fn read(&self, cuda: &Cuda) -> Result<Channels> {
        let failed = |e| cuda.failed("read statistics", e);
        let amax = cuda.read_back(&self.amax, &cuda.stream).map_err(failed)?;
        let squares = cuda.read_back(&self.squares, &cuda.stream).map_err(failed)?;
        Ok(Channels { amax: amax.into_iter().map(f32::from_bits).collect(), squares })
    }

    /// Channels, products `[n, n]` on and below the diagonal, and sampled rows by role.
    pub(super) fn into_parts(self) -> (usize, Option<CudaSlice<u8>>, [KeptRows; 2]) {
        (self.amax.len(), self.products, self.rows)
    }
}
