//! One decoder layer: choose the folds, fold, choose codes, and give up what loses to max scales.

use super::smoothing::{Choice, Smoothing};
use super::{Method, SiteStatistics};
use crate::backend::{Gamma, Solver};
use crate::error::Result;
use crate::model::Producer;
use crate::nvfp4::{GlobalScale, QuantizedLinear};

/// The linears of a site that are quantized, each `[rows, cols]` in f32, read when they are needed.
pub type Weights<'a, M> = &'a dyn Fn(usize) -> Result<Vec<M>>;

/// A layer, as far as methods need it.
pub struct Layer<'a, S: Solver> {
    /// Where arithmetic happens.
    pub solver: &'a S,
    /// What the layer is made of.
    pub spec: &'a crate::model::Layer,
    /// The numbers of the linears that are quantized, by site.
    pub quantized: &'a [Vec<usize>],
    /// The weights.
    pub weights: Weights<'a, S::Matrix>,
    /// The stored weights of the norms that produce inputs, by the norms' numbers; none of those without a weight.
    pub norms: Vec<Option<Vec<f32>>>,
    /// Rounds to what the norm with this number can store.
    pub round_norm: &'a dyn Fn(usize, f32) -> f32,
    /// Whether the bias of a row of a linear can hold a factor, if there is one: the linear's number, the row, the
    /// factor.
    pub bias_holds: &'a dyn Fn(usize, usize, f32) -> bool,
    /// Tokens behind the products.
    pub tokens: usize,
    /// Whether inputs are quantized when served.
    pub quantized_inputs: bool,
}

/// The fold of one site's input, and what it makes of what produces the input.
#[derive(Clone, Debug, PartialEq)]
struct Fold {
    smoothing: Smoothing,
    /// Whether it was chosen and then given up, because it lost on the rows that judge.
    given_up: bool,
    change: Change,
}

/// What a fold changes besides the weights that read the input.
#[derive(Clone, Debug, PartialEq)]
enum Change {
    /// Nothing: the factors are ones.
    Nothing,
    /// The stored weights of the norm that produces the input, and the factors of its bias.
    Norm { number: usize, weights: Vec<f32>, factors: Vec<f32> },
    /// Rows of a linear, and of its bias, are multiplied by these factors.
    Rows { linear: usize, first: usize, factors: Vec<f32> },
}

/// The folds of a layer, and what they make of its other tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Folds {
    /// By site; none where no fold was looked for.
    sites: Vec<Option<Fold>>,
}

/// What was chosen for the linears of one site.
pub struct QuantizedGroup {
    /// The number of the site.
    pub site: usize,
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
    fn fold(&self, site: usize) -> Option<&Fold> {
        self.sites.get(site)?.as_ref()
    }

    /// Whether the input of `site` is folded.
    pub fn has(&self, site: usize) -> bool {
        self.fold(site).is_some_and(|fold| fold.change != Change::Nothing)
    }

    /// Leaves the input of `site` as it is, and what produces it.
    fn give_up(&mut self, site: usize) {
        if let Some(fold) = &mut self.sites[site] {
            let smoothing = Smoothing::none(fold.smoothing.factors.len());
            *fold = Fold { smoothing, given_up: true, change: Change::Nothing };
        }
    }

    /// The fold of a site's input.
    pub(super) fn smoothing(&self, site: usize) -> Option<&Smoothing> {
        self.fold(site).map(|fold| &fold.smoothing)
    }

    /// Whether the fold of a site's input was chosen and then given up.
    pub(super) fn gave_up(&self, site: usize) -> bool {
        self.fold(site).is_some_and(|fold| fold.given_up)
    }

    /// The factors of the rows of the linear with this number, of which there are `rows`; none where all are ones.
    pub fn rows(&self, number: usize, rows: usize) -> Option<Vec<f32>> {
        let mut all = None;
        for fold in self.sites.iter().flatten() {
            match &fold.change {
                Change::Rows { linear, first, factors } if *linear == number => {
                    let all = all.get_or_insert_with(|| vec![1.0; rows]);
                    all[*first..first + factors.len()].copy_from_slice(factors);
                }
                _ => {}
            }
        }
        all
    }

