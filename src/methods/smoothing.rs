//! Folded smoothing: channels of an input are scaled, and the weights that read them by the inverse, so that
//! both are easier to quantize. The factors are folded into what produces the input (a norm's weights, rows of v
//! or up), so the model computes the same function and no loader has to know.
//!
//! Candidates come from the second moments of inputs and weights (arXiv 2306.00978 and 2211.10438 use first
//! moments and maxima); the one with the smallest error of the outputs, as they will be served, is kept.

use rayon::prelude::*;

use super::QuantizedLinear;
use super::dense::product;
use crate::nvfp4::activation::quantize_dequantize;
use crate::nvfp4::{GlobalScale, amax};

/// Exponents of `(weights / inputs)` that are tried.
const EXPONENTS: [f32; 5] = [0.2, 0.35, 0.5, 0.65, 0.8];

/// Factors stay in `[1 / LIMIT, LIMIT]` around their geometric mean of 1.
const LIMIT: f32 = 64.0;

/// A fold must lower the error by this share; less is noise of the sample.
const MARGIN: f64 = 0.99;

/// What was chosen for a site.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Smoothing {
    /// The candidate: `none`, `rms^A` or `max^0.5`.
    pub candidate: String,
    /// The sampled outputs' error with the fold over the error without.
    pub gain: f64,
    /// The factor of each channel.
    #[serde(skip)]
    pub factors: Vec<f32>,
}

/// A site whose factors are to be chosen.
pub struct Choice<'a> {
    /// The weights that read the input, each `[rows, n]`.
    pub members: &'a [Vec<f32>],
    /// `max |x|` of each channel.
    pub amax: &'a [f32],
    /// `Σ x²` of each channel.
    pub squares: &'a [f32],
    /// Sampled inputs `[k, n]`.
    pub sample: &'a [f32],
    /// Channels that share a factor although they are read apart: `(repeats, width)` for heads that
    /// `repeats` query heads in turn share.
    pub tie: Option<(usize, usize)>,
    /// Whether inputs are quantized when served.
    pub quantized_inputs: bool,
}

impl Choice<'_> {
    /// The best factors. `realize` turns wished factors into those that the producer can hold.
    pub fn best(&self, realize: impl Fn(Vec<f32>) -> Vec<f32>) -> Smoothing {
        let n = self.amax.len();
        let outputs: Vec<Vec<f32>> = self.members.iter().map(|w| product(self.sample, w, n)).collect();
        let none = vec![1.0; n];
        let base = self.error(&none, &outputs);
        let mut best = Smoothing { candidate: "none".into(), gain: 1.0, factors: none };
        for (candidate, wished) in self.candidates() {
            let factors = realize(wished);
            let gain = self.error(&factors, &outputs) / base;
            // Written so that NaN loses.
            if gain < best.gain && gain <= MARGIN {
                best = Smoothing { candidate, gain, factors };
            }
        }
        best
    }

    fn candidates(&self) -> Vec<(String, Vec<f32>)> {
        let inputs = self.input_rms();
        let weights = weight_rms(self.members, inputs.len());
        let power =
            |a: f32| -> Vec<f32> { weights.iter().zip(&inputs).map(|(w, x)| (w / x).powf(a)).collect() };
        let mut candidates: Vec<(String, Vec<f32>)> =
            EXPONENTS.iter().map(|&a| (format!("rms^{a}"), self.tidy(power(a)))).collect();
        let largest = column_amax(self.members, inputs.len());
        let quietest = smallest_positive(self.amax);
        let by_max = largest.iter().zip(self.amax).map(|(w, x)| (w / x.max(quietest)).sqrt()).collect();
        candidates.push(("max^0.5".into(), self.tidy(by_max)));
        candidates
    }

    /// `sqrt(Σ x²)`; a channel that was never used counts as the quietest one that was.
    fn input_rms(&self) -> Vec<f32> {
        let quietest = smallest_positive(self.squares);
        self.squares.iter().map(|&x| x.max(quietest).sqrt()).collect()
    }

    /// Ties, then a geometric mean of 1, then the limits.
    fn tidy(&self, mut factors: Vec<f32>) -> Vec<f32> {
        factors.iter_mut().for_each(|f| *f = if *f > 0.0 && f.is_finite() { f.ln() } else { 0.0 });
        if let Some((repeats, width)) = self.tie {
            for heads in factors.chunks_exact_mut(repeats * width) {
                for i in 0..width {
                    let mean = (0..repeats).map(|r| heads[r * width + i]).sum::<f32>() / repeats as f32;
                    (0..repeats).for_each(|r| heads[r * width + i] = mean);
                }
            }
        }
        let mean = factors.iter().sum::<f32>() / factors.len() as f32;
        factors.iter().map(|f| (f - mean).exp().clamp(1.0 / LIMIT, LIMIT)).collect()
    }

    /// The relative squared error of the outputs under max scales, summed over members.
    fn error(&self, factors: &[f32], outputs: &[Vec<f32>]) -> f64 {
        let n = factors.len();
        let scaled: Vec<f32> = self.amax.iter().zip(factors).map(|(x, f)| x * f).collect();
        let inputs = served_inputs(self.sample, factors, self.quantized_inputs.then(|| amax(&scaled)));
        let folded: Vec<Vec<f32>> = self.members.iter().map(|w| divide_columns(w, factors)).collect();
        let global = GlobalScale::from_amax(folded.iter().map(|w| amax(w)).fold(0.0, f32::max));
        let errors = folded.iter().zip(outputs).map(|(w, y)| {
            relative_error(&product(&inputs, &QuantizedLinear::max(w, n, global).values(n, global), n), y)
        });
        errors.sum()
    }
}

