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
    /// Loads what [`elementwise`] compiled.
    pub fn new(context: &Arc<CudaContext>, binary: Vec<u8>) -> Result<Kernels> {
        let module = load_binary(context, binary)?;
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

/// Compiles the kernels of the forward pass and of rounding, without a context.
pub fn elementwise(compute: Compute, architecture: &str) -> Result<Vec<u8>> {
    compile(&[ELEMENTWISE, NVFP4], compute, architecture, &[]).map(|(binary, _)| binary)
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
    let (binary, _) = compile(sources, compute, &format!("{major}{minor}"), defines)?;
    load_binary(context, binary)
}

fn load_binary(context: &Arc<CudaContext>, binary: Vec<u8>) -> Result<Arc<CudaModule>> {
    context.load_module(Ptx::from_binary(binary)).map_err(|e| {
        Error::run(format!("CUDA: the card refuses the kernels: {e}")).fix("update the NVIDIA driver")
    })
}

/// Compiles kernel sources to machine code for one architecture, such as `90`. Machine code needs no compiler in
/// the driver, so an NVRTC that is newer than the driver does no harm. Also returns what the compiler has to say, such
/// as registers by kernel where `--ptxas-options=-v` is among the options.
pub fn compile(
    sources: &[&str],
    compute: Compute,
    architecture: &str,
    defines: &[String],
) -> Result<(Vec<u8>, String)> {
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
        let log = result::get_program_log(program).unwrap_or_default();
        let log: String = log.iter().map(|&c| c as u8 as char).filter(|&c| c != '\0').collect();
        let outcome = match compiled {
            Ok(()) => machine_code(program).map(|binary| (binary, log)),
            Err(_) => {
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

    /// Kernels that keep more than they have registers for, with the bytes spilled, from the compiler's words.
    fn spilling(log: &str) -> Vec<(String, u32)> {
        let mut kernel = "";
        let mut spilling = vec![];
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                kernel = rest.split('\'').next().unwrap_or_default();
            }
            let stores =
                line.split_once(" bytes spill stores").and_then(|(before, _)| before.rsplit(' ').next());
            if let Some(bytes) = stores.and_then(|bytes| bytes.parse().ok()).filter(|&bytes| bytes > 0) {
                spilling.push((kernel.to_string(), bytes));
            }
        }
        spilling
    }

    #[test]
    fn spills_are_found_in_the_compiler_s_words() {
        let log = "ptxas info    : Compiling entry function 'add' for 'sm_80'\nptxas info    : Function properties for \
                   add\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Compiling \
                   entry function 'attention' for 'sm_80'\n    8 bytes stack frame, 12 bytes spill stores, 16 bytes \
                   spill loads";
        assert_eq!(spilling(log), [("attention".to_string(), 12)]);
    }

    /// Without a GPU: every kernel compiles for every architecture that distq serves, and those of the forward pass
    /// need no more registers than there are. Head sizes beyond 128 may spill; that is reported.
    #[test]
    fn every_kernel_compiles() {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            panic!("libnvrtc was not found: run the tests with `make test`, which installs it");
        }
        let verbose = "--ptxas-options=-v".to_string();
        for architecture in ["80", "86", "89", "90", "100", "120", "121"] {
            let report = |what: &str, may_spill: bool, (binary, log): (Vec<u8>, String)| {
                assert!(!binary.is_empty() && log.contains("registers"), "{what}: {log}");
                for (kernel, bytes) in spilling(&log) {
                    // Past the test harness, which keeps what passing tests print to itself.
                    let text = format!("sm_{architecture}, {what}: {kernel} spills {bytes} bytes\n");
                    std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes()).unwrap();
                    assert!(may_spill, "{text}");
                }
            };
            let options = std::slice::from_ref(&verbose);
            report("solver", false, compile(&[NVFP4, SOLVER], Compute::F32, architecture, options).unwrap());
            for compute in [Compute::Bf16, Compute::F32] {
                let what = format!("{compute:?}");
                report(&what, false, compile(&[ELEMENTWISE, NVFP4], compute, architecture, options).unwrap());
                for dim in [10, 64, 128, 256] {
                    let options = [verbose.clone(), format!("-DHEAD_DIM={dim}")];
                    let what = format!("{compute:?}, heads of {dim}");
                    report(&what, dim > 128, compile(&[ATTENTION], compute, architecture, &options).unwrap());
                }
            }
        }
    }
}
