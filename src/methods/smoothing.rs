//! Folded smoothing: channels of an input are scaled, and the weights that read them by the inverse, so that
//! both are easier to quantize. The factors are folded into what produces the input (a norm's weights, rows of v
//! or up), so the model computes the same function and no loader has to know.
//!
//! Candidates come from the second moments of inputs and weights (arXiv 2306.00978 and 2211.10438 use first
//! moments and maxima); the one with the smallest error of the outputs, as they will be served, is kept.

use crate::backend::Solver;
use crate::error::Result;
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

impl Smoothing {
    /// No fold of so many channels.
    pub fn none(channels: usize) -> Smoothing {
        Smoothing { candidate: "none".into(), gain: 1.0, factors: vec![1.0; channels] }
    }
}

/// A site whose factors are to be chosen.
pub struct Choice<'a, S: Solver> {
    /// Where arithmetic happens.
    pub solver: &'a S,
    /// The weights that read the input, each `[rows, n]`.
    pub members: &'a [S::Matrix],
    /// `max |x|` of each channel.
    pub amax: &'a [f32],
    /// `Σ x²` of each channel.
    pub squares: &'a [f32],
    /// Sampled inputs `[k, n]`.
    pub sample: &'a S::Matrix,
    /// Channels that share a factor although they are read apart: `(repeats, width)` for heads that
    /// `repeats` query heads in turn share.
    pub tie: Option<(usize, usize)>,
    /// Whether inputs are quantized when served.
    pub quantized_inputs: bool,
}

impl<S: Solver> Choice<'_, S> {
    /// The best factors. `realize` turns wished factors into those that the producer can hold.
    ///
    /// # Errors
    /// What the device returns.
    pub fn best(&self, realize: impl Fn(Vec<f32>) -> Vec<f32>) -> Result<Smoothing> {
        let outputs =
            self.members.iter().map(|w| self.solver.outputs(self.sample, w)).collect::<Result<Vec<_>>>()?;
        let mut best = Smoothing::none(self.amax.len());
        let base = self.error(&best.factors, &outputs)?;
        for (candidate, wished) in self.candidates()? {
            let factors = realize(wished);
            let gain = self.error(&factors, &outputs)? / base;
            // Written so that NaN loses.
            if gain < best.gain && gain <= MARGIN {
                best = Smoothing { candidate, gain, factors };
            }
        }
        Ok(best)
    }

    fn candidates(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let inputs: Vec<f32> = self.squares.iter().map(|x| x.sqrt()).collect();
        let (weights, largest) = self.weight_columns()?;
        let power =
            |a: f32| -> Vec<f32> { weights.iter().zip(&inputs).map(|(w, x)| (w / x).powf(a)).collect() };
        let mut candidates: Vec<(String, Vec<f32>)> =
            EXPONENTS.iter().map(|&a| (format!("rms^{a}"), self.tidy(power(a)))).collect();
        let by_max = largest.iter().zip(self.amax).map(|(w, x)| (w / x).sqrt()).collect();
        candidates.push(("max^0.5".into(), self.tidy(by_max)));
        Ok(candidates)
    }

    /// The root mean square of each column, relative to its matrix, averaged over members; and its maximum.
    fn weight_columns(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let n = self.amax.len();
        let (mut sum, mut largest) = (vec![0f64; n], vec![0f32; n]);
        for w in self.members {
            let columns = self.solver.columns(w)?;
            let total: f64 = columns.squares.iter().sum();
            sum.iter_mut().zip(&columns.squares).for_each(|(sum, column)| *sum += column / total);
            largest.iter_mut().zip(&columns.amax).for_each(|(max, amax)| *max = max.max(*amax));
        }
        Ok((sum.iter().map(|&sum| sum.sqrt() as f32).collect(), largest))
    }

    /// Ties, then a geometric mean of 1, then the limits. A channel that no input uses or no weight reads has no
    /// factor (it is 0 or infinite) and is left as it is.
    fn tidy(&self, factors: Vec<f32>) -> Vec<f32> {
        let log = |f: f32| (f > 0.0 && f.is_finite()).then(|| f.ln());
        let mut logs: Vec<Option<f32>> = factors.into_iter().map(log).collect();
        if let Some((repeats, width)) = self.tie {
            for heads in logs.chunks_exact_mut(repeats * width) {
                for i in 0..width {
                    let tied = mean((0..repeats).filter_map(|r| heads[r * width + i]));
                    (0..repeats).for_each(|r| heads[r * width + i] = tied);
                }
            }
        }
        let mean = mean(logs.iter().flatten().copied()).unwrap_or(0.0);
        let factor = |log: Option<f32>| log.map_or(1.0, |f| (f - mean).exp().clamp(1.0 / LIMIT, LIMIT));
        logs.into_iter().map(factor).collect()
    }

    /// The relative squared error of the outputs under max scales, summed over members.
    fn error(&self, factors: &[f32], outputs: &[S::Matrix]) -> Result<f64> {
        let (solver, n) = (self.solver, factors.len());
        let scaled: Vec<f32> = self.amax.iter().zip(factors).map(|(x, f)| x * f).collect();
        let input = self.quantized_inputs.then(|| GlobalScale::from_amax(amax(&scaled)));
        let inputs = solver.served(self.sample, factors, input)?;
        // One member's fold at a time: for a large layer two of them are as large as everything else.
        let mut largest = 0f32;
        for w in self.members {
            largest = largest.max(solver.largest(&solver.divided(w, factors)?)?);
        }
        let global = GlobalScale::from_amax(largest);
        let mut sum = 0.0;
        for (w, outputs) in self.members.iter().zip(outputs) {
            let codes = solver.round_max(&solver.divided(w, factors)?, global)?;
            let rounded = solver.dequantize(&codes, n, global)?;
            sum += solver.relative_error(&solver.outputs(&inputs, &rounded)?, outputs)?;
        }
        Ok(sum)
    }
}

