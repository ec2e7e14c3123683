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

    /// `max |x|` over all channels, each multiplied by its factor; NaN where any is NaN.
    pub fn input_amax(&self, factors: &[f32]) -> f32 {
        let folded: Vec<f32> = self.amax.iter().zip(factors).map(|(x, factor)| x * factor).collect();
        crate::nvfp4::amax(&folded)
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
    /// Gives up the products, which are large. Their diagonal still says how much each channel's weights matter.
    ///
    /// # Errors
    /// What the device returns.
    pub fn take_products<S: Solver<Matrix = M>>(&mut self, solver: &S) -> Result<Option<M>> {
        self.squares = self.importance(solver)?;
        Ok(self.products.take())
    }
}
