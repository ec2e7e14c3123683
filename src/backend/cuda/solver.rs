//! Choosing codes on the GPU, on the finishing stream: nothing here waits for the forward pass or holds it up.

use std::ffi::c_void;
use std::ops::Deref;

use bytemuck::NoUninit;
use cudarc::cublas::{CudaBlas, result as cublas, sys as cublas_sys};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, ValidAsZeroBits};

use super::kernels::{self, SolverKernels, launch};
use super::{Cuda, DeviceSums, THREADS, Tensor, threads_for};
use crate::backend::operations::fit;
use crate::backend::{Columns, Compute, Gathered, Solver, relative};
use crate::error::{Error, Result};
use crate::nvfp4::{BLOCK, GlobalScale, QuantizedLinear};

/// Columns of a factor's tile, and of a panel whose mutual feedback is applied one at a time. As in the kernels.
const TILE: usize = 64;

/// Columns that are factored before they are taken off the rest.
const PANEL: usize = 512;

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

/// A row-major matrix on the GPU: f32, or BF16 values times a common factor where that is exact. Weights and inputs of
/// a BF16 model are, and so is everything quantized, whose codes and block scales have six significant bits together:
/// products of two such matrices are exact on tensor cores, and their sums are f32.
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: CudaSlice<u8>,
    /// The factor, where the values are BF16.
    brief: Option<f32>,
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

    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Whether the values are BF16, as kernels ask, and what they are multiplied by.
    fn kind(&self) -> (i32, f32) {
        (i32::from(self.brief.is_some()), self.brief.unwrap_or(1.0))
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
        let kernels = SolverKernels::new(&self.context, kernels::solving(&self.architecture)?)?;
        let solving = Solving { kernels, blas };
        Ok(self.solving.get_or_init(|| solving))
    }

    /// Memory of an f32 matrix; every element is written before it is read.
    fn blank(&self, rows: usize, cols: usize) -> Result<Matrix> {
        self.unwritten(rows, cols, None)
    }

    /// Memory of a matrix; every element is written before it is read.
    fn unwritten(&self, rows: usize, cols: usize, brief: Option<f32>) -> Result<Matrix> {
        let bytes = rows * cols * if brief.is_some() { 2 } else { 4 };
        // SAFETY: whoever asks for it writes all of it next, on the same stream.
        let data = unsafe { self.finishing.alloc(bytes.max(1)) };
        let failed = |e| self.failed(&format!("allocate {}", crate::units::binary(bytes as u64)), e);
        Ok(Matrix { rows, cols, data: data.map_err(failed)?, brief })
    }

    /// The matrix in f32.
    fn wide<'m>(&self, x: &'m Matrix) -> Result<Wide<'m>> {
        let Some(factor) = x.brief else { return Ok(Wide::Already(x)) };
        let out = self.blank(x.rows, x.cols)?;
        launch!(on finishing: self, &self.solving()?.kernels.widen, threads_for(x.len()), x.at(self), factor,
            x.len() as u64, out.at(self))?;
        Ok(Wide::Made(out))
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

    fn vector<T: DeviceRepr + NoUninit>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        self.staging.upload(values).map_err(|e| self.failed("copy to the card", e))
    }

    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, values: usize) -> Result<CudaSlice<T>> {
        self.finishing.alloc_zeros(values).map_err(|e| self.failed("allocate sums", e))
    }

    fn fetch<T: cudarc::driver::DeviceRepr + Clone + Default>(&self, from: &CudaSlice<T>) -> Result<Vec<T>> {
        self.read_back(from, &self.finishing).map_err(|e| self.failed("copy from the card", e))
    }

    /// The address of something on the finishing stream.
    fn there<T>(&self, x: &CudaSlice<T>) -> u64 {
        x.device_ptr(&self.finishing).0
    }

    /// `c = a · b`, both BF16 with factors: c `[m, n]` in f32.
    fn brief_product(&self, a: &Matrix, b: &Matrix, c: &Matrix) -> Result<()> {
        let (alpha, beta) = (a.kind().1 * b.kind().1, 0f32);
        let (bf16, f32_) = (cublas_sys::cudaDataType::CUDA_R_16BF, cublas_sys::cudaDataType::CUDA_R_32F);
        let (m, n, k) = (a.rows as i32, b.rows as i32, a.cols as i32);
        // SAFETY: a is [m, k], b [n, k] and c [m, n], which the caller has checked, on this device.
        let done = unsafe {
            cublas::gemm_ex(
                *self.solving()?.blas.handle(),
                cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                n,
                m,
                k,
                (&raw const alpha).cast::<c_void>(),
                b.at(self) as *const c_void,
                bf16,
                k,
                a.at(self) as *const c_void,
                bf16,
                k,
                (&raw const beta).cast::<c_void>(),
                c.at(self) as *mut c_void,
                f32_,
                n,
                EXACT,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| Error::run(format!("cuBLAS: a {m} x {n} x {k} product failed: {e}")))
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

    /// Replaces the lower triangle of `l` by its Cholesky factor; false where a pivot is not positive. Tile after tile
    /// inside a panel, which is then taken off what lies behind it in one product.
    fn cholesky(&self, l: &Matrix) -> Result<bool> {
        let (n, at, kernels) = (l.cols, l.at(self), &self.solving()?.kernels);
        let place = |row: usize, column: usize| at + 4 * (row * n + column) as u64;
        let (inverse, tiles) = (self.blank(TILE, TILE)?, self.blank(n, TILE)?);
        let failed = self.vector(&[i32::MAX])?;
        // Where a pivot fails there is no inverse, and what follows is computed in vain, but not with what was here.
        self.clear(&inverse)?;
        for begin in (0..n).step_by(PANEL) {
            let end = n.min(begin + PANEL);
            for first in (begin..end).step_by(TILE) {
                let width = TILE.min(n - first);
                let (next, below) = (first + width, n - first - width);
                let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
                launch!(on finishing: self, &kernels.cholesky_tile, one, at, n as i32, first as i32, width as i32,
                    inverse.at(self), self.there(&failed))?;
                let tiles = tiles.at(self);
                let a21 = Operand(place(next, first), n, false);
                let inverted = Operand(inverse.at(self), width, true);
                // SAFETY: `below` rows of `width` columns lie at a21 inside `l`, and `tiles` has room for them.
                unsafe { self.gemm((below, width, width), 1.0, a21, inverted, 0.0, tiles, width, EXACT)? };
                let elements = below * width;
                launch!(on finishing: self, &kernels.place, threads_for(elements), tiles, elements as u64,
                    width as i32, n as i32, place(next, first))?;
                let (a, b) = (Operand(tiles, width, false), Operand(tiles, width, true));
                let shape = (below, end - next.min(end), width);
                // SAFETY: the rest of the panel's columns, whose rows are the first of `tiles`.
                unsafe { self.gemm(shape, -1.0, a, b, 1.0, place(next, next), n, EXACT)? };
            }
            for left in (end..n).step_by(STRIPE) {
                let shape = (n - left, STRIPE.min(n - left), end - begin);
                let (a, b) = (Operand(place(left, begin), n, false), Operand(place(left, begin), n, true));
                // SAFETY: the stripe's rows and columns end with the matrix, and the panel's columns lie before it.
                unsafe { self.gemm(shape, -1.0, a, b, 1.0, place(left, left), n, EXACT)? };
            }
        }
        Ok(self.fetch(&failed)?[0] == i32::MAX)
    }
}

/// A matrix in f32.
enum Wide<'m> {
    Already(&'m Matrix),
    Made(Matrix),
}

impl Deref for Wide<'_> {
    type Target = Matrix;

    fn deref(&self) -> &Matrix {
        match self {
            Wide::Already(x) => x,
            Wide::Made(x) => x,
        }
    }
}

