//! One decoder layer: choose the folds, fold, choose codes, judge them.

use super::dense::product;
use super::gptq::Factor;
use super::smoothing::{Choice, Smoothing, divide_columns, relative_error, served_inputs};
use super::{Codes, Method, QuantizedLinear, SiteStatistics};
use crate::error::Result;
use crate::model::Site;
use crate::nvfp4::{GlobalScale, amax};

/// Damping where there are sixteen tokens for each channel, and where there are fewer.
const DAMPING: [f32; 2] = [0.05, 0.1];

/// Tokens for each channel below which a Hessian is not trusted at all.
const LEAST_TOKENS: usize = 1;

/// The members of a site's fused group, each `[rows, cols]` in f32, read when they are needed.
pub type Weights<'a> = &'a dyn Fn(Site) -> Result<Vec<Vec<f32>>>;

/// A layer, as far as methods need it.
pub struct Layer<'a> {
    /// Which sites are quantized.
    pub quantized: [bool; 4],
    /// The weights.
    pub weights: Weights<'a>,
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
    /// `max |x|` of the input as it will be served.
    pub input_amax: f32,
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

impl Layer<'_> {
    /// Chooses the folds of all sites. They come before any code is chosen because two of them change the rows
    /// of weights that an earlier site reads.
    ///
    /// # Errors
    /// What reading the weights returns.
    pub fn folds(&self, method: Method, statistics: &[SiteStatistics; 4]) -> Result<Folds> {
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
        folds: &mut Folds,
        statistics: &mut [SiteStatistics; 4],
        done: &mut dyn FnMut(QuantizedGroup) -> Result<()>,
    ) -> Result<()> {
        for site in Site::ALL.into_iter().filter(|&site| self.quantized[site as usize]) {
            let smoothing = folds.smoothings[site as usize].take();
            done(self.group(site, method, smoothing, folds, &mut statistics[site as usize])?)?;
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

    fn smooth(&self, site: Site, statistics: &SiteStatistics) -> Result<Smoothing> {
        let members = (self.weights)(site)?;
        let choice = Choice {
            members: &members,
            amax: &statistics.amax,
            squares: &statistics.squares,
            sample: &statistics.fit,
            tie: (site == Site::O).then_some(self.heads),
            quantized_inputs: self.quantized_inputs,
        };
        Ok(choice.best(|wished| match norm_of(site) {
            Some(norm) => self.realized(norm, &wished),
            None => wished,
        }))
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
        smoothing: Option<Smoothing>,
        folds: &Folds,
        statistics: &mut SiteStatistics,
    ) -> Result<QuantizedGroup> {
        let n = statistics.channels();
        let mut members = (self.weights)(site)?;
        let plain = self.plain_errors(&members, statistics);
        if let Some(smoothing) = &smoothing {
            statistics.fold(&smoothing.factors);
            members.iter_mut().for_each(|w| *w = divide_columns(w, &smoothing.factors));
        }
        let rows = match site {
            Site::Qkv => Some((2, &folds.v)),
            Site::GateUp => Some((1, &folds.up)),
            _ => None,
        };
        if let Some((member, Some(factors))) = rows {
            let rows = members[member].chunks_exact_mut(n).zip(factors);
            rows.for_each(|(row, factor)| row.iter_mut().for_each(|w| *w *= factor));
        }
        let global = GlobalScale::from_amax(members.iter().map(|w| amax(w)).fold(0.0, f32::max));
        let input_amax = statistics.input_amax();
        let (factor, fallback) = self.factor(method, statistics);

        let sample = statistics.judges();
        let served = self.served(statistics);
        let importance = match method.codes {
            Codes::Sweep => vec![1.0; n],
            _ => statistics.importance(),
        };
        let members = members.iter().zip(plain).map(|(w, output_error_max)| {
            let outputs = product(sample, w, n);
            let judged = |codes: Codes, q: QuantizedLinear| {
                let error = relative_error(&product(&served, &q.values(n, global), n), &outputs);
                Judged { codes, q, error }
            };
            let (kept, other) = match (&factor, method.codes) {
                (None, Codes::Max) => (judged(Codes::Max, QuantizedLinear::max(w, n, global)), None),
                (None, codes) => {
                    let codes = if codes == Codes::Gptq { Codes::Wsweep } else { codes };
                    (judged(codes, QuantizedLinear::searched(w, &importance, global)), None)
                }
                (Some(factor), _) => {
                    let ours = judged(Codes::Gptq, factor.quantize(w, global));
                    let theirs = method
                        .guard
                        .then(|| judged(Codes::Wsweep, QuantizedLinear::searched(w, &importance, global)));
                    match theirs {
                        Some(theirs) if ours.error > theirs.error => (theirs, Some(ours.error)),
                        theirs => (ours, theirs.map(|theirs| theirs.error)),
                    }
                }
            };
            let verdict = Verdict {
                codes: kept.codes.name().to_string(),
                weight_error: relative_error(&kept.q.values(n, global), w).sqrt(),
                output_error_max,
                output_error: kept.error.sqrt(),
                output_error_other: other.map(f64::sqrt),
            };
            QuantizedMember { linear: kept.q, amax: amax(w), verdict }
        });
        let members = members.collect();
        let damping = factor.map(|factor| factor.damping);
        Ok(QuantizedGroup { site, global, input_amax, smoothing, damping, fallback, members })
    }

    /// Each member's output error without folds under max scales.
    fn plain_errors(&self, members: &[Vec<f32>], statistics: &SiteStatistics) -> Vec<f64> {
        let (n, sample, served) = (statistics.channels(), statistics.judges(), self.served(statistics));
        let global = GlobalScale::from_amax(members.iter().map(|w| amax(w)).fold(0.0, f32::max));
        let error = |w: &Vec<f32>| {
            let rounded = QuantizedLinear::max(w, n, global).values(n, global);
            relative_error(&product(&served, &rounded, n), &product(sample, w, n)).sqrt()
        };
        members.iter().map(error).collect()
    }

    /// The rows to judge with, as an engine sees them.
    fn served(&self, statistics: &SiteStatistics) -> Vec<f32> {
        let input_amax = self.quantized_inputs.then(|| statistics.input_amax());
        served_inputs(statistics.judges(), &vec![1.0; statistics.channels()], input_amax)
    }

    /// The factor of the site's Hessian, or why there is none.
    fn factor(&self, method: Method, statistics: &SiteStatistics) -> (Option<Factor>, Option<String>) {
        let n = statistics.channels();
        if method.codes != Codes::Gptq {
            return (None, None);
        }
        if self.tokens < LEAST_TOKENS * n {
            let reason = format!(
                "{} calibration tokens, a Hessian of {n} channels needs {}",
                self.tokens,
                LEAST_TOKENS * n
            );
            return (None, Some(reason));
        }
        let damping = DAMPING[(self.tokens < 16 * n) as usize];
        match Factor::new(&statistics.products, n, damping) {
            None => (None, Some("no damping makes the Hessian positive definite".into())),
            Some(factor) if factor.damping > damping => {
                let reason = format!("the Hessian needed damping {} instead of {damping}", factor.damping);
                (Some(factor), Some(reason))
            }
            factor => (factor, None),
        }
    }
}

/// The norm that produces a site's input.
fn norm_of(site: Site) -> Option<usize> {
    match site {
        Site::Qkv => Some(0),
        Site::GateUp => Some(1),
        Site::O | Site::Down => None,
    }
}

/// Codes and how far off their outputs are: squared, relative.
struct Judged {
    codes: Codes,
    q: QuantizedLinear,
    error: f64,
}
