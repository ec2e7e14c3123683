//! Where arithmetic happens: tensors and the operations that a forward pass needs.
//!
//! A model family is written once, over [`Backend`]; a backend knows shapes and
//! dtypes, never layers or families. Every operation writes into an output that
//! the caller allocated, so that a layer loop allocates nothing.
//!
//! Matrices are row-major. `rows` of an activation are tokens, of a weight are
//! output features. Activations have the backend's compute dtype ([`Compute`]);
//! sums are taken in f32.

pub mod cpu;
pub mod cuda;
mod device;
mod operations;
mod solver;

pub use device::{Device, DeviceChoice, OnBackend};
pub use operations::{Activation, AttentionShape, Gamma, NormKind, Rotation};
pub use solver::{Columns, Gathered, Solver, relative};

use std::fmt;

use safetensors::Dtype;

use crate::checkpoint::SourceTensor;
use crate::error::Result;
use crate::units::write_name;

/// The dtype of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// BF16 activations, rounded where the reference implementation rounds. Calibration of BF16 checkpoints.
    Bf16,
    /// F32 activations. Calibration of F32 and F16 checkpoints, whose weights are exact in f32, and evaluation.
    F32,
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_name(self, f)
    }
}

impl Compute {
    /// Bytes of an activation's element.
    pub fn bytes(self) -> usize {
        match self {
            Compute::Bf16 => 2,
            Compute::F32 => 4,
        }
    }

    /// An activation's element, as files name it.
    pub fn dtype(self) -> Dtype {
        match self {
            Compute::Bf16 => Dtype::BF16,
            Compute::F32 => Dtype::F32,
        }
    }
}

/// How attention heads are laid out in a token's row: `heads * dim` queries, `kv_heads * dim` keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of one head.
    pub dim: usize,
}

/// What a backend summed up over each channel of a site's inputs `[t, n]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Channels {
    /// `max |x|` of each channel; NaN where any was NaN.
    pub amax: Vec<f32>,
    /// `Σ x²` of each channel.
    pub squares: Vec<f32>,
}

/// Tensors and operations on one device.
pub trait Backend: Send + Sync {
    /// A row-major matrix (or vector: one row) where this backend computes. Weights are shared between the forward
    /// pass and the thread that quantizes.
    type Tensor: Send + Sync;
    /// A list of `u32` where this backend computes: token ids, table rows, document bounds.
    type Index: Send;
    /// Running absolute maxima, one f32 slot each.
    type Amax: Send;
    /// Running sums over the inputs of one site.
    type Sums: Send;
    /// A moment between operations of the forward pass.
    type Moment: Send;

    /// The dtype of activations.
    fn compute(&self) -> Compute;
    /// When what was asked for so far is done and what comes next begins: on a GPU this is still to come.
    fn moment(&self) -> Result<Self::Moment>;
    /// Seconds between two moments. Waits for both.
    fn seconds(&self, earlier: &Self::Moment, later: &Self::Moment) -> Result<f64>;

