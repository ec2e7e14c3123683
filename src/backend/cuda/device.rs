//! One GPU: opening it, its matrix products, its errors.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cublas::{CudaBlas, result as cublas, sys as cublas_sys};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr, DriverError, sys};

use super::Tensor;
use super::kernels::{self, Attention, AttentionFor, Kernels};
use super::lane::Lane;
use super::solver::Solving;
use super::staging::Staging;
use crate::backend::Compute;
use crate::backend::operations::fit;
use crate::error::{Error, Result};
use crate::threads;

/// Threads that copy between ordinary memory and what is locked for the bus: enough to keep it at its rate.
const COPIERS: usize = 8;

/// The CUDA backend on one GPU.
pub struct Cuda {
    pub(super) compute: Compute,
    pub(super) context: Arc<CudaContext>,
    /// The forward pass.
    pub(super) stream: Arc<CudaStream>,
    /// Quantizing finished layers, beside both.
    pub(super) finishing: Arc<CudaStream>,
    pub(super) kernels: Kernels,
    pub(super) processors: i32,
    /// Weights on their way to the card, beside the arithmetic.
    pub(super) weights: Lane,
    /// Hidden states on their way to the card. Their memory is given back when the forward pass has read them, and
    /// weights on the same stream would wait for that.
    pub(super) arrivals: Lane,
    /// Activations on their way from the card.
    pub(super) departures: Lane,
    /// Codes and scales on their way from the card, on the finishing stream.
    codes: Lane,
    pub(super) rounding: Mutex<Rounding>,
    pub(super) blas: CudaBlas,
    attention: Mutex<HashMap<AttentionFor, Attention>>,
    /// The card's architecture, as the compiler names it.
    pub(super) architecture: String,
    /// Short lists for the finishing stream.
    pub(super) staging: Staging,
    pub(super) solving: OnceLock<Solving>,
    name: String,
}

/// What rounding to max scales works in: it is there before the first layer, and large enough from the first on.
pub struct Rounding {
    /// A maximum, as the bits of a non-negative float.
    pub slot: CudaSlice<u32>,
    /// Codes, and block scales behind them.
    pub bytes: CudaSlice<u8>,
}

impl Rounding {
    fn new(stream: &Arc<CudaStream>) -> std::result::Result<Rounding, DriverError> {
        Ok(Rounding { slot: stream.alloc_zeros(1)?, bytes: stream.alloc_zeros(1)? })
    }
}

/// The device's pool of memory, out of which all streams allocate.
fn pool(context: &CudaContext) -> std::result::Result<sys::CUmemoryPool, DriverError> {
    context.bind_to_thread()?;
    // SAFETY: the device is the context's.
    unsafe { cudarc::driver::result::device::get_default_mem_pool(context.cu_device()) }
}

/// Otherwise every synchronization would give back what a layer has freed, and the next would ask for it anew.
fn keep_freed_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let mut bytes = u64::MAX;
    // SAFETY: the pool is the device's own; the attribute is a u64.
    unsafe {
        cudarc::driver::result::mem_pool::set_attribute(
            pool(context)?,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut bytes).cast(),
        )
    }
}

/// Bytes of the pool, by one of its counters.
fn pooled(context: &CudaContext, counter: sys::CUmemPool_attribute) -> std::result::Result<u64, DriverError> {
    let mut bytes = 0u64;
    // SAFETY: the counters asked for here are u64.
    unsafe {
        cudarc::driver::result::mem_pool::get_attribute(pool(context)?, counter, (&raw mut bytes).cast())?
    };
    Ok(bytes)
}

/// How many GPUs there are: 0 where the driver is missing as well.
pub fn available() -> usize {
    // SAFETY: only looks for the library. Asking further without it would panic.
    if !unsafe { sys::is_culib_present() } {
        return 0;
    }
    CudaContext::device_count().unwrap_or(0).max(0) as usize
}