impl Solver for Cuda {
    type Matrix = Matrix;
    type Codes = Codes;
    type Factor = Factor;

    fn gathered(&self, sums: DeviceSums) -> Result<Gathered<Matrix>> {
        let brief = (self.compute == Compute::Bf16).then_some(1.0);
        let (n, products, rows) = sums.into_parts();
        let products = products.map(|data| Matrix { rows: n, cols: n, data, brief: None });
        if let Some(products) = &products {
            let tiles = n.div_ceil(32) as u32;
            let config =
                LaunchConfig { grid_dim: (tiles, tiles, 1), block_dim: (32, 8, 1), shared_mem_bytes: 0 };
            // On the forward pass's stream, on which they were made and will be freed.
            let address = products.data.device_ptr(&self.stream).0;
            launch!(self, &self.solving()?.kernels.mirror, config, address, n as i32)?;
        }
        self.synchronize()?;
        let rows = rows.map(|(data, rows)| Matrix { rows, cols: n, data, brief });
        Ok(Gathered { products, rows })
    }

    fn widen(&self, weight: &Tensor) -> Result<Matrix> {
        let brief = (self.compute == Compute::Bf16).then_some(1.0);
        let out = self.unwritten(weight.rows, weight.cols, brief)?;
        let bytes = weight.rows * weight.cols * self.compute.bytes();
        // SAFETY: both have this many bytes, and the weight stays until the finishing thread lets go of it.
        let copied = unsafe {
            cudarc::driver::result::memcpy_dtod_async(
                out.at(self),
                weight.pointer_for_finishing(self),
                bytes,
                self.finishing.cu_stream(),
            )
        };
        copied.map_err(|e| self.failed("copy on the card", e))?;
        Ok(out)
    }