    /// Makes a stored BF16, F16 or F32 tensor usable as a weight, without a copy where that is possible.
    /// One-dimensional tensors become one row.
    fn load(&self, source: &SourceTensor) -> Result<Self::Tensor>;
    /// An activation matrix with undefined contents.
    fn activation(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;
    /// Sets the logical row count of an activation; at most the rows it was allocated with.
    fn set_rows(&self, x: &mut Self::Tensor, rows: usize);
    /// Copies an activation in: `bytes` holds `rows * cols` values of the compute dtype, little endian.
    fn upload(&self, bytes: &[u8], x: &mut Self::Tensor) -> Result<()>;
    /// An activation of `cols` columns with these contents, copied in beside the forward pass. Any thread.
    fn arrived(&self, bytes: &[u8], cols: usize) -> Result<Self::Tensor>;
    /// `to = from`, of the same shape.
    fn copy(&self, from: &Self::Tensor, to: &mut Self::Tensor) -> Result<()>;
    /// Copies an activation out, appending nothing: `bytes` is resized to `rows * cols` values.
    fn download(&self, x: &Self::Tensor, bytes: &mut Vec<u8>) -> Result<()> {
        self.download_as_of(&self.moment()?, x, bytes)
    }
    /// The same for one that is not changed after `moment`, beside what the forward pass was asked for since. Any
    /// thread.
    fn download_as_of(&self, moment: &Self::Moment, x: &Self::Tensor, bytes: &mut Vec<u8>) -> Result<()>;
    /// Copies a list of `u32` in.
    fn index(&self, values: &[u32]) -> Result<Self::Index>;
    /// A matrix of f32 constants, stored in the compute dtype.
    fn constant(&self, values: &[f32], cols: usize) -> Result<Self::Tensor>;
    /// A matrix of f32 constants that stay f32 whatever the compute dtype: tables for [`Backend::rope`], and for nothing
    /// else.
    fn exact_constant(&self, values: &[f32], cols: usize) -> Result<Self::Tensor>;

    /// `out[t] = table[ids[t]]`.
    fn embed(&self, table: &Self::Tensor, ids: &Self::Index, out: &mut Self::Tensor) -> Result<()>;
    /// Normalizes each row of `x`, as [`NormKind`] says. `weight` and `bias` are `[1, cols]`; without a weight, gamma is
    /// one. `out` has the shape of `x`.
    fn norm(
        &self,
        x: &Self::Tensor,
        kind: &NormKind,
        weight: Option<&Self::Tensor>,
        bias: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Normalizes each head of `dim` features of each row, in place. `weight` has `dim` values that all heads share, or
    /// as many as a row, where each head has its own; without a weight, gamma is one.
    fn norm_heads(
        &self,
        x: &mut Self::Tensor,
        dim: usize,
        kind: &NormKind,
        weight: Option<&Self::Tensor>,
    ) -> Result<()>;
    /// `out = x · weightᵀ + bias`; x `[t, k]`, weight `[n, k]`, bias `[n]`, out `[t, n]`.
    fn linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        bias: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Rotary embedding in place, as [`Rotation`] says: the pairs of each head of row `t` are turned by row `rows[t]` of
    /// `cos` and `sin`, both `[positions, pairs]`, both constants or both exact constants. A pair `(a, b)` becomes
    /// `(a cos - b sin, b cos + a sin)`.
    fn rope(
        &self,
        x: &mut Self::Tensor,
        rotation: &Rotation,
        cos: &Self::Tensor,
        sin: &Self::Tensor,
        rows: &Self::Index,
    ) -> Result<()>;
    /// Causal attention inside each document, as [`AttentionShape`] says. `bounds` holds document starts and the end of
    /// the last. `sinks` `[1, heads]` are logits, not multiplied by the scale, that take part in the sum of each softmax
    /// of their head and have no value.
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        bounds: &Self::Index,
        shape: &AttentionShape,
        sinks: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `gate = round(activation(gate)) * up`, in place.
    fn activate_mul(&self, gate: &mut Self::Tensor, up: &Self::Tensor, activation: Activation) -> Result<()>;
    /// `x = activation(x)`, in place.
    fn activate(&self, x: &mut Self::Tensor, activation: Activation) -> Result<()>;
    /// `x = x * round(sigmoid(gate))`, in place.
    fn gate_by_sigmoid(&self, x: &mut Self::Tensor, gate: &Self::Tensor) -> Result<()>;
    /// `x = x * factor`, in place; the factor stays f32.
    fn multiply(&self, x: &mut Self::Tensor, factor: f32) -> Result<()>;
    /// Row `t` of `x` times `factors[rows[t]]`, in place; `factors` is `[positions, 1]`.
    fn multiply_rows(&self, x: &mut Self::Tensor, factors: &Self::Tensor, rows: &Self::Index) -> Result<()>;
    /// `x = round(round(tanh(round(x / cap))) * cap)`, in place: bounds logits.
    fn softcap(&self, x: &mut Self::Tensor, cap: f32) -> Result<()>;
    /// `to[t] = from[t][first .. first + to.cols]`: one member of a fused linear's output.
    fn copy_columns(&self, from: &Self::Tensor, first: usize, to: &mut Self::Tensor) -> Result<()>;
    /// Quantizes and dequantizes an input in place, as [`crate::nvfp4::activation`] says.
    fn quantize_input(&self, x: &mut Self::Tensor, input: crate::nvfp4::GlobalScale) -> Result<()>;
    /// `x += y`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// `slots` maxima, all zero.
    fn amax(&self, slots: usize) -> Result<Self::Amax>;
    /// `amax[slot] = max(amax[slot], max |x|)`; a NaN in `x` makes the slot NaN for good.
    fn observe(&self, x: &Self::Tensor, amax: &mut Self::Amax, slot: usize) -> Result<()>;
    /// Reads all maxima.
    fn read_amax(&self, amax: &Self::Amax) -> Result<Vec<f32>>;

    /// Empty sums for inputs of `cols` features, with products where `products`, and room for so many rows of two roles
    /// that are kept whole.
    fn sums(&self, cols: usize, products: bool, sampled: [usize; 2]) -> Result<Self::Sums>;
    /// Keeps `rows` of `x` whole, behind those of the same role that were kept before.
    fn add_rows(
        &self,
        x: &Self::Tensor,
        rows: &Self::Index,
        role: usize,
        sums: &mut Self::Sums,
    ) -> Result<()>;
    /// Adds `x` to the sums by channel.
    fn add_channels(&self, x: &Self::Tensor, sums: &mut Self::Sums) -> Result<()>;
    /// Adds `xᵀ · x` to the products, in f32. The order of the additions is that of the calls and, inside a
    /// call, depends on its number of rows alone.
    fn add_products(&self, x: &Self::Tensor, sums: &mut Self::Sums) -> Result<()>;
    /// Reads the sums by channel.
    fn read_channels(&self, sums: &Self::Sums) -> Result<Channels>;
    /// Reads a matrix as f32.
    fn values(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// `max |w|` of a weight; NaN or infinite if any element is.
    fn weight_amax(&self, weight: &Self::Tensor) -> Result<f32>;
    /// Quantizes a weight `[n, k]` to NVFP4 with max block scales: `codes` takes `n * k / 2` bytes and
    /// `scales` `n * k / 16`, as in [`crate::nvfp4::quantize`].
    fn quantize(
        &self,
        weight: &Self::Tensor,
        global: crate::nvfp4::GlobalScale,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<()>;
}