/// The GPUs that this process sees, in the driver's order, by names that are the same in every process.
pub fn visible() -> Vec<String> {
    let name = |ordinal: usize| {
        let device = cudarc::driver::result::device::get(ordinal as i32)?;
        let id = cudarc::driver::result::device::get_uuid(device)?;
        Ok::<_, DriverError>(id.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
    };
    // One that can't be asked is nobody else's.
    let unknown = |ordinal: usize| format!("process {} GPU {ordinal}", std::process::id());
    (0..available()).map(|ordinal| name(ordinal).unwrap_or_else(|_| unknown(ordinal))).collect()
}

impl Cuda {
    /// Opens GPU `ordinal` (among those that CUDA_VISIBLE_DEVICES shows).
    ///
    /// # Errors
    /// Exit code 5: no such GPU, libraries that are missing, a GPU older than sm_80.
    pub fn new(compute: Compute, ordinal: usize) -> Result<Cuda> {
        let count = available();
        if ordinal >= count {
            return Err(Error::run(format!("there are {count} GPUs, number {ordinal} was asked for"))
                .fix("start at most one rank a GPU, or use --device cpu"));
        }
        // SAFETY: only looks for the libraries.
        let (nvrtc, blas) =
            unsafe { (cudarc::nvrtc::sys::is_culib_present(), cublas_sys::is_culib_present()) };
        if !nvrtc || !blas {
            let missing = if nvrtc { "libcublas" } else { "libnvrtc" };
            return Err(Error::run(format!("there is a GPU, but {missing} was not found")).fix(
                "install the CUDA runtime libraries and put them on LD_LIBRARY_PATH, or use --device cpu",
            ));
        }
        let open =
            |e: DriverError| Error::run(format!("can't open GPU {ordinal}: {e}")).fix("check nvidia-smi");
        let context = CudaContext::new(ordinal).map_err(open)?;
        keep_freed_memory(&context).map_err(open)?;
        let (major, minor) = context.compute_capability().map_err(open)?;
        if major < 8 {
            return Err(Error::run(format!("GPU {ordinal} is sm_{major}{minor}; BF16 needs sm_80 or newer"))
                .fix("use an Ampere or newer GPU, or --device cpu"));
        }
        // Compiling needs no context, so it goes on beside the rest.
        let architecture = format!("{major}{minor}");
        let for_it = architecture.clone();
        let compiling = threads::spawn("nvrtc", move || kernels::elementwise(compute, &for_it))?;
        let stream = context.new_stream().map_err(open)?;
        // A finished layer's few kernels go before the next layer's many: behind them, the next but one would wait.
        let (_, highest) = cudarc::driver::result::stream::get_priority_range().map_err(open)?;
        let finishing = context.new_stream_with_priority(highest).map_err(open)?;
        let blas =
            CudaBlas::new(stream.clone()).map_err(|e| Error::run(format!("can't start cuBLAS: {e}")))?;
        let processors = context
            .attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(open)?;
        let copiers = Arc::new(threads::pool("copy", rayon::current_num_threads().min(COPIERS))?);
        let lane = |stream| Lane::new(stream, &copiers).map_err(open);
        let new_lane = || context.new_stream().map_err(open).and_then(lane);
        let rounding = Mutex::new(Rounding::new(&finishing).map_err(open)?);
        let compiled = threads::value(compiling.join())?;
        Ok(Cuda {
            kernels: Kernels::new(&context, compiled)?,
            name: context.name().map_err(open)?,
            compute,
            stream,
            weights: new_lane()?,
            arrivals: new_lane()?,
            departures: new_lane()?,
            codes: lane(finishing.clone())?,
            staging: Staging::new(finishing.clone()).map_err(open)?,
            architecture,
            rounding,
            processors,
            blas,
            attention: Mutex::default(),
            solving: OnceLock::new(),
            finishing,
            context,
        })
    }

    /// The card's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that are free on the card now.
    pub fn free_memory(&self) -> u64 {
        self.context.mem_get_info().map_or(0, |(free, _)| free as u64)
    }

    /// The most bytes of the card that matrices and lists have held at a time.
    pub fn peak_memory(&self) -> u64 {
        pooled(&self.context, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH).unwrap_or(0)
    }

    /// Whether the GPU computes in the host's memory.
    pub fn is_integrated(&self) -> bool {
        self.context
            .attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_INTEGRATED)
            .is_ok_and(|integrated| integrated != 0)
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|e| self.failed("finish", e))
    }

    /// Reads a list that `stream` makes. It is waited for first: the driver holds a lock while it copies to ordinary
    /// memory, from the call until everything before the copy is done, and nobody could load weights meanwhile.
    pub(super) fn read_back<T: DeviceRepr + Clone + Default>(
        &self,
        from: &CudaSlice<T>,
        stream: &Arc<CudaStream>,
    ) -> std::result::Result<Vec<T>, DriverError> {
        stream.synchronize()?;
        let values = stream.clone_dtoh(from)?;
        stream.synchronize()?;
        Ok(values)
    }

    /// `out = x · wᵀ`. cuBLAS thinks in columns: `outᵀ = w · xᵀ`, where our rows are its columns.
    pub(super) fn product(&self, x: &Tensor, w: &Tensor, out: &mut Tensor) -> Result<()> {
        let shapes = ((x.rows, x.cols), (w.rows, w.cols), (out.rows, out.cols));
        fit("linear", x.cols == w.cols && shapes.2 == (x.rows, w.rows), &shapes)?;
        let (m, n, k) = (x.rows as i32, w.rows as i32, x.cols as i32);
        if m == 0 {
            return Ok(());
        }
        let (one, zero) = (1f32, 0f32);
        let dtype = match self.compute {
            Compute::Bf16 => cublas_sys::cudaDataType::CUDA_R_16BF,
            Compute::F32 => cublas_sys::cudaDataType::CUDA_R_32F,
        };
        // SAFETY: the matrices have the shapes given, on this device, and live until the stream has passed.
        let done = unsafe {
            cublas::gemm_ex(
                *self.blas.handle(),
                cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                n,
                m,
                k,
                (&raw const one).cast::<c_void>(),
                w.pointer(self) as *const c_void,
                dtype,
                k,
                x.pointer(self) as *const c_void,
                dtype,
                k,
                (&raw const zero).cast::<c_void>(),
                out.pointer(self) as *mut c_void,
                dtype,
                n,
                cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        w.used(self)?;
        done.map_err(|e| {
            Error::run(format!("cuBLAS on {}: a {m} x {n} x {k} product failed: {e}", self.name))
        })
    }

    /// The attention kernel for what it is asked to do, compiled when first asked for.
    pub(super) fn attention_kernel(&self, what: AttentionFor) -> Result<Attention> {
        if what.dim > 512 || !what.dim.is_multiple_of(2) {
            return Err(Error::run(format!(
                "heads of {} features do not fit the GPU's attention kernel: it takes even numbers up to 512",
                what.dim
            ))
            .fix("use --device cpu"));
        }
        let mut known = self.attention.lock().expect("no holder of this lock panics");
        if let Some(kernel) = known.get(&what) {
            return Ok(kernel.clone());
        }
        let kernel = kernels::attention(&self.context, &self.architecture, self.compute, what)?;
        known.insert(what, kernel.clone());
        Ok(kernel)
    }

    /// Copies what the finishing stream made.
    pub(super) fn read_finished(&self, from: &CudaView<u8>, to: &mut [u8]) -> Result<()> {
        let at = from.device_ptr(&self.finishing).0;
        // SAFETY: the slice is as long as `to`: both hold the codes or the scales of one weight.
        let copied = unsafe { self.codes.download(at, to) };
        copied.map_err(|e| self.failed("copy from the card", e))
    }

    pub(super) fn failed(&self, what: &str, error: DriverError) -> Error {
        let out_of_memory = error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let error = Error::run(format!("{}: can't {what}: {error}", self.name));
        if out_of_memory {
            let reserved = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT;
            let fits = self.free_memory() + pooled(&self.context, reserved).unwrap_or(0);
            // What is between the tensors, and what the driver takes for itself, has no use for them.
            let fits = crate::units::binary(fits / 100 * 95);
            return error.fix(format!(
                "end other programs on the card, or go on in what is free with --memory-per-rank {} and --resume",
                fits.replace(' ', "")
            ));
        }
        error.fix("check the card with nvidia-smi, then use --resume")
    }
}
