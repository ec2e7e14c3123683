//! The CUDA backend: one GPU, BF16 or F32 arithmetic with F32 sums.
//!
//! The driver, cuBLAS and NVRTC are loaded when a GPU is asked for, so the same binary runs where there is
//! none. Kernels (`kernels/*.cu`) are compiled for the GPU at hand when the backend starts.

mod device;
mod kernels;
mod lane;
mod solver;
mod staging;
mod sums;
mod tensor;

use std::sync::Mutex;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, DevicePtr, LaunchConfig};

pub use device::{Cuda, available, visible};
pub use tensor::Tensor;

use super::operations::{fit, fit_columns, fit_factors};
use super::{Activation, AttentionShape, Backend, Channels, Compute, Gamma, NormKind, Rotation};
use crate::checkpoint::SourceTensor;
use crate::error::Result;
use crate::nvfp4::{BLOCK, GlobalScale};
use kernels::{AttentionFor, launch};
pub use solver::{Codes, Factor, Matrix};
pub use sums::DeviceSums;

/// A list of `u32` on the GPU, with a copy here: bounds are read on both sides.
pub struct Index {
    device: cudarc::driver::CudaSlice<u32>,
    host: Vec<u32>,
}

/// Running maxima on the GPU, as bits of non-negative floats.
pub struct Amax(Mutex<cudarc::driver::CudaSlice<u32>>);

/// Threads of a block where each takes one element.
const THREADS: u32 = 256;

/// Bytes that kernels load at a time: `Pack` in `kernels/common.cuh`.
const PACK_BYTES: usize = 16;

/// The longest piece of a row that one warp normalizes; a block takes longer ones.
const SHORT: usize = 1024;

