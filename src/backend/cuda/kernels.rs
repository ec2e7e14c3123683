//! Compiling kernels for the GPU at hand, and launching them.

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::{Ptx, result, sys};

use crate::backend::Compute;
use crate::error::{Error, Result};

const COMMON: &str = include_str!("../../../kernels/common.cuh");
const ELEMENTWISE: &str = include_str!("../../../kernels/elementwise.cu");
const NVFP4: &str = include_str!("../../../kernels/nvfp4.cu");
const SOLVER: &str = include_str!("../../../kernels/solver.cu");
const ATTENTION: &str = include_str!("../../../kernels/attention.cu");

/// The kernels that do not depend on a model.
pub struct Kernels {
    pub embed: CudaFunction,
    pub rms_norm: CudaFunction,
    pub rope: CudaFunction,
    pub silu_mul: CudaFunction,
    pub add: CudaFunction,
    pub add_bias: CudaFunction,
    pub amax: CudaFunction,
    pub quantize: CudaFunction,
    pub quantize_input: CudaFunction,
    pub channel_sums: CudaFunction,
}

impl Kernels {
    /// Compiles and loads them.
    pub fn new(context: &Arc<CudaContext>, compute: Compute) -> Result<Kernels> {
        let module = load(context, &[ELEMENTWISE, NVFP4], compute, &[])?;
        let function = |name: &str| {
            module
                .load_function(name)
                .map_err(|e| Error::run(format!("CUDA: there is no kernel {name}: {e}")))
        };
        Ok(Kernels {
            embed: function("embed")?,
            rms_norm: function("rms_norm")?,
            rope: function("rope")?,
            silu_mul: function("silu_mul")?,
            add: function("add")?,
            add_bias: function("add_bias")?,
            amax: function("amax")?,
            quantize: function("quantize")?,
            quantize_input: function("quantize_input")?,
            channel_sums: function("channel_sums")?,
        })
    }
}

macro_rules! solver_kernels {
    ($($name:ident),+ $(,)?) => {
        /// The kernels that choose codes, on f32 matrices.
        pub struct SolverKernels {
            $(pub $name: CudaFunction,)+
        }

        impl SolverKernels {
            /// Compiles and loads them.
            pub fn new(context: &Arc<CudaContext>) -> Result<SolverKernels> {
                let module = load(context, &[NVFP4, SOLVER], Compute::F32, &[])?;
                let function = |name: &str| {
                    module
                        .load_function(name)
                        .map_err(|e| Error::run(format!("CUDA: there is no kernel {name}: {e}")))
                };
                Ok(SolverKernels { $($name: function(stringify!($name))?,)+ })
            }
        }
    };
}

solver_kernels!(
    amax,
    quantize,
    quantize_input,
    widen_bf16,
    scale,
    divide,
    diagonal,
    columns,
    distance,
    dequantize,
    quantize_searched,
    damped,
    cholesky_tile,
    place,
    round_panel,
);

/// The attention kernel for heads of `dim` features.
pub fn attention(context: &Arc<CudaContext>, compute: Compute, dim: usize) -> Result<CudaFunction> {
    let module = load(context, &[ATTENTION], compute, &[format!("-DHEAD_DIM={dim}")])?;
    module
        .load_function("attention")
        .map_err(|e| Error::run(format!("CUDA: there is no attention kernel: {e}")))
}

fn load(
    context: &Arc<CudaContext>,
    sources: &[&str],
    compute: Compute,
    defines: &[String],
) -> Result<Arc<CudaModule>> {
    let (major, minor) =
        context.compute_capability().map_err(|e| Error::run(format!("CUDA: can't ask the card: {e}")))?;
    let binary = compile(sources, compute, &format!("{major}{minor}"), defines)?;
    context.load_module(Ptx::from_binary(binary)).map_err(|e| {
        Error::run(format!("CUDA: the card refuses the kernels: {e}")).fix("update the NVIDIA driver")
    })
}

