//! One decoder layer: choose the folds, fold, choose codes, judge them.

use super::headroom::headroom;
use super::smoothing::{Choice, Smoothing};
use super::{Codes, Method, SiteStatistics, hessian};
use crate::backend::Solver;
use crate::error::Result;
use crate::model::Site;
use crate::nvfp4::{GlobalScale, QuantizedLinear};

/// Damping where there are sixteen tokens for each channel, and where there are fewer.
const DAMPING: [f32; 2] = [0.05, 0.1];

/// Tokens for each channel below which a Hessian is not trusted at all.
const LEAST_TOKENS: usize = 1;

/// The members of a site's fused group, each `[rows, cols]` in f32, read when they are needed.
pub type Weights<'a, M> = &'a dyn Fn(Site) -> Result<Vec<M>>;

/// A layer, as far as methods need it.
pub struct Layer<'a, S: Solver> {
    /// Where arithmetic happens.
    pub solver: &'a S,
    /// Which sites are quantized.
    pub quantized: [bool; 4],
    /// The weights.
    pub weights: Weights<'a, S::Matrix>,
    /// The two norms: before attention and before the MLP.
    pub norms: [Vec<f32>; 2],
    /// Rounds to what the stored norms can hold.
    pub round_norm: &'a dyn Fn(f32) -> f32,
    /// Query heads that share a key and value head, and features of a head.
    pub heads: (usize, usize),
    /// Tokens behind the products.
    pub tokens: usize,
    /// Whether inputs are quantized when served.
    pub quantized_inputs: bool,
}

/// The folds of a layer, and what they make of its other tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Folds {
    smoothings: [Option<Smoothing>; 4],
    /// The norms' new weights, where a fold goes into them.
    pub norms: [Option<Vec<f32>>; 2],
    /// The factor of each row of v, and of its bias.
    pub v: Option<Vec<f32>>,
    /// The factor of each row of up, and of its bias.
    pub up: Option<Vec<f32>>,
}

/// What was chosen for one fused group.
pub struct QuantizedGroup {
    /// Where.
    pub site: Site,
    /// The members' common scale.
    pub global: GlobalScale,
    /// `max |x|` of the input after folding.
    pub input_amax: f32,
    /// How many times that the input's scale has room for.
    pub headroom: f32,
    /// Its fold.
    pub smoothing: Option<Smoothing>,
    /// The damping of its Hessian.
    pub damping: Option<f32>,
    /// Why codes were chosen otherwise than asked for.
    pub fallback: Option<String>,
    /// By member.
    pub members: Vec<QuantizedMember>,
}

/// What was chosen for one linear.
pub struct QuantizedMember {
    /// Codes and block scales.
    pub linear: QuantizedLinear,
    /// `max |w|` after folding.
    pub amax: f32,
    /// How it was judged.
    pub verdict: Verdict,
}

/// How good a linear's codes are.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Verdict {
    /// How its codes were chosen.
    pub codes: String,
    /// Relative error of the folded weights.
    pub weight_error: f64,
    /// Relative error of its outputs as served (held-out documents where there are any), without folds under
    /// max scales.
    pub output_error_max: f64,
    /// The same, as it was quantized.
    pub output_error: f64,
    /// The same, for codes that were given up: the weighted search where GPTQ won, and the other way round.
    pub output_error_other: Option<f64>,
}