/// One block for each of `n` pieces of work.
fn blocks(n: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (n as u32, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// One thread for each of `n` elements.
fn threads_for(n: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (n.div_ceil(THREADS as usize) as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

impl Cuda {
    fn pointer(&self, index: &Index) -> u64 {
        index.device.device_ptr(&self.stream).0
    }

    /// Elements that kernels load at a time.
    fn pack(&self) -> usize {
        PACK_BYTES / self.compute.bytes()
    }

    /// Packs that hold a matrix.
    fn packs(&self, x: &Tensor) -> usize {
        (x.rows * x.cols).div_ceil(self.pack())
    }

    /// Normalizes each piece of `dim` elements of `x` into `to`; the shapes fit.
    fn normalize(
        &self,
        x: &Tensor,
        dim: usize,
        kind: &NormKind,
        [weight, bias]: [Option<&Tensor>; 2],
        to: u64,
    ) -> Result<()> {
        let pieces = x.rows * (x.cols / dim);
        let own = weight.map_or(1, |weight| weight.rows * weight.cols / dim);
        let gamma = match kind.gamma {
            Gamma::Weight => 0,
            Gamma::OnePlus => 1,
            Gamma::OnePlusRounded => 2,
            Gamma::One => 3,
        };
        let at = |x: Option<&Tensor>| x.map_or(0, |x| x.pointer(self));
        let (from, weight_at, bias_at) = (x.pointer(self), at(weight), at(bias));
        let (dim_, own, centers) = (dim as i32, own as i32, i32::from(kind.centers));
        let (first, eps, k) = (i32::from(kind.rounds_first), kind.eps, &self.kernels);
        if dim <= SHORT {
            let (config, n) = (threads_for(pieces * 32), pieces as u64);
            launch!(
                self,
                &k.norm_short,
                config,
                from,
                weight_at,
                bias_at,
                dim_,
                own,
                centers,
                gamma,
                first,
                eps,
                to,
                n
            )?;
        } else {
            let config = blocks(pieces);
            launch!(
                self,
                &k.norm_long,
                config,
                from,
                weight_at,
                bias_at,
                dim_,
                own,
                centers,
                gamma,
                first,
                eps,
                to
            )?;
        }
        weight.map_or(Ok(()), |weight| weight.used(self))?;
        bias.map_or(Ok(()), |bias| bias.used(self))
    }

    /// Activates `packs` packs at `gate`, and multiplies them with those at `up` unless that is null.
    fn activated(&self, gate: u64, up: u64, activation: Activation, packs: usize) -> Result<()> {
        let (number, p, n) = match activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::GeluTanh => (1, 0.0, 0.0),
            Activation::Gelu => (2, 0.0, 0.0),
            Activation::Relu2 => (3, 0.0, 0.0),
            Activation::Xielu { alpha_p, alpha_n } => (4, alpha_p, alpha_n),
        };
        launch!(self, &self.kernels.activate, threads_for(packs), gate, up, number, p, n, packs as u64)
    }

    /// Enough blocks to fill the card; each walks over its share of `n` elements.
    fn walk(&self, n: u64) -> LaunchConfig {
        let blocks = n.div_ceil(THREADS as u64 * 8).min(self.processors as u64 * 8) as u32;
        LaunchConfig { grid_dim: (blocks.max(1), 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Index = Index;
    type Amax = Amax;
    type Sums = DeviceSums;
    type Moment = CudaEvent;

    fn compute(&self) -> Compute {
        self.compute
    }

    fn moment(&self) -> Result<CudaEvent> {
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(timed).map_err(|e| self.failed("mark a moment", e))
    }

    fn seconds(&self, earlier: &CudaEvent, later: &CudaEvent) -> Result<f64> {
        let between = earlier.elapsed_ms(later).map_err(|e| self.failed("take the time", e))?;
        Ok(f64::from(between) / 1e3)
    }

    fn load(&self, source: &SourceTensor) -> Result<Tensor> {
        Tensor::load(self, source)
    }

    fn activation(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::zeros(self, rows, cols)
    }

    fn set_rows(&self, x: &mut Tensor, rows: usize) {
        x.set_rows(rows);
    }

    fn upload(&self, bytes: &[u8], x: &mut Tensor) -> Result<()> {
        x.upload(self, bytes)
    }

    fn arrived(&self, bytes: &[u8], cols: usize) -> Result<Tensor> {
        let rows = bytes.len() / (cols * self.compute.bytes()).max(1);
        Tensor::uploaded(self, &self.arrivals, rows, cols, bytes.len(), &|at, to| {
            to.copy_from_slice(&bytes[at..at + to.len()]);
            Ok(())
        })
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        to.copy_from(self, from)
    }

    fn download_as_of(&self, moment: &CudaEvent, x: &Tensor, bytes: &mut Vec<u8>) -> Result<()> {
        x.download(self, moment, bytes)
    }

    fn index(&self, values: &[u32]) -> Result<Index> {
        let device = self.stream.clone_htod(values).map_err(|e| self.failed("copy a list", e))?;
        Ok(Index { device, host: values.to_vec() })
    }

    fn constant(&self, values: &[f32], cols: usize) -> Result<Tensor> {
        Tensor::constant(self, values, cols, self.compute)
    }

    fn exact_constant(&self, values: &[f32], cols: usize) -> Result<Tensor> {
        Tensor::constant(self, values, cols, Compute::F32)
    }

    fn embed(&self, table: &Tensor, ids: &Index, out: &mut Tensor) -> Result<()> {
        let inside = ids.host.iter().all(|&id| (id as usize) < table.rows);
        let shapes = (table.shape(), ids.host.len(), out.shape());
        fit("embed", inside && out.shape() == (ids.host.len(), table.cols), &shapes)?;
        let config = blocks(out.rows);
        let (table_at, to) = (table.pointer(self), out.pointer(self));
        launch!(self, &self.kernels.embed, config, table_at, self.pointer(ids), table.cols as i32, to)?;
        table.used(self)
    }

    fn norm(
        &self,
        x: &Tensor,
        kind: &NormKind,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        kind.fit(x.shape(), x.cols, weight.map(Tensor::shape), bias.map(Tensor::shape), out.shape())?;
        if let (Some(weight), None, true) = (weight, bias, *kind == NormKind::llama(kind.eps)) {
            let (from, weight_at, to) = (x.pointer(self), weight.pointer(self), out.pointer(self));
            let config = blocks(x.rows);
            launch!(self, &self.kernels.rms_norm, config, from, weight_at, x.cols as i32, kind.eps, to)?;
            return weight.used(self);
        }
        self.normalize(x, x.cols, kind, [weight, bias], out.pointer(self))
    }

    fn norm_heads(&self, x: &mut Tensor, dim: usize, kind: &NormKind, weight: Option<&Tensor>) -> Result<()> {
        kind.fit(x.shape(), dim, weight.map(Tensor::shape), None, x.shape())?;
        self.normalize(x, dim, kind, [weight, None], x.pointer(self))
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        self.product(x, weight, out)?;
        match bias {
            None => Ok(()),
            Some(bias) => {
                fit("bias", bias.shape() == (1, out.cols), &(bias.shape(), out.shape()))?;
                let n = out.rows * out.cols;
                let (to, bias_at) = (out.pointer(self), bias.pointer(self));
                launch!(
                    self,
                    &self.kernels.add_bias,
                    threads_for(n),
                    to,
                    bias_at,
                    out.cols as i32,
                    n as u64
                )?;
                bias.used(self)
            }
        }
    }

    fn rope(
        &self,
        x: &mut Tensor,
        rotation: &Rotation,
        cos: &Tensor,
        sin: &Tensor,
        rows: &Index,
    ) -> Result<()> {
        rotation.fit(x.shape(), cos.shape(), sin.shape(), &rows.host)?;
        fit("rope", cos.wide == sin.wide, &"a table in f32 and one in the compute dtype")?;
        let (dim, half) = (rotation.head_dim, cos.cols);
        let pairs = x.rows * (x.cols / dim) * half;
        // Where turned halves and heads are whole packs, a thread takes a pack of pairs.
        let wide = half.is_multiple_of(self.pack()) && dim.is_multiple_of(self.pack());
        let config = threads_for(pairs / if wide { self.pack() } else { 1 });
        let kernel = match cos.wide && self.compute == Compute::Bf16 {
            true => &self.kernels.rope_exact,
            false => &self.kernels.rope,
        };
        let (x_at, cos_at, sin_at) = (x.pointer(self), cos.pointer(self), sin.pointer(self));
        let (interleaved, once) = (i32::from(rotation.interleaved), i32::from(rotation.rounds_once));
        launch!(
            self,
            kernel,
            config,
            x_at,
            cos_at,
            sin_at,
            self.pointer(rows),
            dim as i32,
            half as i32,
            x.cols as i32,
            interleaved,
            once,
            i32::from(wide),
            pairs as u64
        )
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        bounds: &Index,
        how: &AttentionShape,
        sinks: Option<&Tensor>,
        out: &mut Tensor,
    ) -> Result<()> {
        let given = [q.shape(), k.shape(), v.shape(), out.shape()];
        how.fit(given, &bounds.host, sinks.map(Tensor::shape))?;
        let heads = how.heads;
        let what = AttentionFor { dim: heads.dim, softcap: how.softcap.is_some(), sinks: sinks.is_some() };
        let kernel = self.attention_kernel(what)?;
        let longest = bounds.host.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        let documents = bounds.host.len() as u32 - 1;
        let (grid_dim, threads) = match self.compute {
            // Beyond 256 features, two warps share 16 queries: WARPS in the source.
            Compute::Bf16 => {
                let warps = if heads.dim <= 256 { 1 } else { 2 };
                ((longest.div_ceil(64), heads.heads as u32, documents), 128 * warps)
            }
            Compute::F32 => ((q.rows as u32, heads.heads as u32, 1), 128),
        };
        let config = LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        let window = how.window.map_or(i32::MAX, |window| window.min(i32::MAX as usize) as i32);
        let (q, k, v, to) = (q.pointer(self), k.pointer(self), v.pointer(self), out.pointer(self));
        let (cap, sinks_at) = (how.softcap.unwrap_or(0.0), sinks.map_or(0, |sinks| sinks.pointer(self)));
        launch!(
            self,
            &kernel,
            config,
            q,
            k,
            v,
            self.pointer(bounds),
            heads.heads as i32,
            heads.kv_heads as i32,
            how.scale,
            window,
            cap,
            sinks_at,
            to
        )?;
        sinks.map_or(Ok(()), |sinks| sinks.used(self))
    }

    fn activate_mul(&self, gate: &mut Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        fit("activate_mul", gate.shape() == up.shape(), &(gate.shape(), up.shape()))?;
        let packs = self.packs(gate);
        let (gate_at, up_at) = (gate.pointer(self), up.pointer(self));
        if activation == Activation::Silu {
            let config = threads_for(packs);
            return launch!(self, &self.kernels.silu_mul, config, gate_at, up_at, packs as u64);
        }
        self.activated(gate_at, up_at, activation, packs)
    }

    fn activate(&self, x: &mut Tensor, activation: Activation) -> Result<()> {
        self.activated(x.pointer(self), 0, activation, self.packs(x))
    }

    fn gate_by_sigmoid(&self, x: &mut Tensor, gate: &Tensor) -> Result<()> {
        fit("gate_by_sigmoid", x.shape() == gate.shape(), &(x.shape(), gate.shape()))?;
        let packs = self.packs(x);
        let (x, gate) = (x.pointer(self), gate.pointer(self));
        launch!(self, &self.kernels.gate_by_sigmoid, threads_for(packs), x, gate, packs as u64)
    }

    fn multiply(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        let packs = self.packs(x);
        let x = x.pointer(self);
        launch!(self, &self.kernels.multiply, threads_for(packs), x, factor, packs as u64)
    }

    fn multiply_rows(&self, x: &mut Tensor, factors: &Tensor, rows: &Index) -> Result<()> {
        fit_factors(x.shape(), factors.shape(), &rows.host)?;
        let (n, cols) = (x.rows * x.cols, x.cols as i32);
        let (x, by, rows) = (x.pointer(self), factors.pointer(self), self.pointer(rows));
        launch!(self, &self.kernels.multiply_rows, threads_for(n), x, by, rows, cols, n as u64)?;
        factors.used(self)
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        let packs = self.packs(x);
        launch!(self, &self.kernels.softcap, threads_for(packs), x.pointer(self), cap, packs as u64)
    }

    fn copy_columns(&self, from: &Tensor, first: usize, to: &mut Tensor) -> Result<()> {
        fit_columns(from.shape(), first, to.shape())?;
        let n = to.rows * to.cols;
        let wide = [first, from.cols, to.cols].iter().all(|cols| cols.is_multiple_of(self.pack()));
        let config = threads_for(n / if wide { self.pack() } else { 1 });
        let (from_at, to_at) = (from.pointer(self), to.pointer(self));
        let (first, all, part) = (first as i32, from.cols as i32, to.cols as i32);
        let kernel = &self.kernels.copy_columns;
        launch!(self, kernel, config, from_at, first, all, part, to_at, i32::from(wide), n as u64)
    }

    fn quantize_input(&self, x: &mut Tensor, input: GlobalScale) -> Result<()> {
        fit("quantize_input", x.cols.is_multiple_of(BLOCK), &x.shape())?;
        let blocks = x.rows * x.cols / BLOCK;
        let divisor = input.divisor();
        launch!(
            self,
            &self.kernels.quantize_input,
            threads_for(blocks),
            x.pointer(self),
            blocks as u64,
            divisor
        )
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        fit("add", x.shape() == y.shape(), &(x.shape(), y.shape()))?;
        let packs = self.packs(x);
        let (x, y) = (x.pointer(self), y.pointer(self));
        launch!(self, &self.kernels.add, threads_for(packs), x, y, packs as u64)
    }

    fn amax(&self, slots: usize) -> Result<Amax> {
        let slots = self.stream.alloc_zeros(slots).map_err(|e| self.failed("allocate maxima", e))?;
        Ok(Amax(Mutex::new(slots)))
    }

    fn observe(&self, x: &Tensor, amax: &mut Amax, slot: usize) -> Result<()> {
        let slots = amax.0.get_mut().expect("no holder of this lock panics");
        fit("observe", slot < slots.len(), &(slot, slots.len()))?;
        let at = slots.device_ptr(&self.stream).0 + 4 * slot as u64;
        let n = (x.rows * x.cols) as u64;
        launch!(self, &self.kernels.amax, self.walk(n), x.pointer(self), n, at)
    }

    fn read_amax(&self, amax: &Amax) -> Result<Vec<f32>> {
        let slots = amax.0.lock().expect("no holder of this lock panics");
        let bits = self.read_back(&slots, &self.stream).map_err(|e| self.failed("read maxima", e))?;
        Ok(bits.into_iter().map(f32::from_bits).collect())
    }

    fn sums(&self, cols: usize, products: bool, sampled: [usize; 2]) -> Result<DeviceSums> {
        DeviceSums::new(self, cols, products, sampled)
    }

    fn add_rows(&self, x: &Tensor, rows: &Index, role: usize, sums: &mut DeviceSums) -> Result<()> {
        sums.add_rows(self, x, rows, role)
    }

    fn add_channels(&self, x: &Tensor, sums: &mut DeviceSums) -> Result<()> {
        sums.add_channels(self, x)
    }

    fn add_products(&self, x: &Tensor, sums: &mut DeviceSums) -> Result<()> {
        sums.add_products(self, x)
    }

    fn read_channels(&self, sums: &DeviceSums) -> Result<Channels> {
        sums.read(self)
    }

    fn values(&self, x: &Tensor) -> Result<Vec<f32>> {
        let mut bytes = Vec::new();
        self.download(x, &mut bytes)?;
        Ok(match self.compute {
            Compute::Bf16 => {
                bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Compute::F32 => bytemuck::pod_collect_to_vec(&bytes),
        })
    }

    fn weight_amax(&self, weight: &Tensor) -> Result<f32> {
        let failed = |e| self.failed("read a maximum", e);
        let mut rounding = self.rounding.lock().expect("no holder of this lock panics");
        self.finishing.memset_zeros(&mut rounding.slot).map_err(failed)?;
        let n = (weight.rows * weight.cols) as u64;
        let (from, at) = (weight.pointer_for_finishing(self), rounding.slot.device_ptr(&self.finishing).0);
        launch!(on finishing: self, &self.kernels.amax, self.walk(n), from, n, at)?;
        let bits = self.read_back(&rounding.slot, &self.finishing).map_err(failed)?;
        Ok(f32::from_bits(bits[0]))
    }

    fn quantize(
        &self,
        weight: &Tensor,
        global: GlobalScale,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<()> {
        let blocks = weight.rows * weight.cols / BLOCK;
        let room = (codes.len(), scales.len()) == (blocks * BLOCK / 2, blocks);
        fit(
            "quantize",
            weight.cols.is_multiple_of(BLOCK) && room,
            &(weight.shape(), codes.len(), scales.len()),
        )?;
        let mut rounding = self.rounding.lock().expect("no holder of this lock panics");
        if rounding.bytes.len() < codes.len() + scales.len() {
            // SAFETY: the kernel below writes every byte before the copies, on the same stream, read them.
            rounding.bytes = unsafe { self.finishing.alloc(codes.len() + scales.len()) }
                .map_err(|e| self.failed("allocate codes", e))?;
        }
        let (codes_there, scales_there) = rounding.bytes.split_at(codes.len());
        let to = (codes_there.device_ptr(&self.finishing).0, scales_there.device_ptr(&self.finishing).0);
        let (from, config, global) =
            (weight.pointer_for_finishing(self), threads_for(blocks), global.multiplier());
        launch!(on finishing: self, &self.kernels.quantize, config, from, blocks as u64, global, to.0, to.1)?;
        self.read_finished(&codes_there, codes)?;
        self.read_finished(&scales_there.slice(..scales.len()), scales)
    }
}