/// Compiles kernel sources to machine code for one architecture, such as `90`. Machine code needs no compiler in
/// the driver, so an NVRTC that is newer than the driver does no harm.
pub fn compile(
    sources: &[&str],
    compute: Compute,
    architecture: &str,
    defines: &[String],
) -> Result<Vec<u8>> {
    let source = std::iter::once(&COMMON).chain(sources).copied().collect::<Vec<_>>().join("\n");
    let source = CString::new(source).expect("kernel sources hold no zero byte");
    let element = match compute {
        Compute::Bf16 => "-DELEMENT_BF16",
        Compute::F32 => "-DELEMENT_F32",
    };
    // Without contraction to multiply-add, values are rounded where the sources say, as on the CPU.
    let mut options = vec![
        format!("--gpu-architecture=sm_{architecture}"),
        "--fmad=false".to_string(),
        element.to_string(),
    ];
    options.push("--std=c++17".to_string());
    options.extend_from_slice(defines);
    let failed = |e: result::NvrtcError| Error::run(format!("NVRTC: {e}"));
    let program = result::create_program(&source, None).map_err(failed)?;
    // SAFETY: the program was just created and is destroyed once, after its last use.
    unsafe {
        let compiled = result::compile_program(program, &options);
        let outcome = match compiled {
            Ok(()) => machine_code(program),
            Err(_) => {
                let log = result::get_program_log(program).unwrap_or_default();
                let log: String = log.iter().map(|&c| c as u8 as char).filter(|&c| c != '\0').collect();
                Err(Error::run(format!("NVRTC can't compile the kernels for sm_{architecture}: {log}"))
                    .fix("install the NVRTC that belongs to the driver"))
            }
        };
        let _ = result::destroy_program(program);
        outcome
    }
}

/// # Safety
/// `program` has been compiled.
unsafe fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let failed = |e: result::NvrtcError| Error::run(format!("NVRTC gives no machine code: {e}"));
    // SAFETY: the size is asked for first, and the buffer has it.
    unsafe {
        let mut size = 0;
        sys::nvrtcGetCUBINSize(program, &mut size).result().map_err(failed)?;
        let mut binary = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, binary.as_mut_ptr().cast()).result().map_err(failed)?;
        Ok(binary)
    }
}

/// Launches a kernel on the forward pass's stream, or `on` another. Arguments are given by value, as in the kernel's signature.
macro_rules! launch {
    ($cuda:expr, $kernel:expr, $config:expr, $($arg:expr),+ $(,)?) => {
        launch!(on stream: $cuda, $kernel, $config, $($arg),+)
    };
    (on $stream:ident: $cuda:expr, $kernel:expr, $config:expr, $($arg:expr),+ $(,)?) => {{
        use cudarc::driver::PushKernelArg;
        let (cuda, config): (&Cuda, LaunchConfig) = ($cuda, $config);
        if config.grid_dim.0 == 0 || config.grid_dim.1 == 0 || config.grid_dim.2 == 0 {
            Ok(())
        } else {
            // SAFETY: the arguments are those of the kernel's signature, in order; pointers come from tensors
            // whose memory is freed on this stream, or on another that waits for this launch (Tensor::used).
            let launched = unsafe { cuda.$stream.launch_builder($kernel)$(.arg(&$arg))+.launch(config) };
            launched.map(|_| ()).map_err(|e| cuda.failed("launch a kernel", e))
        }
    }};
}

pub(super) use launch;

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a GPU: every kernel compiles for every architecture that distq serves.
    #[test]
    fn every_kernel_compiles() {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            panic!("libnvrtc was not found: run the tests with `make test`, which installs it");
        }
        for compute in [Compute::Bf16, Compute::F32] {
            for architecture in ["80", "86", "89", "90", "100", "120"] {
                compile(&[ELEMENTWISE, NVFP4], compute, architecture, &[]).unwrap();
                compile(&[NVFP4, SOLVER], Compute::F32, architecture, &[]).unwrap();
                for dim in [10, 64, 128, 256] {
                    compile(&[ATTENTION], compute, architecture, &[format!("-DHEAD_DIM={dim}")]).unwrap();
                }
            }
        }
    }
}