impl<S: Solver> Layer<'_, S> {
    /// Chooses the folds of all sites. They come before any code is chosen because two of them change the rows
    /// of weights that an earlier site reads.
    ///
    /// # Errors
    /// What reading the weights returns.
    pub fn folds(&self, method: Method, statistics: &[SiteStatistics<S::Matrix>; 4]) -> Result<Folds> {
        let mut folds = Folds::default();
        for site in Site::ALL.into_iter().filter(|&site| method.smooth && self.can_fold(site)) {
            let smoothing = self.smooth(site, &statistics[site as usize])?;
            if smoothing.candidate != "none" {
                self.fold_producer(site, &smoothing.factors, &mut folds);
            }
            folds.smoothings[site as usize] = Some(smoothing);
        }
        Ok(folds)
    }

    /// Folds and quantizes group by group, and hands each to `done`.
    ///
    /// # Errors
    /// What `done` or reading the weights returns.
    pub fn quantize(
        &self,
        method: Method,
        folds: &Folds,
        statistics: &mut [SiteStatistics<S::Matrix>; 4],
        done: &mut dyn FnMut(QuantizedGroup) -> Result<()>,
    ) -> Result<()> {
        for site in Site::ALL.into_iter().filter(|&site| self.quantized[site as usize]) {
            done(self.group(site, method, folds, &mut statistics[site as usize])?)?;
        }
        Ok(())
    }

    /// Folds the members of a site's group, each `[rows, cols]`: columns are divided by the site's own factors, rows
    /// of v and up multiplied by those of the site that reads them.
    ///
    /// # Errors
    /// What the device returns.
    pub fn fold(&self, site: Site, folds: &Folds, members: &mut [S::Matrix]) -> Result<()> {
        if let Some(smoothing) = &folds.smoothings[site as usize] {
            for w in &mut *members {
                *w = self.solver.divided(w, &smoothing.factors)?;
            }
        }
        let rows = match site {
            Site::Qkv => Some((2, &folds.v)),
            Site::GateUp => Some((1, &folds.up)),
            Site::O | Site::Down => None,
        };
        if let Some((member, Some(factors))) = rows {
            self.solver.scale(&mut members[member], Some(factors), None)?;
        }
        Ok(())
    }

    /// A fold changes both its consumers and its producer, so both must be rewritten anyway: linears that keep
    /// their dtype are carried over byte for byte.
    fn can_fold(&self, site: Site) -> bool {
        let producer = match site {
            Site::Qkv | Site::GateUp => true,
            Site::O => self.quantized[Site::Qkv as usize],
            Site::Down => self.quantized[Site::GateUp as usize],
        };
        producer && self.quantized[site as usize]
    }

    fn smooth(&self, site: Site, statistics: &SiteStatistics<S::Matrix>) -> Result<Smoothing> {
        let members = (self.weights)(site)?;
        let choice = Choice {
            solver: self.solver,
            members: &members,
            amax: &statistics.amax,
            squares: &statistics.squares,
            sample: &statistics.fit,
            tie: (site == Site::O).then_some(self.heads),
            quantized_inputs: self.quantized_inputs,
        };
        choice.best(|wished| match norm_of(site) {
            Some(norm) => self.realized(norm, &wished),
            None => wished,
        })
    }

    /// The factors that a norm can hold: its stored weights are rounded, so the columns are divided by what
    /// really happened to them.
    fn realized(&self, norm: usize, wished: &[f32]) -> Vec<f32> {
        let pairs = self.norms[norm].iter().zip(wished);
        pairs
            .map(|(&weight, factor)| {
                let realized = (self.round_norm)(weight * factor) / weight;
                if realized.is_normal() { realized } else { 1.0 }
            })
            .collect()
    }

    fn fold_producer(&self, site: Site, factors: &[f32], folds: &mut Folds) {
        let (repeats, width) = self.heads;
        match site {
            Site::Qkv | Site::GateUp => {
                let norm = norm_of(site).expect("both sites follow a norm");
                let weights = self.norms[norm].iter().zip(factors);
                folds.norms[norm] = Some(weights.map(|(w, f)| (self.round_norm)(w * f)).collect());
            }
            Site::O => {
                let heads = factors.chunks_exact(repeats * width);
                folds.v = Some(heads.flat_map(|head| &head[..width]).copied().collect());
            }
            Site::Down => folds.up = Some(factors.to_vec()),
        }
    }

    fn group(
        &self,
        site: Site,
        method: Method,
        folds: &Folds,
        statistics: &mut SiteStatistics<S::Matrix>,
    ) -> Result<QuantizedGroup> {
        let (solver, n) = (self.solver, statistics.channels());
        let mut members = (self.weights)(site)?;
        let plain = self.plain_errors(&members, statistics)?;
        let smoothing = folds.smoothings[site as usize].clone();
        if let Some(smoothing) = &smoothing {
            statistics.fold(solver, &smoothing.factors)?;
        }
        self.fold(site, folds, &mut members)?;
        let global = group_scale(solver, &members)?;
        let input_amax = statistics.input_amax();
        let headroom = match method.headroom && self.quantized_inputs {
            true => headroom(&solver.read(&statistics.fit)?, input_amax),
            false => 1.0,
        };
        let importance = match method.codes {
            Codes::Sweep => vec![1.0; n],
            _ => statistics.importance(solver)?,
        };
        let (factor, fallback) = self.factor(statistics, &importance)?;
        let factor = factor.as_ref();

        let sample = statistics.judges();
        let served = self.served(statistics, headroom)?;
        let mut quantized = Vec::new();
        for (w, output_error_max) in members.iter().zip(plain) {
            let outputs = solver.outputs(sample, w)?;
            let judged = |codes: Codes| -> Result<Judged<S>> {
                let q = match (codes, factor) {
                    (Codes::Max, _) => solver.round_max(w, global)?,
                    (Codes::Gptq, Some((factor, _))) => solver.round_gptq(w, factor, global)?,
                    _ => solver.round_searched(w, &importance, global)?,
                };
                let values = solver.dequantize(&q, n, global)?;
                let error = solver.relative_error(&solver.outputs(&served, &values)?, &outputs)?;
                let weight_error = solver.relative_error(&values, w)?.sqrt();
                Ok(Judged { codes, q, error, weight_error })
            };
            let codes = match (method.codes, factor) {
                (Codes::Gptq, None) => Codes::Wsweep,
                (codes, _) => codes,
            };
            let ours = judged(codes)?;
            let theirs = match codes == Codes::Gptq && method.guard {
                true => Some(judged(Codes::Wsweep)?),
                false => None,
            };
            let (kept, other) = match theirs {
                Some(theirs) if ours.error > theirs.error => (theirs, Some(ours.error)),
                theirs => (ours, theirs.map(|theirs| theirs.error)),
            };
            let verdict = Verdict {
                codes: kept.codes.name().to_string(),
                weight_error: kept.weight_error,
                output_error_max,
                output_error: kept.error.sqrt(),
                output_error_other: other.map(f64::sqrt),
            };
            let linear = solver.read_codes(kept.q)?;
            quantized.push(QuantizedMember { linear, amax: solver.largest(w)?, verdict });
        }
        let damping = factor.map(|(_, damping)| *damping);
        Ok(QuantizedGroup {
            site,
            global,
            input_amax,
            headroom,
            smoothing,
            damping,
            fallback,
            members: quantized,
        })
    }

    /// Each member's output error without folds under max scales.
    fn plain_errors(
        &self,
        members: &[S::Matrix],
        statistics: &SiteStatistics<S::Matrix>,
    ) -> Result<Vec<f64>> {
        let (solver, n, sample) = (self.solver, statistics.channels(), statistics.judges());
        let served = self.served(statistics, 1.0)?;
        let global = group_scale(solver, members)?;
        let error = |w: &S::Matrix| {
            let rounded = solver.dequantize(&solver.round_max(w, global)?, n, global)?;
            let error =
                solver.relative_error(&solver.outputs(&served, &rounded)?, &solver.outputs(sample, w)?);
            error.map(f64::sqrt)
        };
        members.iter().map(error).collect()
    }

    /// The rows to judge with, as an engine sees them.
    fn served(&self, statistics: &SiteStatistics<S::Matrix>, headroom: f32) -> Result<S::Matrix> {
        let input = self.quantized_inputs.then(|| GlobalScale::from_amax(headroom * statistics.input_amax()));
        self.solver.served(statistics.judges(), &vec![1.0; statistics.channels()], input)
    }

    /// The factor of the site's Hessian and its damping, or why there is none. The Hessian is given up: both
    /// together are the largest that a site needs.
    fn factor(
        &self,
        statistics: &mut SiteStatistics<S::Matrix>,
        diagonal: &[f32],
    ) -> Result<Factored<S::Factor>> {
        let n = statistics.channels();
        let Some(products) = statistics.products.take() else { return Ok((None, None)) };
        if self.tokens < LEAST_TOKENS * n {
            let reason = format!(
                "{} calibration tokens, a Hessian of {n} channels needs {}",
                self.tokens,
                LEAST_TOKENS * n
            );
            return Ok((None, Some(reason)));
        }
        let least = DAMPING[(self.tokens < 16 * n) as usize];
        Ok(match hessian::factor(self.solver, &products, diagonal, least)? {
            None => (None, Some("no damping makes the Hessian positive definite".into())),
            Some((factor, damping)) if damping > least => {
                let reason = format!("the Hessian needed damping {damping} instead of {least}");
                (Some((factor, damping)), Some(reason))
            }
            factor => (factor, None),
        })
    }
}

/// The members' common scale.
fn group_scale<S: Solver>(solver: &S, members: &[S::Matrix]) -> Result<GlobalScale> {
    let mut largest = 0f32;
    for w in members {
        largest = largest.max(solver.largest(w)?);
    }
    Ok(GlobalScale::from_amax(largest))
}

/// The norm that produces a site's input.
fn norm_of(site: Site) -> Option<usize> {
    match site {
        Site::Qkv => Some(0),
        Site::GateUp => Some(1),
        Site::O | Site::Down => None,
    }
}

/// A factor and its damping, or why there is none, or why it is another than asked for.
type Factored<F> = (Option<(F, f32)>, Option<String>);

/// Codes and how far off their outputs are: squared, relative.
struct Judged<S: Solver> {
    codes: Codes,
    q: S::Codes,
    error: f64,
    weight_error: f64,
}
