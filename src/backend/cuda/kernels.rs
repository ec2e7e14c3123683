//! Compiling kernels for the GPU at hand, and launching them.

use std::ffi::CString;
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError, LaunchArgs, LaunchConfig,
    PushKernelArg,
};
use cudarc::nvrtc::{Ptx, result, sys};

use crate::backend::Compute;
use crate::error::{Error, Result};

const COMMON: &str = include_str!("../../../kernels/common.cuh");
const ELEMENTWISE: &str = include_str!("../../../kernels/elementwise.cu");
const NVFP4: &str = include_str!("../../../kernels/nvfp4.cu");
const SOLVER: &str = include_str!("../../../kernels/solver.cu");
const ATTENTION: &str = include_str!("../../../kernels/attention.cu");

/// A kernel that takes the arguments `A`, a tuple, in the order of its signature.
pub struct Kernel<A> {
    function: CudaFunction,
    arguments: PhantomData<fn(A)>,
}

impl<A> Clone for Kernel<A> {
    fn clone(&self) -> Kernel<A> {
        Kernel { function: self.function.clone(), arguments: PhantomData }
    }
}

impl<A: Arguments> Kernel<A> {
    fn of(module: &Arc<CudaModule>, name: &str) -> Result<Kernel<A>> {
        let function = module.load_function(name);
        let function = function.map_err(|e| Error::run(format!("CUDA: there is no kernel {name}: {e}")))?;
        Ok(Kernel { function, arguments: PhantomData })
    }

    /// Starts the kernel on `stream`; a grid without blocks has nothing to do.
    ///
    /// # Safety
    /// Addresses among the arguments are those of memory that the kernel may access as its source says, and that stays
    /// until `stream` has passed.
    pub unsafe fn launch(
        &self,
        stream: &CudaStream,
        config: LaunchConfig,
        arguments: A,
    ) -> std::result::Result<(), DriverError> {
        let (x, y, z) = config.grid_dim;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let mut builder = stream.launch_builder(&self.function);
        arguments.push(&mut builder);
        // SAFETY: types and number of the arguments are the kernel's (`signatures_are_those_of_the_sources`); the rest
        // is the caller's promise.
        unsafe { builder.launch(config) }.map(|_| ())
    }
}

/// Arguments of a kernel.
pub trait Arguments {
    /// Hands them over, in order.
    fn push<'a>(&'a self, builder: &mut LaunchArgs<'a>);
}

macro_rules! arguments {
    ($($name:ident)+) => {
        impl<$($name: DeviceRepr),+> Arguments for ($($name,)+) {
            #[allow(non_snake_case)]
            fn push<'a>(&'a self, builder: &mut LaunchArgs<'a>) {
                let ($($name,)+) = self;
                $(builder.arg($name);)+
            }
        }
    };
}

arguments!(A B);
arguments!(A B C);
arguments!(A B C D);
arguments!(A B C D E);
arguments!(A B C D E F);
arguments!(A B C D E F G);
arguments!(A B C D E F G H);
arguments!(A B C D E F G H I);
arguments!(A B C D E F G H I J);
arguments!(A B C D E F G H I J K);
arguments!(A B C D E F G H I J K L);

/// Declares kernels with the types of their arguments: addresses and `u64` as `u64`, `int` as `i32`, `float` as `f32`.
macro_rules! kernels {
    ($(#[$doc:meta])* $set:ident { $($name:ident($($kind:ty),+)),+ $(,)? }) => {
        $(#[$doc])*
        pub struct $set {
            $(pub $name: Kernel<($($kind,)+)>,)+
        }

        impl $set {
            /// Loads what was compiled.
            pub fn new(context: &Arc<CudaContext>, binary: Vec<u8>) -> Result<$set> {
                let module = load_binary(context, binary)?;
                Ok($set { $($name: Kernel::of(&module, stringify!($name))?,)+ })
            }

            #[cfg(test)]
            const SIGNATURES: &'static [(&'static str, &'static [&'static str])] =
                &[$((stringify!($name), &[$(stringify!($kind)),+])),+];
        }
    };
}

kernels! {
    /// The kernels that do not depend on a model.
    Kernels {
        embed(u64, u64, i32, u64),
        rms_norm(u64, u64, i32, f32, u64),
        norm_long(u64, u64, u64, i32, i32, i32, i32, i32, f32, u64),
        norm_short(u64, u64, u64, i32, i32, i32, i32, i32, f32, u64, u64),
        rope(u64, u64, u64, u64, i32, i32, i32, i32, i32, i32, u64),
        rope_exact(u64, u64, u64, u64, i32, i32, i32, i32, i32, i32, u64),
        silu_mul(u64, u64, u64),
        activate(u64, u64, i32, f32, f32, u64),
        gate_by_sigmoid(u64, u64, u64),
        multiply(u64, f32, u64),
        multiply_rows(u64, u64, u64, i32, u64),
        softcap(u64, f32, u64),
        copy_columns(u64, i32, i32, i32, u64, i32, u64),
        add(u64, u64, u64),
        add_bias(u64, u64, i32, u64),
        amax(u64, u64, u64),
        quantize(u64, u64, f32, u64, u64),
        quantize_input(u64, u64, f32),
        channel_sums(u64, i32, i32, u64, u64),
    }
}

/// Compiles the kernels of the forward pass and of rounding, without a context.
pub fn elementwise(compute: Compute, architecture: &str) -> Result<Vec<u8>> {
    compile(&[ELEMENTWISE, NVFP4], compute, architecture, &[]).map(|(binary, _)| binary)
}

