//! What calibration saw at one site of a layer.

/// The inputs of one site, summed up and sampled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SiteStatistics {
    /// `max |x|` of each channel, over all tokens.
    pub amax: Vec<f32>,
    /// `Σ x²` of each channel, over all tokens.
    pub squares: Vec<f32>,
    /// `Σ xᵀ·x` `[n, n]` over the tokens to fit, where a method needs it; empty otherwise.
    pub products: Vec<f32>,
    /// Rows to choose with `[k, n]`, from the tokens to fit.
    pub fit: Vec<f32>,
    /// Rows to judge with `[k, n]`, from documents that no choice has seen; empty where none are held out.
    pub held_out: Vec<f32>,
}

impl SiteStatistics {
    /// Input features.
    pub fn channels(&self) -> usize {
        self.amax.len()
    }

    /// Applies a fold: channel `i` will be multiplied by `factors[i]`. Every sum follows in closed form.
    pub fn fold(&mut self, factors: &[f32]) {
        let n = self.channels();
        for (i, &factor) in factors.iter().enumerate() {
            self.amax[i] *= factor;
            self.squares[i] *= factor * factor;
        }
        for (row, &factor) in self.products.chunks_exact_mut(n).zip(factors) {
            row.iter_mut().zip(factors).for_each(|(h, other)| *h *= factor * other);
        }
        for row in self.fit.chunks_exact_mut(n).chain(self.held_out.chunks_exact_mut(n)) {
            row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
        }
    }

    /// `max |x|` over all channels; NaN where any is NaN.
    pub fn input_amax(&self) -> f32 {
        crate::nvfp4::amax(&self.amax)
    }

    /// Rows to judge with: the held-out ones where there are any.
    pub fn judges(&self) -> &[f32] {
        if self.held_out.is_empty() { &self.fit } else { &self.held_out }
    }

    /// How much each channel's weights matter: the diagonal of the products, or the squares where there are none.
    pub fn importance(&self) -> Vec<f32> {
        let n = self.channels();
        if self.products.is_empty() {
            return self.squares.clone();
        }
        (0..n).map(|i| self.products[i * n + i]).collect()
    }
}
