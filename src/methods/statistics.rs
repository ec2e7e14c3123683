//! What calibration saw at one site of a layer.

use crate::backend::Solver;
use crate::error::Result;

/// The inputs of one site, summed up and sampled; matrices are where the layer is solved.
pub struct SiteStatistics<M> {
    /// `max |x|` of each channel, over all tokens.
    pub amax: Vec<f32>,
    /// `Σ x²` of each channel, over all tokens.
    pub squares: Vec<f32>,
    /// `Σ xᵀ·x` `[n, n]` over the tokens to fit, where a method needs it.
    pub products: Option<M>,
    /// Rows to choose with `[k, n]`, from the tokens to fit.
    pub fit: M,
    /// Rows to judge with `[k, n]`, from documents that no choice has seen, where there are any.
    pub held_out: Option<M>,
}

impl<M> SiteStatistics<M> {
    /// Input features.
    pub fn channels(&self) -> usize {
        self.amax.len()
    }

    /// Applies a fold: channel `i` will be multiplied by `factors[i]`. Every sum follows in closed form.
    ///
    /// # Errors
    /// What the device returns.
    pub fn fold<S: Solver<Matrix = M>>(&mut self, solver: &S, factors: &[f32]) -> Result<()> {
        for (i, &factor) in factors.iter().enumerate() {
            self.amax[i] *= factor;
            self.squares[i] *= factor * factor;
        }
        if let Some(products) = &mut self.products {
            solver.scale(products, Some(factors), Some(factors))?;
        }
        for rows in [Some(&mut self.fit), self.held_out.as_mut()].into_iter().flatten() {
            solver.scale(rows, None, Some(factors))?;
        }
        Ok(())
    }

    /// `max |x|` over all channels; NaN where any is NaN.
    pub fn input_amax(&self) -> f32 {
        crate::nvfp4::amax(&self.amax)
    }

    /// Rows to judge with: the held-out ones where there are any.
    pub fn judges(&self) -> &M {
        self.held_out.as_ref().unwrap_or(&self.fit)
    }

    /// How much each channel's weights matter: the diagonal of the products, or the squares where there are none.
    ///
    /// # Errors
    /// What the device returns.
    pub fn importance<S: Solver<Matrix = M>>(&self, solver: &S) -> Result<Vec<f32>> {
        match &self.products {
            None => Ok(self.squares.clone()),
            Some(products) => solver.diagonal(products),
        }
    }
}
