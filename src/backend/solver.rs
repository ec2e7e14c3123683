//! What choosing codes asks of a device beyond a forward pass: f32 matrices, rounding to NVFP4, Hessians.

use super::Backend;
use crate::error::Result;
use crate::nvfp4::{GlobalScale, QuantizedLinear};

/// Sums over the columns of a matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Columns {
    /// `max |w|`.
    pub amax: Vec<f32>,
    /// `Σ w²`.
    pub squares: Vec<f64>,
}

/// `error / norm` of two sums of squares, as a number that can be compared and stored: nothing where there is no error,
/// and the largest number where the quotient is infinite or not a number.
pub fn relative(error: f64, norm: f64) -> f64 {
    let ratio = if error == 0.0 { 0.0 } else { error / norm };
    if ratio.is_finite() { ratio } else { f64::MAX }
}

/// What was gathered of a site's inputs besides sums by channel.
pub struct Gathered<M> {
    /// `Σ xᵀ·x`, where it was asked for.
    pub products: Option<M>,
    /// Rows that were kept whole, by role.
    pub rows: [M; 2],
}

/// Operations on f32 matrices, for the methods that choose codes. They run beside the forward pass and one after another.
///
/// The order of every sum is fixed, so a device gives the same bits every time. Rounding is that of
/// [`crate::nvfp4`], bit for bit, on every device.
pub trait Solver: Backend {
    /// A row-major f32 matrix.
    type Matrix: Send;
    /// Codes and block scales of a matrix.
    type Codes;
    /// The factor of a damped Hessian.
    type Factor;

    /// What finished sums hold besides those by channel.
    fn gathered(&self, sums: Self::Sums) -> Result<Gathered<Self::Matrix>>;
    /// A weight in f32.
    fn widen(&self, weight: &Self::Tensor) -> Result<Self::Matrix>;
    /// Rows of `cols` elements.
    fn matrix(&self, values: Vec<f32>, cols: usize) -> Result<Self::Matrix>;
    /// Reads a matrix.
    fn read(&self, x: &Self::Matrix) -> Result<Vec<f32>>;
    /// The diagonal of a square matrix.
    fn diagonal(&self, x: &Self::Matrix) -> Result<Vec<f32>>;
    /// Sums by column.
    fn columns(&self, x: &Self::Matrix) -> Result<Columns>;
    /// `max |x|`; NaN where an element is.
    fn largest(&self, x: &Self::Matrix) -> Result<f32>;
    /// `x_ij *= rows_i · columns_j`, in place; a missing factor is 1.
    fn scale(&self, x: &mut Self::Matrix, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()>;
    /// `x_ij / by_j`.
    fn divided(&self, x: &Self::Matrix, by: &[f32]) -> Result<Self::Matrix>;
    /// Inputs as an engine sees them: `x_ij · factors_j`, quantized where it quantizes inputs.
    fn served(&self, x: &Self::Matrix, factors: &[f32], input: Option<GlobalScale>) -> Result<Self::Matrix>;
    /// `x · wᵀ`: x `[t, n]`, w `[rows, n]`.
    fn outputs(&self, x: &Self::Matrix, w: &Self::Matrix) -> Result<Self::Matrix>;
    /// `‖a − b‖² / ‖b‖²`, by [`relative`].
    fn relative_error(&self, a: &Self::Matrix, b: &Self::Matrix) -> Result<f64>;

    /// Codes with max block scales.
    fn round_max(&self, w: &Self::Matrix, global: GlobalScale) -> Result<Self::Codes>;
    /// Codes with searched block scales, columns weighted by `importance`.
    fn round_searched(
        &self,
        w: &Self::Matrix,
        importance: &[f32],
        global: GlobalScale,
    ) -> Result<Self::Codes>;
    /// The factor of `h + lambda · I`, rows and columns in `order`, which keeps blocks of sixteen whole; none
    /// where a pivot is not positive.
    fn factor(&self, h: &Self::Matrix, order: &[u32], lambda: f32) -> Result<Option<Self::Factor>>;
    /// Codes by GPTQ: errors of a column are made good by those that follow, from the end of the factor's order
    /// to its beginning ([`crate::backend::cpu`] has the formula).
    fn round_gptq(&self, w: &Self::Matrix, factor: &Self::Factor, global: GlobalScale)
    -> Result<Self::Codes>;
    /// The weights that codes stand for, in rows of `cols`.
    fn dequantize(&self, codes: &Self::Codes, cols: usize, global: GlobalScale) -> Result<Self::Matrix>;
    /// Reads codes.
    fn read_codes(&self, codes: Self::Codes) -> Result<QuantizedLinear>;
}