/// Compiles the kernels that choose codes.
pub fn solving(architecture: &str) -> Result<Vec<u8>> {
    compile(&[NVFP4, SOLVER], Compute::F32, architecture, &[]).map(|(binary, _)| binary)
}

kernels! {
    /// The kernels that choose codes, on f32 matrices.
    SolverKernels {
        amax(u64, u64, u64),
        quantize(u64, u64, f32, u64, u64),
        mirror(u64, i32),
        widen(u64, f32, u64, u64),
        scale(u64, u64, i32, u64, u64, u64),
        divide(u64, i32, f32, u64, i32, u64, u64),
        serve(u64, i32, f32, u64, i32, u64, f32, u64),
        diagonal(u64, i32, u64),
        columns(u64, i32, f32, i32, i32, u64, u64),
        distance(u64, i32, f32, u64, i32, f32, u64, u64),
        dequantize(u64, u64, u64, u64),
        quantize_searched(u64, u64, i32, u64, f32, u64, u64),
        damped(u64, u64, i32, f32, u64),
        cholesky_tile(u64, i32, i32, i32, u64, u64),
        place(u64, u64, i32, i32, u64),
        round_panel(u64, i32, i32, i32, u64, i32, u64, u64, f32, u64, u64, u64),
    }
}

/// Queries, keys, values, bounds, heads, key and value heads, scale, window, softcap, sinks, outputs.
pub type Attention = Kernel<(u64, u64, u64, u64, i32, i32, f32, i32, f32, u64, u64)>;

/// What an attention kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionFor {
    /// Features of a head.
    pub dim: usize,
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether heads have sinks.
    pub sinks: bool,
}

impl AttentionFor {
    fn defines(self) -> Vec<String> {
        let mut defines = vec![format!("-DHEAD_DIM={}", self.dim)];
        defines.extend(self.softcap.then(|| "-DSOFTCAP".to_string()));
        defines.extend(self.sinks.then(|| "-DSINKS".to_string()));
        defines
    }
}

/// The attention kernel for what it is asked to do.
pub fn attention(
    context: &Arc<CudaContext>,
    architecture: &str,
    compute: Compute,
    what: AttentionFor,
) -> Result<Attention> {
    let (binary, _) = compile(&[ATTENTION], compute, architecture, &what.defines())?;
    Kernel::of(&load_binary(context, binary)?, "attention")
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

/// Launches a kernel on the forward pass's stream, or `on` another, with the arguments of its signature.
macro_rules! launch {
    ($cuda:expr, $kernel:expr, $config:expr, $($arg:expr),+ $(,)?) => {
        launch!(on stream: $cuda, $kernel, $config, $($arg),+)
    };
    (on $stream:ident: $cuda:expr, $kernel:expr, $config:expr, $($arg:expr),+ $(,)?) => {{
        let cuda: &Cuda = $cuda;
        // SAFETY: addresses come from tensors whose shapes the operation has checked, and whose memory is freed on this
        // stream, or on another that waits for this launch (Tensor::used).
        let launched = unsafe { $kernel.launch(&cuda.$stream, $config, ($($arg,)+)) };
        launched.map_err(|e| cuda.failed("launch a kernel", e))
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

    /// The types of a kernel's arguments by its source, as [`kernels!`] writes them.
    fn declared(source: &str, kernel: &str) -> Vec<&'static str> {
        let (_, rest) = source.split_once(&format!(" {kernel}(")).unwrap_or_else(|| panic!("no {kernel}"));
        let (list, _) = rest.split_once(')').expect("a signature ends");
        let kind = |argument: &str| match argument.trim() {
            pointer if pointer.contains('*') => "u64",
            number if number.starts_with("u64 ") => "u64",
            number if number.starts_with("int ") => "i32",
            number if number.starts_with("float ") => "f32",
            other => panic!("{kernel}: {other}"),
        };
        list.split(',').map(kind).collect()
    }

    #[test]
    fn signatures_are_those_of_the_sources() {
        let entries = |sources: &[&str]| -> String {
            let parts = sources.iter().flat_map(|source| source.split("extern \"C\" __global__").skip(1));
            parts.map(|part| format!("{}\n", part.split_once('{').expect("a body").0)).collect()
        };
        for (sources, signatures) in
            [([ELEMENTWISE, NVFP4], Kernels::SIGNATURES), ([NVFP4, SOLVER], SolverKernels::SIGNATURES)]
        {
            for (kernel, kinds) in signatures {
                assert_eq!(declared(&entries(&sources), kernel), *kinds, "{kernel}");
            }
        }
        let attention = declared(&entries(&[ATTENTION]), "attention");
        let expected = ["u64", "u64", "u64", "u64", "i32", "i32", "f32", "i32", "f32", "u64", "u64"];
        assert_eq!(attention, expected);
    }

    /// Without a GPU: every kernel compiles for every architecture that distq serves, and those of the forward pass
    /// need no more registers than there are. Attention may spill with heads of other sizes than 64 and 128; that is
    /// reported.
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
                let what = |dim, softcap, sinks| AttentionFor { dim, softcap, sinks };
                let plain = [10, 64, 128, 256, 512].map(|dim| what(dim, false, false));
                let others = [what(80, true, false), what(96, false, true), what(512, true, true)];
                for what in plain.into_iter().chain(others) {
                    let options = [what.defines(), vec![verbose.clone()]].concat();
                    let compiled = compile(&[ATTENTION], compute, architecture, &options).unwrap();
                    let may_spill = ![10, 64, 128].contains(&what.dim);
                    report(&format!("{compute:?}, {what:?}"), may_spill, compiled);
                }
            }
        }
    }
}
