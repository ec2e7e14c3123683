//! Choosing codes on the GPU, on the finishing stream: nothing here waits for the forward pass or holds it up.

use std::ffi::c_void;

use cudarc::cublas::{CudaBlas, result as cublas, sys as cublas_sys};
use cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig};

use super::kernels::{SolverKernels, launch};
use super::{Cuda, DeviceSums, THREADS, Tensor, threads_for};
use crate::backend::{Columns, Compute, Solver, relative};
use crate::error::{Error, Result};
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear};

/// Columns of a factor's tile, and of a panel whose mutual feedback is applied one at a time. As in the kernels.
const TILE: usize = 64;

/// Columns that one product updates while factoring: the part above the diagonal that is computed in vain is small.
const STRIPE: usize = 4096;

/// Arithmetic of f32 throughout.
const EXACT: cublas_sys::cublasComputeType_t = cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;

/// Factors of eleven bits on tensor cores, sums in f32. Feedback is a sum of rounding errors, which needs no more.
const SHORT: cublas_sys::cublasComputeType_t = cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32;

/// Parts of the rows that are summed apart.
const PARTS: usize = 32;

/// Blocks that share the sum of a distance.
const SHARES: usize = 512;

/// What only solving needs, loaded when it begins.
pub struct Solving {
    kernels: SolverKernels,
    blas: CudaBlas,
}

/// A row-major f32 matrix on the GPU.
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: CudaSlice<f32>,
}

/// Codes and block scales on the GPU.
pub struct Codes {
    codes: CudaSlice<u8>,
    scales: CudaSlice<u8>,
}

/// The factor of a damped Hessian on the GPU: `L` `[n, n]`, lower, and the original column at each place.
pub struct Factor {
    l: Matrix,
    order: CudaSlice<u32>,
}

/// A factor of a product: where it is, elements from a row to the next, and whether its rows count as columns.
struct Operand(u64, usize, bool);

impl Matrix {
    fn len(&self) -> usize {
        self.rows * self.cols
    }

    fn at(&self, cuda: &Cuda) -> u64 {
        self.data.device_ptr(&cuda.finishing).0
    }
}

impl Cuda {
    fn solving(&self) -> Result<&Solving> {
        if let Some(solving) = self.solving.get() {
            return Ok(solving);
        }
        let blas = CudaBlas::new(self.finishing.clone());
        let blas = blas.map_err(|e| Error::run(format!("can't start cuBLAS: {e}")))?;
        let solving = Solving { kernels: SolverKernels::new(&self.context)?, blas };
        Ok(self.solving.get_or_init(|| solving))
    }

    /// Memory of a matrix; every element is written before it is read.
    fn blank(&self, rows: usize, cols: usize) -> Result<Matrix> {
        // SAFETY: floats have no invalid bits, and callers write what they read.
        let data = unsafe { self.finishing.alloc::<f32>((rows * cols).max(1)) }.map_err(|e| {
            self.failed(&format!("allocate {}", crate::units::binary(4 * (rows * cols) as u64)), e)
        })?;
        Ok(Matrix { rows, cols, data })
    }

    fn codes(&self, elements: usize) -> Result<Codes> {
        let failed = |e| self.failed("allocate codes", e);
        // SAFETY: the kernel that follows writes every byte.
        unsafe {
            Ok(Codes {
                codes: self.finishing.alloc(elements / 2).map_err(failed)?,
                scales: self.finishing.alloc(elements / BLOCK).map_err(failed)?,
            })
        }
    }