/// Inputs as an engine sees them: scaled, and quantized under a static scale where it quantizes inputs.
pub fn served_inputs(x: &[f32], factors: &[f32], input_amax: Option<f32>) -> Vec<f32> {
    let n = factors.len();
    let mut inputs = x.to_vec();
    inputs.par_chunks_mut(n).for_each(|row| {
        row.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
        if let Some(amax) = input_amax {
            quantize_dequantize(row, GlobalScale::from_amax(amax));
        }
    });
    inputs
}

/// `‖a − b‖² / ‖b‖²`.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    // Chunks in parallel, sums in order.
    let parts: Vec<(f64, f64)> = a
        .par_chunks(1 << 14)
        .zip(b.par_chunks(1 << 14))
        .map(|(a, b)| {
            let squares = a.iter().zip(b).map(|(a, b)| (((a - b) as f64).powi(2), (*b as f64).powi(2)));
            squares.fold((0.0, 0.0), |sum, term| (sum.0 + term.0, sum.1 + term.1))
        })
        .collect();
    let (error, norm) = parts.into_iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    error / norm
}

/// `w · diag(1 / factors)`.
pub fn divide_columns(w: &[f32], factors: &[f32]) -> Vec<f32> {
    let mut w = w.to_vec();
    w.par_chunks_mut(factors.len()).for_each(|row| row.iter_mut().zip(factors).for_each(|(w, f)| *w /= f));
    w
}

/// The root mean square of each column, relative to its matrix, averaged over matrices.
fn weight_rms(members: &[Vec<f32>], n: usize) -> Vec<f32> {
    let mut sum = vec![0f64; n];
    for w in members {
        let mut columns = vec![0f64; n];
        for row in w.chunks_exact(n) {
            columns.iter_mut().zip(row).for_each(|(sum, &w)| *sum += w as f64 * w as f64);
        }
        let total: f64 = columns.iter().sum();
        sum.iter_mut().zip(&columns).for_each(|(sum, column)| *sum += column / total);
    }
    sum.iter().map(|&sum| sum.sqrt() as f32).collect()
}

fn column_amax(members: &[Vec<f32>], n: usize) -> Vec<f32> {
    let mut largest = vec![0f32; n];
    for row in members.iter().flat_map(|w| w.chunks_exact(n)) {
        largest.iter_mut().zip(row).for_each(|(max, w)| *max = max.max(w.abs()));
    }
    largest
}

fn smallest_positive(values: &[f32]) -> f32 {
    values.iter().copied().filter(|&x| x > 0.0).fold(f32::MAX, f32::min)
}

#[cfg(test)]
mod tests {
    use super::super::dense::tests::noise;
    use super::*;

    fn outliers(rows: usize, n: usize) -> Vec<f32> {
        let mut x = noise(rows * n, 1);
        x.chunks_exact_mut(n).for_each(|row| (row[5] *= 30.0, row[n - 2] *= 12.0).0);
        x
    }

    fn moments(x: &[f32], n: usize) -> (Vec<f32>, Vec<f32>) {
        let column = |i: usize| x.iter().skip(i).step_by(n);
        let amax = (0..n).map(|i| column(i).fold(0f32, |max, x| max.max(x.abs()))).collect();
        (amax, (0..n).map(|i| column(i).map(|x| x * x).sum()).collect())
    }

    /// A site without ties whose inputs are quantized.
    fn choice<'a>(
        members: &'a [Vec<f32>],
        (amax, squares): &'a (Vec<f32>, Vec<f32>),
        sample: &'a [f32],
    ) -> Choice<'a> {
        Choice { members, amax, squares, sample, tie: None, quantized_inputs: true }
    }

    #[test]
    fn outlier_channels_are_smoothed_and_the_error_falls() {
        let n = 64;
        let x = outliers(100, n);
        let moments = moments(&x, n);
        let members = [noise(48 * n, 2), noise(32 * n, 3)];
        let choice = choice(&members, &moments, &x);
        let best = choice.best(|f| f);
        assert!(best.gain < 0.8, "{best:?}");
        assert!(best.factors[5] < 0.5 && best.factors[5] < best.factors[n - 2], "{:?}", best.factors);
    }

    #[test]
    fn tied_channels_share_a_factor() {
        let n = 64;
        let x = outliers(100, n);
        let moments = moments(&x, n);
        let members = [noise(48 * n, 2)];
        let choice = Choice { tie: Some((2, 16)), ..choice(&members, &moments, &x) };
        for (_, factors) in choice.candidates() {
            for i in 0..16 {
                assert_eq!(factors[i], factors[16 + i]);
                assert_eq!(factors[32 + i], factors[48 + i]);
            }
        }
    }

    #[test]
    fn dead_and_constant_channels_give_finite_factors() {
        let n = 32;
        let mut x = noise(50 * n, 4);
        x.chunks_exact_mut(n).for_each(|row| (row[0] = 0.0, row[7] = 1.0).0);
        let moments = moments(&x, n);
        let mut w = noise(16 * n, 5);
        w.chunks_exact_mut(n).for_each(|row| row[9] = 0.0);
        let members = [w];
        let choice = choice(&members, &moments, &x);
        for (name, factors) in choice.candidates() {
            assert!(factors.iter().all(|f| (1.0 / LIMIT..=LIMIT).contains(f)), "{name}: {factors:?}");
        }
    }

    #[test]
    fn without_a_gain_nothing_is_folded() {
        let n = 32;
        let (members, moments) = ([vec![1.0; 16 * n]], (vec![1.0; n], vec![1.0; n]));
        let best = choice(&members, &moments, &vec![1.0; 8 * n]).best(|f| f);
        assert_eq!((best.candidate.as_str(), best.factors), ("none", vec![1.0; n]));
    }
}
