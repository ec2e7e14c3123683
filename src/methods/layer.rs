//! One decoder layer: choose the folds, fold, choose codes, and give up what loses to max scales.

use super::smoothing::{Choice, Smoothing};
use super::{Method, SiteStatistics};
use crate::backend::Solver;
use crate::error::Result;
use crate::model::Site;
use crate::nvfp4::{GlobalScale, QuantizedLinear};

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
    /// Whether the bias of a row, of v for [`Site::O`] and of up for [`Site::Down`], can hold a factor, if there is one.
    pub bias_holds: &'a dyn Fn(Site, usize, f32) -> bool,
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
    /// Folds that were chosen and then given up, because they lost on the rows that judge.
    given_up: [bool; 4],
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
    /// max scales. Both errors are of the outputs that the source has: a fold of the rows is undone before.
    pub output_error_max: f64,
    /// The same, as it was quantized.
    pub output_error: f64,
    /// The same, for the best of the codes that were given up: the weighted search where GPTQ won, for example.
    pub output_error_other: Option<f64>,
}

impl Folds {
    /// Whether the input of `site` is folded.
    fn has(&self, site: Site) -> bool {
        self.smoothings[site as usize].as_ref().is_some_and(|smoothing| smoothing.candidate != "none")
    }

    /// Leaves the input of `site` as it is, and what produces it.
    fn give_up(&mut self, site: Site) {
        let smoothing = &mut self.smoothings[site as usize];
        *smoothing = smoothing.take().map(|smoothing| Smoothing::none(smoothing.factors.len()));
        match site {
            Site::Qkv | Site::GateUp => self.norms[(site == Site::GateUp) as usize] = None,
            Site::O => self.v = None,
            Site::Down => self.up = None,
        }
        self.given_up[site as usize] = true;
    }

    /// The fold of a site's input.
    pub(super) fn smoothing(&self, site: Site) -> Option<&Smoothing> {
        self.smoothings[site as usize].as_ref()
    }

    /// Whether the fold of a site's input was chosen and then given up.
    pub(super) fn gave_up(&self, site: Site) -> bool {
        self.given_up[site as usize]
    }

    /// The factors of the rows of a site's member.
    pub(super) fn rows(&self, site: Site, member: usize) -> Option<&[f32]> {
        match (site, member) {
            (Site::Qkv, 2) => self.v.as_deref(),
            (Site::GateUp, 1) => self.up.as_deref(),
            _ => None,
        }
    }
}

impl QuantizedGroup {
    /// Whether a linear's outputs are worse than under max scales without folds.
    fn loses(&self) -> bool {
        self.members.iter().any(|member| member.verdict.output_error > member.verdict.output_error_max)
    }
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
            let statistics = &statistics[site as usize];
            let members = (self.weights)(site)?;
            let smoothing = self.smooth(site, &members, statistics)?;
            let folded = smoothing.candidate != "none";
            if folded {
                self.fold_producer(site, &smoothing.factors, &mut folds);
            }
            folds.smoothings[site as usize] = Some(smoothing);
            // The earlier site's codes will hold this fold, so that it can't be given up later.
            let judged_now = matches!(site, Site::O | Site::Down);
            if folded && method.guard && judged_now && !self.wins(site, &members, &folds, statistics)? {
                folds.give_up(site);
            }
        }
        Ok(folds)
    }

    /// Folds and quantizes group by group, and hands each to `done`. With `guard`, a group in which a linear's outputs
    /// are worse than under max scales without folds is quantized again without room in its input, without its own
    /// fold, and without the fold that its rows hold: what is left then is max scales themselves. `folds` are those
    /// that were kept in the end.
    ///
    /// # Errors
    /// What `done` or reading the weights returns.
    pub fn quantize(
        &self,
        method: Method,
        folds: &mut Folds,
        statistics: &mut [SiteStatistics<S::Matrix>; 4],
        done: &mut dyn FnMut(QuantizedGroup) -> Result<()>,
    ) -> Result<()> {
        for site in Site::ALL.into_iter().filter(|&site| self.quantized[site as usize]) {
            let statistics = &mut statistics[site as usize];
            let mut room = method.headroom && self.quantized_inputs;
            let mut group = self.group(site, method, folds, room, statistics)?;
            while method.guard && group.loses() {
                let held = match site {
                    Site::Qkv => Some(Site::O),
                    Site::GateUp => Some(Site::Down),
                    Site::O | Site::Down => None,
                };
                let held = held.filter(|&site| folds.has(site));
                if room && group.headroom > 1.0 {
                    room = false;
                } else if held.is_some() && !folds.has(site) {
                    held.into_iter().for_each(|site| folds.give_up(site));
                } else if folds.has(site) && matches!(site, Site::Qkv | Site::GateUp) {
                    folds.give_up(site);
                } else {
                    break;
                }
                group = self.group(site, method, folds, room, statistics)?;
            }
            done(group)?;
        }
        Ok(())
    }

    /// Folds the members of a site's group, each `[rows, cols]`: columns are divided by the site's own factors, rows
    /// of v and up multiplied by those of the site that reads them.
    ///
    /// # Errors
    /// What the device returns.
    pub fn fold(&self, site: Site, folds: &Folds, members: &mut [S::Matrix]) -> Result<()> {
        for (member, w) in members.iter_mut().enumerate() {
            if let Some(smoothing) = &folds.smoothings[site as usize] {
                *w = self.solver.divided(w, &smoothing.factors)?;
            }
            if let Some(factors) = folds.rows(site, member) {
                self.solver.scale(w, Some(factors), None)?;
            }
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

    fn smooth(
        &self,
        site: Site,
        members: &[S::Matrix],
        statistics: &SiteStatistics<S::Matrix>,
    ) -> Result<Smoothing> {
        let choice = Choice {
            solver: self.solver,
            members,
            amax: &statistics.amax,
            squares: &statistics.squares,
            sample: &statistics.fit,
            tie: (site == Site::O).then_some(self.heads),
            quantized_inputs: self.quantized_inputs,
        };
        let (repeats, width) = self.heads;
        let held = |(channel, factor): (usize, f32)| {
            let row = match site {
                Site::O => channel / (repeats * width) * width + channel % width,
                _ => channel,
            };
            if (self.bias_holds)(site, row, factor) { factor } else { 1.0 }
        };
        choice.best(|wished| match norm_of(site) {
            Some(norm) => self.realized(norm, &wished),
            None => wished.into_iter().enumerate().map(held).collect(),
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
}

/// The norm that produces a site's input.
fn norm_of(site: Site) -> Option<usize> {
    match site {
        Site::Qkv => Some(0),
        Site::GateUp => Some(1),
        Site::O | Site::Down => None,
    }
}
