//! What operations of a forward pass can be asked for, and which shapes fit each other: the same on every backend.

use super::Heads;
use crate::error::{Error, Result};

/// Rows and columns of a matrix.
pub(super) type Shape = (usize, usize);

/// What a norm multiplies the normalized values with, by its weight `w`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gamma {
    /// `w`, in f32.
    Weight,
    /// `1 + w`, added in f32.
    OnePlus,
    /// `1 + w`, rounded to the compute dtype.
    OnePlusRounded,
    /// Nothing: there is no weight.
    One,
}

/// A norm: `out = round(normalized * gamma + bias)`, in f32 up to the rounding.
///
/// `normalized` is `(x - mean) / sqrt(mean((x - mean)²) + eps)` where the norm centers, and `x / sqrt(mean(x²) + eps)`
/// where it does not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormKind {
    /// Whether the mean is taken off (LayerNorm) or not (RMSNorm).
    pub centers: bool,
    /// The factors.
    pub gamma: Gamma,
    /// Whether the normalized values are rounded to the compute dtype before they meet gamma.
    pub rounds_first: bool,
    /// What is added to the mean of the squares.
    pub eps: f32,
}

impl NormKind {
    /// Llama's norm: not centered, rounded before it meets its weight.
    pub fn llama(eps: f32) -> NormKind {
        NormKind { centers: false, gamma: Gamma::Weight, rounds_first: true, eps }
    }

    /// Refuses what does not fit: rows of `x` are whole pieces of `dim` features, and `weight` has one value for each
    /// feature of a piece or of a row, unless gamma is one. `bias` has the weight's shape.
    pub(super) fn fit(
        &self,
        x: Shape,
        dim: usize,
        weight: Option<Shape>,
        bias: Option<Shape>,
        out: Shape,
    ) -> Result<()> {
        let whole = dim > 0 && x.1.is_multiple_of(dim) && x == out;
        let weighted = match weight {
            None => self.gamma == Gamma::One && bias.is_none(),
            Some((rows, cols)) => {
                let values = rows * cols;
                self.gamma != Gamma::One
                    && (values == dim || values == x.1)
                    && bias.is_none_or(|bias| bias.0 * bias.1 == values)
            }
        };
        fit("norm", whole && weighted, &(x, dim, self.gamma, weight, bias, out))
    }
}

/// How rotary embedding turns pairs of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Features of a head. The first `d` of them are turned, where the table has `d / 2` columns; the rest stay.
    pub head_dim: usize,
    /// Whether features `2i` and `2i + 1` are a pair; otherwise features `i` and `i + d / 2` are.
    pub interleaved: bool,
    /// Whether a turned feature is rounded once, from f32 products; otherwise each product is rounded, and then their
    /// sum.
    pub rounds_once: bool,
}

impl Rotation {
    /// Llama's rotation: halves of heads of `head_dim` features, each product rounded.
    pub fn llama(head_dim: usize) -> Rotation {
        Rotation { head_dim, interleaved: false, rounds_once: false }
    }

    /// Refuses what does not fit.
    pub(super) fn fit(&self, x: Shape, cos: Shape, sin: Shape, rows: &[u32]) -> Result<()> {
        let inside = rows.iter().all(|&row| (row as usize) < cos.0);
        let whole = self.head_dim > 0 && x.1.is_multiple_of(self.head_dim);
        let tables = cos == sin && cos.1 > 0 && 2 * cos.1 <= self.head_dim && rows.len() == x.0;
        fit("rope", inside && whole && tables, &(x, self, cos, sin, rows.len()))
    }
}

/// What attention does with queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// How heads lie in a row.
    pub heads: Heads,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Where there is one, a token sees itself and the `window - 1` before it.
    pub window: Option<usize>,
    /// Where there is one, a score `s` (already multiplied by `scale`) becomes `softcap * tanh(s / softcap)`.
    pub softcap: Option<f32>,
}

impl AttentionShape {
    /// Refuses what does not fit.
    pub(super) fn fit(&self, [q, k, v, out]: [Shape; 4], bounds: &[u32], sinks: Option<Shape>) -> Result<()> {
        let heads = self.heads;
        let rising = bounds.first() == Some(&0) && bounds.is_sorted();
        let whole = heads.kv_heads > 0 && heads.heads.is_multiple_of(heads.kv_heads);
        let rows = bounds.last().map_or(0, |&end| end as usize);
        let (wide, narrow) = ((rows, heads.heads * heads.dim), (rows, heads.kv_heads * heads.dim));
        let sunk = sinks.is_none_or(|sinks| sinks == (1, heads.heads));
        let fits = rising && whole && sunk && [q, out, k, v] == [wide, wide, narrow, narrow];
        fit("attention", fits, &(q, k, v, out, heads, rows, sinks))
    }
}

/// What an MLP applies to each feature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / π) * (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x / 2 * (1 + erf(x / sqrt(2)))`.
    Gelu,
    /// `max(x, 0)²`.
    Relu2,
    /// xIELU (<https://arxiv.org/abs/2411.13010>) with β = 1/2: `alpha_p * x * x + x / 2` where `x > 0`, and
    /// `(expm1(min(x, -1e-6)) - x) * alpha_n + x / 2` elsewhere. Every product, sum and function in this is rounded to
    /// the compute dtype, in the order of writing.
    Xielu {
        /// softplus of the stored `alpha_p`, in the compute dtype.
        alpha_p: f32,
        /// `1/2` + softplus of the stored `alpha_n`, in the compute dtype.
        alpha_n: f32,
    },
}

/// Refuses shapes that don't fit each other, before anything is computed.
pub(super) fn fit(operation: &str, fits: bool, shapes: &dyn std::fmt::Debug) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::run(format!("{operation}: the shapes {shapes:?} do not fit each other"))
        .fix("use the config.json that belongs to the weights"))
}

/// Refuses factors `[positions, 1]` and rows of them that don't fit `x`.
pub(super) fn fit_factors(x: Shape, factors: Shape, rows: &[u32]) -> Result<()> {
    let inside = rows.iter().all(|&row| (row as usize) < factors.0);
    fit("multiply_rows", inside && factors.1 == 1 && rows.len() == x.0, &(x, factors, rows.len()))
}

/// Refuses columns that `from` does not have.
pub(super) fn fit_columns(from: Shape, first: usize, to: Shape) -> Result<()> {
    let inside = first.checked_add(to.1).is_some_and(|end| end <= from.1);
    fit("copy_columns", inside && from.0 == to.0, &(from, first, to))
}