    fn matrix(&self, values: Vec<f32>, cols: usize) -> Result<Matrix> {
        fit("matrix", cols > 0 && values.len().is_multiple_of(cols), &(values.len(), cols))?;
        let data = self.vector(bytemuck::cast_slice::<f32, u8>(&values))?;
        Ok(Matrix { rows: values.len() / cols, cols, data, brief: None })
    }

    fn read(&self, x: &Matrix) -> Result<Vec<f32>> {
        Ok(bytemuck::pod_collect_to_vec(&self.fetch(&self.wide(x)?.data)?[..4 * x.len()]))
    }

    fn diagonal(&self, x: &Matrix) -> Result<Vec<f32>> {
        fit("diagonal", x.rows == x.cols && x.brief.is_none(), &x.shape())?;
        let (out, n) = (self.blank(1, x.cols)?, x.cols);
        let kernel = &self.solving()?.kernels.diagonal;
        launch!(on finishing: self, kernel, threads_for(n), x.at(self), n as i32, out.at(self))?;
        self.read(&out)
    }

    fn columns(&self, x: &Matrix) -> Result<Columns> {
        let (amax, squares) = (self.zeros::<u32>(x.cols)?, self.zeros::<f64>(PARTS * x.cols)?);
        let (brief, factor) = x.kind();
        let grid_dim = (x.cols.div_ceil(THREADS as usize) as u32, PARTS as u32, 1);
        let config = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        launch!(on finishing: self, &self.solving()?.kernels.columns, config, x.at(self), brief, factor,
            x.rows as i32, x.cols as i32, self.there(&amax), self.there(&squares))?;
        let parts = self.fetch(&squares)?;
        let squares = (0..x.cols).map(|column| parts[column..].iter().step_by(x.cols).sum()).collect();
        Ok(Columns { amax: self.fetch(&amax)?.into_iter().map(f32::from_bits).collect(), squares })
    }

    fn largest(&self, x: &Matrix) -> Result<f32> {
        let (slot, n, x) = (self.zeros::<u32>(1)?, x.len() as u64, self.wide(x)?);
        launch!(on finishing: self, &self.solving()?.kernels.amax, self.walk(n), x.at(self), n, self.there(&slot))?;
        Ok(f32::from_bits(self.fetch(&slot)?[0]))
    }