    fn vector<T: cudarc::driver::DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        self.finishing.clone_htod(values).map_err(|e| self.failed("copy to the card", e))
    }

    fn fetch<T: cudarc::driver::DeviceRepr + Clone + Default>(&self, from: &CudaSlice<T>) -> Result<Vec<T>> {
        self.read_back(from, &self.finishing).map_err(|e| self.failed("copy from the card", e))
    }

    /// The address of something on the finishing stream.
    fn there<T>(&self, x: &CudaSlice<T>) -> u64 {
        x.device_ptr(&self.finishing).0
    }

    /// `c = alpha · a · b + beta · c`: c `[m, n]`, its rows `stride` elements apart. cuBLAS thinks in columns, where
    /// this is `cᵀ = bᵀ · aᵀ`.
    ///
    /// # Safety
    /// The operands have the shapes that follow, on this device.
    #[allow(clippy::too_many_arguments)]
    unsafe fn gemm(
        &self,
        (m, n, k): (usize, usize, usize),
        alpha: f32,
        a: Operand,
        b: Operand,
        beta: f32,
        c: u64,
        stride: usize,
        arithmetic: cublas_sys::cublasComputeType_t,
    ) -> Result<()> {
        if m == 0 || n == 0 {
            return Ok(());
        }
        let turned = |operand: &Operand| match operand.2 {
            true => cublas_sys::cublasOperation_t::CUBLAS_OP_T,
            false => cublas_sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let f32_ = cublas_sys::cudaDataType::CUDA_R_32F;
        // SAFETY: by the caller's promise.
        let done = unsafe {
            cublas::gemm_ex(
                *self.solving()?.blas.handle(),
                turned(&b),
                turned(&a),
                n as i32,
                m as i32,
                k as i32,
                (&raw const alpha).cast::<c_void>(),
                b.0 as *const c_void,
                f32_,
                b.1 as i32,
                a.0 as *const c_void,
                f32_,
                a.1 as i32,
                (&raw const beta).cast::<c_void>(),
                c as *mut c_void,
                f32_,
                stride as i32,
                arithmetic,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| Error::run(format!("cuBLAS: a {m} x {n} x {k} product failed: {e}")))
    }

    /// Replaces the lower triangle of `l` by its Cholesky factor; false where a pivot is not positive.
    fn cholesky(&self, l: &Matrix) -> Result<bool> {
        let (n, at, kernels) = (l.cols, l.at(self), &self.solving()?.kernels);
        let place = |row: usize, column: usize| at + 4 * (row * n + column) as u64;
        let (inverse, panel) = (self.blank(TILE, TILE)?, self.blank(n, TILE)?);
        let failed = self.vector(&[i32::MAX])?;
        // Where a pivot fails there is no inverse, and what follows is computed in vain, but not with what was here.
        self.clear(&inverse)?;
        for first in (0..n).step_by(TILE) {
            let width = TILE.min(n - first);
            let below = n - first - width;
            let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
            launch!(on finishing: self, &kernels.cholesky_tile, one, at, n as i32, first as i32, width as i32,
                inverse.at(self), self.there(&failed))?;
            let (panel, next) = (panel.at(self), first + width);
            let a21 = Operand(place(next, first), n, false);
            let inverted = Operand(inverse.at(self), width, true);
            // SAFETY: `below` rows of `width` columns lie at a21 inside `l`, and the panel has room for them.
            unsafe { self.gemm((below, width, width), 1.0, a21, inverted, 0.0, panel, width, EXACT)? };
            let elements = below * width;
            launch!(on finishing: self, &kernels.place, threads_for(elements), panel, elements as u64,
                width as i32, n as i32, place(next, first))?;
            for left in (0..below).step_by(STRIPE) {
                let shape = (below - left, STRIPE.min(below - left), width);
                let rows = panel + 4 * (left * width) as u64;
                let (a, b) = (Operand(rows, width, false), Operand(rows, width, true));
                // SAFETY: the stripe's rows and columns end with the matrix, the panel's rows likewise.
                unsafe { self.gemm(shape, -1.0, a, b, 1.0, place(next + left, next + left), n, EXACT)? };
            }
        }
        Ok(self.fetch(&failed)?[0] == i32::MAX)
    }
}

impl Solver for Cuda {
    type Matrix = Matrix;
    type Codes = Codes;
    type Factor = Factor;

    fn products(&self, sums: DeviceSums) -> Result<Option<Matrix>> {
        // They were made on the forward pass's stream.
        self.synchronize()?;
        Ok(sums.into_products().map(|(data, n)| Matrix { rows: n, cols: n, data }))
    }

    fn widen(&self, weight: &Tensor) -> Result<Matrix> {
        let out = self.blank(weight.rows, weight.cols)?;
        let (n, from) = (out.len(), weight.pointer_for_finishing(self));
        let kernels = &self.solving()?.kernels;
        match self.compute {
            Compute::Bf16 => launch!(on finishing: self, &kernels.widen_bf16, threads_for(n), from, n as u64,
                out.at(self))?,
            Compute::F32 => launch!(on finishing: self, &kernels.scale, threads_for(n), from, n as u64,
                weight.cols as i32, 0u64, 0u64, out.at(self))?,
        }
        Ok(out)
    }

    fn matrix(&self, values: Vec<f32>, cols: usize) -> Result<Matrix> {
        Ok(Matrix { rows: values.len() / cols, cols, data: self.vector(&values)? })
    }

    fn read(&self, x: &Matrix) -> Result<Vec<f32>> {
        self.fetch(&x.data)
    }

    fn diagonal(&self, x: &Matrix) -> Result<Vec<f32>> {
        let (out, n) = (self.blank(1, x.cols)?, x.cols);
        let kernel = &self.solving()?.kernels.diagonal;
        launch!(on finishing: self, kernel, threads_for(n), x.at(self), n as i32, out.at(self))?;
        self.read(&out)
    }

    fn columns(&self, x: &Matrix) -> Result<Columns> {
        let amax = self.vector(&vec![0u32; x.cols])?;
        let squares = self.vector(&vec![0f64; PARTS * x.cols])?;
        let grid_dim = (x.cols.div_ceil(THREADS as usize) as u32, PARTS as u32, 1);
        let config = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        launch!(on finishing: self, &self.solving()?.kernels.columns, config, x.at(self), x.rows as i32,
            x.cols as i32, self.there(&amax), self.there(&squares))?;
        let parts = self.fetch(&squares)?;
        let squares = (0..x.cols).map(|column| parts[column..].iter().step_by(x.cols).sum()).collect();
        Ok(Columns { amax: self.fetch(&amax)?.into_iter().map(f32::from_bits).collect(), squares })
    }

    fn largest(&self, x: &Matrix) -> Result<f32> {
        let slot = self.vector(&[0u32])?;
        let n = x.len() as u64;
        launch!(on finishing: self, &self.solving()?.kernels.amax, self.walk(n), x.at(self), n, self.there(&slot))?;
        Ok(f32::from_bits(self.fetch(&slot)?[0]))
    }

    fn scale(&self, x: &mut Matrix, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()> {
        let upload = |factors: Option<&[f32]>| factors.map(|factors| self.vector(factors)).transpose();
        let (rows, columns) = (upload(rows)?, upload(columns)?);
        let address = |x: &Option<CudaSlice<f32>>| x.as_ref().map_or(0, |x| self.there(x));
        launch!(on finishing: self, &self.solving()?.kernels.scale, threads_for(x.len()), x.at(self),
            x.len() as u64, x.cols as i32, address(&rows), address(&columns), x.at(self))
    }

    fn divided(&self, x: &Matrix, by: &[f32]) -> Result<Matrix> {
        let (out, by) = (self.blank(x.rows, x.cols)?, self.vector(by)?);
        launch!(on finishing: self, &self.solving()?.kernels.divide, threads_for(x.len()), x.at(self),
            x.len() as u64, x.cols as i32, self.there(&by), out.at(self))?;
        Ok(out)
    }

    fn served(&self, x: &Matrix, factors: &[f32], input: Option<GlobalScale>) -> Result<Matrix> {
        let (out, factors) = (self.blank(x.rows, x.cols)?, self.vector(factors)?);
        let kernels = &self.solving()?.kernels;
        launch!(on finishing: self, &kernels.scale, threads_for(x.len()), x.at(self), x.len() as u64,
            x.cols as i32, 0u64, self.there(&factors), out.at(self))?;
        if let Some(input) = input {
            let (blocks, divisor) = (x.len() / BLOCK, input.divisor());
            launch!(on finishing: self, &kernels.quantize_input, threads_for(blocks), out.at(self), blocks as u64,
                divisor)?;
        }
        Ok(out)
    }

    fn outputs(&self, x: &Matrix, w: &Matrix) -> Result<Matrix> {
        let out = self.blank(x.rows, w.rows)?;
        let (a, b) = (Operand(x.at(self), x.cols, false), Operand(w.at(self), w.cols, true));
        // SAFETY: x is [t, n], w [rows, n], and out [t, rows].
        unsafe { self.gemm((x.rows, w.rows, w.cols), 1.0, a, b, 0.0, out.at(self), w.rows, EXACT)? };
        Ok(out)
    }

    fn relative_error(&self, a: &Matrix, b: &Matrix) -> Result<f64> {
        let sums = self.vector(&vec![0f64; 2 * SHARES])?;
        let config =
            LaunchConfig { grid_dim: (SHARES as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        launch!(on finishing: self, &self.solving()?.kernels.distance, config, a.at(self), b.at(self),
            b.len() as u64, self.there(&sums))?;
        let sums = self.fetch(&sums)?;
        let total = |first: usize| sums[first..].iter().step_by(2).sum::<f64>();
        Ok(relative(total(0), total(1)))
    }

    fn round_max(&self, w: &Matrix, global: GlobalScale) -> Result<Codes> {
        let (out, blocks) = (self.codes(w.len())?, w.len() / BLOCK);
        launch!(on finishing: self, &self.solving()?.kernels.quantize, threads_for(blocks), w.at(self),
            blocks as u64, global.multiplier(), self.there(&out.codes), self.there(&out.scales))?;
        Ok(out)
    }

    fn round_searched(&self, w: &Matrix, importance: &[f32], global: GlobalScale) -> Result<Codes> {
        let (out, blocks) = (self.codes(w.len())?, w.len() / BLOCK);
        let importance = self.vector(importance)?;
        launch!(on finishing: self, &self.solving()?.kernels.quantize_searched, threads_for(blocks), w.at(self),
            self.there(&importance), w.cols as i32, blocks as u64, global.multiplier(),
            self.there(&out.codes), self.there(&out.scales))?;
        Ok(out)
    }

    fn factor(&self, h: &Matrix, order: &[u32], lambda: f32) -> Result<Option<Factor>> {
        let n = h.cols;
        let factor = Factor { l: self.blank(n, n)?, order: self.vector(order)? };
        let grid_dim = (n.div_ceil(THREADS as usize) as u32, n as u32, 1);
        let config = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        launch!(on finishing: self, &self.solving()?.kernels.damped, config, h.at(self), self.there(&factor.order),
            n as i32, lambda, factor.l.at(self))?;
        Ok(self.cholesky(&factor.l)?.then_some(factor))
    }

    fn round_gptq(&self, w: &Matrix, factor: &Factor, global: GlobalScale) -> Result<Codes> {
        let (rows, n, kernels) = (w.rows, w.cols, &self.solving()?.kernels);
        let (errors, feedback) = (self.blank(n, rows)?, self.blank(TILE, rows)?);
        let (out, l) = (self.codes(w.len())?, factor.l.at(self));
        let grid_dim = (rows.div_ceil(TILE) as u32, 1, 1);
        let config = LaunchConfig { grid_dim, block_dim: (TILE as u32, 1, 1), shared_mem_bytes: 0 };
        for first in (0..n).step_by(TILE).rev() {
            let width = TILE.min(n - first);
            let right = first + width;
            let here = Operand(l + 4 * (right * n + first) as u64, n, true);
            let further = Operand(errors.at(self) + 4 * (right * rows) as u64, rows, false);
            match n - right {
                0 => self.clear(&feedback)?,
                // SAFETY: `k` rows lie below in the factor and in the errors, and the feedback has room.
                k => unsafe {
                    self.gemm((width, rows, k), 1.0, here, further, 0.0, feedback.at(self), rows, SHORT)?
                },
            }
            launch!(on finishing: self, &kernels.round_panel, config, l, n as i32, first as i32, width as i32,
                w.at(self), rows as i32, self.there(&factor.order), feedback.at(self), global.multiplier(),
                errors.at(self), self.there(&out.codes), self.there(&out.scales))?;
        }
        Ok(out)
    }

    fn dequantize(&self, codes: &Codes, cols: usize, global: GlobalScale) -> Result<Matrix> {
        let blocks = codes.scales.len();
        let out = self.blank(blocks * BLOCK / cols, cols)?;
        launch!(on finishing: self, &self.solving()?.kernels.dequantize, threads_for(blocks),
            self.there(&codes.codes), self.there(&codes.scales), blocks as u64, global.multiplier(), out.at(self))?;
        Ok(out)
    }

    fn read_codes(&self, codes: Codes) -> Result<QuantizedLinear> {
        let mut here =
            QuantizedLinear { codes: vec![0; codes.codes.len()], scales: vec![0; codes.scales.len()] };
        self.read_finished(&codes.codes.as_view(), &mut here.codes)?;
        self.read_finished(&codes.scales.as_view(), &mut here.scales)?;
        Ok(here)
    }
}

impl Cuda {
    fn clear(&self, x: &Matrix) -> Result<()> {
        let zeros = unsafe {
            // SAFETY: the address and length are those of the matrix.
            cudarc::driver::result::memset_d8_async(x.at(self), 0, 4 * x.len(), self.finishing.cu_stream())
        };
        zeros.map_err(|e| self.failed("clear memory", e))
    }
}
