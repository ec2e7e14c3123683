//! Sums over a site's inputs, on the GPU.

use std::ffi::c_void;

use cudarc::cublas::{result as cublas, sys as cublas_sys};
use cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig};

use super::kernels::launch;
use super::{Cuda, Tensor};
use crate::backend::{Channels, Compute};
use crate::error::{Error, Result};

/// Running sums on the GPU.
pub struct DeviceSums {
    /// Bits of non-negative floats.
    amax: CudaSlice<u32>,
    squares: CudaSlice<f32>,
    products: Option<CudaSlice<f32>>,
}

impl DeviceSums {
    pub(super) fn new(cuda: &Cuda, cols: usize, products: bool) -> Result<DeviceSums> {
        let failed = |e| cuda.failed("allocate statistics", e);
        Ok(DeviceSums {
            amax: cuda.stream.alloc_zeros(cols).map_err(failed)?,
            squares: cuda.stream.alloc_zeros(cols).map_err(failed)?,
            products: if products {
                Some(cuda.stream.alloc_zeros(cols * cols).map_err(failed)?)
            } else {
                None
            },
        })
    }

    pub(super) fn add_channels(&mut self, cuda: &Cuda, x: &Tensor) -> Result<()> {
        let config = LaunchConfig {
            grid_dim: (x.cols.div_ceil(32) as u32, 1, 1),
            block_dim: (512, 1, 1),
            shared_mem_bytes: 0,
        };
        let (amax, squares) = (self.amax.device_ptr(&cuda.stream).0, self.squares.device_ptr(&cuda.stream).0);
        let (rows, cols) = (x.rows as i32, x.cols as i32);
        launch!(cuda, &cuda.kernels.channel_sums, config, x.pointer(cuda), rows, cols, amax, squares)
    }

    /// `products += xᵀ · x`. In cuBLAS's columns `x` is `[n, t]`, so this is `x · xᵀ` there.
    pub(super) fn add_products(&mut self, cuda: &Cuda, x: &Tensor) -> Result<()> {
        let Some(products) = &self.products else { return Ok(()) };
        let (n, t) = (x.cols as i32, x.rows as i32);
        if t == 0 {
            return Ok(());
        }
        let one = 1f32;
        let dtype = match cuda.compute {
            Compute::Bf16 => cublas_sys::cudaDataType::CUDA_R_16BF,
            Compute::F32 => cublas_sys::cudaDataType::CUDA_R_32F,
        };
        let from = x.pointer(cuda) as *const c_void;
        // SAFETY: `x` is [t, n] and the products are [n, n] in f32, both on this device until the stream has
        // passed.
        let done = unsafe {
            cublas::gemm_ex(
                *cuda.blas.handle(),
                cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                n,
                n,
                t,
                (&raw const one).cast::<c_void>(),
                from,
                dtype,
                n,
                from,
                dtype,
                n,
                (&raw const one).cast::<c_void>(),
                products.device_ptr(&cuda.stream).0 as *mut c_void,
                cublas_sys::cudaDataType::CUDA_R_32F,
                n,
                cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| Error::run(format!("cuBLAS: a product of {n} channels failed: {e}")))
    }

    pub(super) fn read(&self, cuda: &Cuda) -> Result<Channels> {
        let failed = |e| cuda.failed("read statistics", e);
        let amax = cuda.read_back(&self.amax, &cuda.stream).map_err(failed)?;
        let squares = cuda.read_back(&self.squares, &cuda.stream).map_err(failed)?;
        Ok(Channels { amax: amax.into_iter().map(f32::from_bits).collect(), squares })
    }

    /// The products `[n, n]` and `n`.
    pub(super) fn into_products(self) -> Option<(CudaSlice<f32>, usize)> {
        self.products.map(|products| (products, self.amax.len()))
    }
}