    fn scale(&self, x: &mut Matrix, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()> {
        let each = |factors: Option<&[f32]>, count: usize| factors.is_none_or(|f| f.len() == count);
        fit("scale", each(rows, x.rows) && each(columns, x.cols), &x.shape())?;
        if let Wide::Made(wide) = self.wide(x)? {
            *x = wide;
        }
        let upload = |factors: Option<&[f32]>| factors.map(|factors| self.vector(factors)).transpose();
        let (rows, columns) = (upload(rows)?, upload(columns)?);
        let address = |x: &Option<CudaSlice<f32>>| x.as_ref().map_or(0, |x| self.there(x));
        launch!(on finishing: self, &self.solving()?.kernels.scale, threads_for(x.len()), x.at(self),
            x.len() as u64, x.cols as i32, address(&rows), address(&columns), x.at(self))
    }

    fn divided(&self, x: &Matrix, by: &[f32]) -> Result<Matrix> {
        fit("divided", by.len() == x.cols, &(x.shape(), by.len()))?;
        let (out, by, (brief, factor)) = (self.blank(x.rows, x.cols)?, self.vector(by)?, x.kind());
        launch!(on finishing: self, &self.solving()?.kernels.divide, threads_for(x.len()), x.at(self), brief, factor,
            x.len() as u64, x.cols as i32, self.there(&by), out.at(self))?;
        Ok(out)
    }

    fn served(&self, x: &Matrix, factors: &[f32], input: Option<GlobalScale>) -> Result<Matrix> {
        let whole = input.is_none() || x.cols.is_multiple_of(BLOCK);
        fit("served", factors.len() == x.cols && whole, &(x.shape(), factors.len()))?;
        let (factors, kernels) = (self.vector(factors)?, &self.solving()?.kernels);
        let Some(input) = input else {
            let (x, out) = (self.wide(x)?, self.blank(x.rows, x.cols)?);
            launch!(on finishing: self, &kernels.scale, threads_for(x.len()), x.at(self), x.len() as u64,
                x.cols as i32, 0u64, self.there(&factors), out.at(self))?;
            return Ok(out);
        };
        let (blocks, divisor, (brief, factor)) = (x.len() / BLOCK, input.divisor(), x.kind());
        let out = self.unwritten(x.rows, x.cols, Some(1.0 / divisor))?;
        launch!(on finishing: self, &kernels.serve, threads_for(blocks), x.at(self), brief, factor, blocks as u64,
            x.cols as i32, self.there(&factors), divisor, out.at(self))?;
        Ok(out)
    }

    fn outputs(&self, x: &Matrix, w: &Matrix) -> Result<Matrix> {
        fit("outputs", x.cols == w.cols, &(x.shape(), w.shape()))?;
        let out = self.blank(x.rows, w.rows)?;
        if x.brief.is_some() && w.brief.is_some() {
            self.brief_product(x, w, &out)?;
            return Ok(out);
        }
        let (x, w) = (self.wide(x)?, self.wide(w)?);
        let (a, b) = (Operand(x.at(self), x.cols, false), Operand(w.at(self), w.cols, true));
        // SAFETY: x is [t, n], w [rows, n], and out [t, rows].
        unsafe { self.gemm((x.rows, w.rows, w.cols), 1.0, a, b, 0.0, out.at(self), w.rows, EXACT)? };
        Ok(out)
    }

    fn relative_error(&self, a: &Matrix, b: &Matrix) -> Result<f64> {
        fit("relative error", a.shape() == b.shape(), &(a.shape(), b.shape()))?;
        let sums = self.zeros::<f64>(2 * SHARES)?;
        let config =
            LaunchConfig { grid_dim: (SHARES as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let ((a_brief, a_factor), (b_brief, b_factor)) = (a.kind(), b.kind());
        launch!(on finishing: self, &self.solving()?.kernels.distance, config, a.at(self), a_brief, a_factor,
            b.at(self), b_brief, b_factor, b.len() as u64, self.there(&sums))?;
        let sums = self.fetch(&sums)?;
        let total = |first: usize| sums[first..].iter().step_by(2).sum::<f64>();
        Ok(relative(total(0), total(1)))
    }

    fn round_max(&self, w: &Matrix, global: GlobalScale) -> Result<Codes> {
        fit("rounding", w.cols.is_multiple_of(BLOCK), &w.shape())?;
        let (out, blocks, w) = (self.codes(w.len())?, w.len() / BLOCK, self.wide(w)?);
        launch!(on finishing: self, &self.solving()?.kernels.quantize, threads_for(blocks), w.at(self),
            blocks as u64, global.multiplier(), self.there(&out.codes), self.there(&out.scales))?;
        Ok(out)
    }

    fn round_searched(&self, w: &Matrix, importance: &[f32], global: GlobalScale) -> Result<Codes> {
        let whole = w.cols.is_multiple_of(BLOCK) && importance.len() == w.cols;
        fit("searched rounding", whole, &(w.shape(), importance.len()))?;
        let (out, blocks, w) = (self.codes(w.len())?, w.len() / BLOCK, self.wide(w)?);
        let importance = self.vector(importance)?;
        launch!(on finishing: self, &self.solving()?.kernels.quantize_searched, threads_for(blocks), w.at(self),
            self.there(&importance), w.cols as i32, blocks as u64, global.multiplier(),
            self.there(&out.codes), self.there(&out.scales))?;
        Ok(out)
    }

    fn factor(&self, h: &Matrix, order: &[u32], lambda: f32) -> Result<Option<Factor>> {
        let n = h.cols;
        let inside = order.len() == n && order.iter().all(|&column| (column as usize) < n);
        fit("factor", h.rows == n && h.brief.is_none() && inside, &(h.shape(), order.len()))?;
        let factor = Factor { l: self.blank(n, n)?, order: self.vector(order)? };
        let grid_dim = (n as u32, n.div_ceil(THREADS as usize) as u32, 1);
        let config = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        launch!(on finishing: self, &self.solving()?.kernels.damped, config, h.at(self), self.there(&factor.order),
            n as i32, lambda, factor.l.at(self))?;
        Ok(self.cholesky(&factor.l)?.then_some(factor))
    }

    fn round_gptq(&self, w: &Matrix, factor: &Factor, global: GlobalScale) -> Result<Codes> {
        fit("GPTQ", w.cols == factor.l.cols && w.cols.is_multiple_of(BLOCK), &(w.shape(), factor.l.shape()))?;
        let (rows, n, kernels, w) = (w.rows, w.cols, &self.solving()?.kernels, self.wide(w)?);
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
        fit("codes", cols > 0 && (blocks * BLOCK).is_multiple_of(cols), &(blocks, cols))?;
        let out = self.unwritten(blocks * BLOCK / cols, cols, Some(global.multiplier()))?;
        launch!(on finishing: self, &self.solving()?.kernels.dequantize, threads_for(blocks),
            self.there(&codes.codes), self.there(&codes.scales), blocks as u64, out.at(self))?;
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