    /// The norms that folds go into: their numbers, their new stored weights, and the factors of their biases.
    pub fn norms(&self) -> impl Iterator<Item = (usize, &[f32], &[f32])> {
        self.sites.iter().flatten().filter_map(|fold| match &fold.change {
            Change::Norm { number, weights, factors } => {
                Some((*number, weights.as_slice(), factors.as_slice()))
            }
            _ => None,
        })
    }
}

impl QuantizedGroup {
    /// Whether a linear's outputs are worse than under max scales without folds.
    fn loses(&self) -> bool {
        self.members.iter().any(|member| member.verdict.output_error > member.verdict.output_error_max)
    }
}

impl<S: Solver> Layer<'_, S> {
    /// Chooses the folds of all sites. They come before any code is chosen because some of them change the rows
    /// of weights that an earlier site reads.
    ///
    /// # Errors
    /// What reading the weights returns.
    pub fn folds(&self, method: Method, statistics: &[SiteStatistics<S::Matrix>]) -> Result<Folds> {
        let mut folds = Folds { sites: vec![None; self.spec.sites.len()] };
        for site in self.sites().filter(|&site| method.smooth && self.can_fold(site)) {
            let statistics = &statistics[site];
            let members = (self.weights)(site)?;
            let smoothing = self.smooth(site, &members, statistics)?;
            let folded = smoothing.candidate != "none";
            let change = if folded { self.change(site, &smoothing.factors) } else { Change::Nothing };
            folds.sites[site] = Some(Fold { smoothing, given_up: false, change });
            // The earlier site's codes will hold this fold, so that it can't be given up later.
            let judged_now = matches!(self.spec.sites[site].producer, Producer::Rows(_));
            if folded && method.guard && judged_now && !self.wins(site, &members, &folds, statistics)? {
                folds.give_up(site);
            }
        }
        Ok(folds)
    }

    /// Folds and quantizes site by site, and hands each to `done`. With `guard`, a group in which a linear's outputs
    /// are worse than under max scales without folds is quantized again without room in its input, without its own
    /// fold, and without the folds that its rows hold: what is left then is max scales themselves. `folds` are those
    /// that were kept in the end.
    ///
    /// # Errors
    /// What `done` or reading the weights returns.
    pub fn quantize(
        &self,
        method: Method,
        folds: &mut Folds,
        statistics: &mut [SiteStatistics<S::Matrix>],
        done: &mut dyn FnMut(QuantizedGroup) -> Result<()>,
    ) -> Result<()> {
        for site in self.sites().filter(|&site| !self.quantized[site].is_empty()) {
            let statistics = &mut statistics[site];
            let mut room = method.headroom && self.quantized_inputs;
            let mut group = self.group(site, method, folds, room, statistics)?;
            while method.guard && group.loses() {
                let held: Vec<usize> = self.held(site).filter(|&held| folds.has(held)).collect();
                if room && group.headroom > 1.0 {
                    room = false;
                } else if !held.is_empty() && !folds.has(site) {
                    held.into_iter().for_each(|site| folds.give_up(site));
                } else if folds.has(site) && matches!(self.spec.sites[site].producer, Producer::Norm(_)) {
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

    /// Folds the quantized linears of a site, each `[rows, cols]`: columns are divided by the site's own factors, rows
    /// multiplied by those of the sites that read what they produce.
    ///
    /// # Errors
    /// What the device returns.
    pub fn fold(&self, site: usize, folds: &Folds, members: &mut [S::Matrix]) -> Result<()> {
        for (&number, w) in self.quantized[site].iter().zip(members) {
            if let Some(smoothing) = folds.smoothing(site) {
                *w = self.solver.divided(w, &smoothing.factors)?;
            }
            if let Some(factors) = folds.rows(number, self.spec.linears[number].rows) {
                self.solver.scale(w, Some(&factors), None)?;
            }
        }
        Ok(())
    }

    fn sites(&self) -> impl Iterator<Item = usize> + use<S> {
        0..self.spec.sites.len()
    }

    /// Whether every linear of a site is quantized.
    fn is_whole(&self, site: usize) -> bool {
        self.quantized[site].len() == self.spec.sites[site].members.len()
    }

    /// The sites whose inputs rows of this site's linears produce.
    fn held(&self, site: usize) -> impl Iterator<Item = usize> {
        let members = &self.spec.sites[site].members;
        self.sites().filter(move |&other| match &self.spec.sites[other].producer {
            Producer::Rows(rows) => members.contains(&rows.linear),
            Producer::Norm(_) | Producer::Fixed => false,
        })
    }

    /// A fold changes both its consumers and its producer, so both must be rewritten anyway: linears that keep
    /// their dtype are carried over byte for byte.
    fn can_fold(&self, site: usize) -> bool {
        let producer = match &self.spec.sites[site].producer {
            Producer::Norm(norm) => self.norms[*norm].is_some(),
            Producer::Rows(rows) => self.quantized.iter().any(|numbers| numbers.contains(&rows.linear)),
            Producer::Fixed => false,
        };
        producer && self.is_whole(site)
    }

    fn smooth(
        &self,
        site: usize,
        members: &[S::Matrix],
        statistics: &SiteStatistics<S::Matrix>,
    ) -> Result<Smoothing> {
        let producer = &self.spec.sites[site].producer;
        let tie = match producer {
            Producer::Rows(rows) if rows.repeats > 1 || rows.width < rows.count => {
                Some((rows.repeats, rows.width))
            }
            _ => None,
        };
        let choice = Choice {
            solver: self.solver,
            members,
            amax: &statistics.amax,
            squares: &statistics.squares,
            sample: &statistics.fit,
            tie,
            quantized_inputs: self.quantized_inputs,
        };
        choice.best(|wished| match producer {
            Producer::Norm(norm) => self.realized(*norm, &wished),
            Producer::Rows(rows) => {
                let held = |(channel, factor): (usize, f32)| {
                    let row = rows.first + rows.of_channel(channel);
                    let of_row = if rows.squared { factor.sqrt() } else { factor };
                    if (self.bias_holds)(rows.linear, row, of_row) { factor } else { 1.0 }
                };
                wished.into_iter().enumerate().map(held).collect()
            }
            Producer::Fixed => vec![1.0; wished.len()],
        })
    }

    /// The factors that a norm can hold: its stored weights are rounded, so the columns are divided by what
    /// really happened to them.
    fn realized(&self, norm: usize, wished: &[f32]) -> Vec<f32> {
        let (gamma, weights) = self.gamma(norm);
        let round = |x| (self.round_norm)(norm, x);
        let pairs = weights.iter().zip(wished);
        pairs
            .map(|(&weight, factor)| {
                let there = gamma.of_weight(weight, round);
                let here = gamma.of_weight(round(gamma.to_weight(there * factor)), round);
                let realized = here / there;
                if realized.is_normal() && realized > 0.0 { realized } else { 1.0 }
            })
            .collect()
    }

    /// What the norm with this number multiplies by, and its stored weights.
    fn gamma(&self, norm: usize) -> (Gamma, &[f32]) {
        let weights = self.norms[norm].as_deref().expect("only norms with a weight are folded");
        (self.spec.norms[norm].kind.gamma, weights)
    }

    /// What a fold makes of what produces the input of a site.
    fn change(&self, site: usize, factors: &[f32]) -> Change {
        match &self.spec.sites[site].producer {
            Producer::Norm(norm) => {
                let (gamma, weights) = self.gamma(*norm);
                let round = |x| (self.round_norm)(*norm, x);
                let folded = |(&weight, factor): (&f32, &f32)| match factor {
                    // Exact, also where one plus the weight is not.
                    1.0 => weight,
                    factor => round(gamma.to_weight(gamma.of_weight(weight, round) * factor)),
                };
                let weights = weights.iter().zip(factors).map(folded).collect();
                Change::Norm { number: *norm, weights, factors: factors.to_vec() }
            }
            Producer::Rows(rows) => {
                Change::Rows { linear: rows.linear, first: rows.first, factors: rows.factors(factors) }
            }
            Producer::Fixed => Change::Nothing,
        }
    }
}