/// The mean of numbers; none where there are none.
fn mean(values: impl Iterator<Item = f32>) -> Option<f32> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
    (count > 0).then(|| sum / count as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Compute;
    use crate::backend::cpu::{Cpu, Matrix, noise};

    fn cpu() -> Cpu {
        Cpu::new(Compute::F32, 2).unwrap()
    }

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
        solver: &'a Cpu,
        members: &'a [Matrix],
        (amax, squares): &'a (Vec<f32>, Vec<f32>),
        sample: &'a Matrix,
    ) -> Choice<'a, Cpu> {
        Choice { solver, members, amax, squares, sample, tie: None, quantized_inputs: true }
    }

    #[test]
    fn outlier_channels_are_smoothed_and_the_error_falls() {
        let n = 64;
        let x = outliers(100, n);
        let moments = moments(&x, n);
        let cpu = cpu();
        let members = [cpu.matrix(noise(48 * n, 2), n).unwrap(), cpu.matrix(noise(32 * n, 3), n).unwrap()];
        let x = cpu.matrix(x, n).unwrap();
        let choice = choice(&cpu, &members, &moments, &x);
        let best = choice.best(|f| f).unwrap();
        assert!(best.gain < 0.8, "{best:?}");
        assert!(best.factors[5] < 0.5 && best.factors[5] < best.factors[n - 2], "{:?}", best.factors);
    }

    #[test]
    fn tied_channels_share_a_factor() {
        let n = 64;
        let x = outliers(100, n);
        let moments = moments(&x, n);
        let cpu = cpu();
        let members = [cpu.matrix(noise(48 * n, 2), n).unwrap()];
        let x = cpu.matrix(x, n).unwrap();
        let choice = Choice { tie: Some((2, 16)), ..choice(&cpu, &members, &moments, &x) };
        for (_, factors) in choice.candidates().unwrap() {
            for i in 0..16 {
                assert_eq!(factors[i], factors[16 + i]);
                assert_eq!(factors[32 + i], factors[48 + i]);
            }
        }
    }

    #[test]
    fn channels_without_inputs_or_weights_are_left_as_they_are() {
        let n = 32;
        let mut x = noise(50 * n, 4);
        x.chunks_exact_mut(n).for_each(|row| (row[0] = 0.0, row[7] = 1.0).0);
        let moments = moments(&x, n);
        let mut w = noise(16 * n, 5);
        w.chunks_exact_mut(n).for_each(|row| row[9] = 0.0);
        let cpu = cpu();
        let members = [cpu.matrix(w, n).unwrap()];
        let x = cpu.matrix(x, n).unwrap();
        let choice = choice(&cpu, &members, &moments, &x);
        for (name, factors) in choice.candidates().unwrap() {
            assert!(factors.iter().all(|f| (1.0 / LIMIT..=LIMIT).contains(f)), "{name}: {factors:?}");
            assert_eq!((factors[0], factors[9]), (1.0, 1.0), "{name}");
            assert_ne!(factors[7], 1.0, "{name}");
        }
    }

    #[test]
    fn without_a_gain_nothing_is_folded() {
        let n = 32;
        let (cpu, moments) = (cpu(), (vec![1.0; n], vec![1.0; n]));
        let members = [cpu.matrix(vec![1.0; 16 * n], n).unwrap()];
        let x = cpu.matrix(vec![1.0; 8 * n], n).unwrap();
        let best = choice(&cpu, &members, &moments, &x).best(|f| f).unwrap();
        assert_eq!((best.candidate.as_str(), best.factors), ("none", vec![1.0; n]));
    }
}
