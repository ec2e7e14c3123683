//! The codes of one fused group: what is tried, how it is judged, and what is kept.
//!
//! Errors are of the outputs that the source would have, as an engine computes them: its inputs quantized, its weights
//! as they were rounded. Folded rows of a weight are scaled back before, so errors with and without folds compare.

use super::headroom::headroom;
use super::layer::{Folds, Layer, QuantizedGroup, QuantizedMember, Verdict};
use super::{Codes, Method, SiteStatistics, hessian};
use crate::backend::Solver;
use crate::error::Result;
use crate::nvfp4::{BLOCK, GlobalScale};

/// Damping where there are sixteen tokens for each channel, and where there are fewer.
const DAMPING: [f32; 2] = [0.05, 0.1];

/// Tokens for each channel below which a Hessian is not trusted at all.
const LEAST_TOKENS: usize = 1;

/// The relative error up to which any weights are close enough to the source. Max scales give 0.1 for most weights.
const CLOSE: f64 = 0.15;

/// How many times the error of max scales is close enough too, for weights that NVFP4 can hardly hold.
const CLOSE_TO_MAX: f64 = 1.5;

/// Of the mean importance of a block, what each of its channels has at least: calibration may not have seen a channel
/// that is used later.
const LEAST_IMPORTANCE: f32 = 1e-4;

impl<S: Solver> Layer<'_, S> {
    /// Folds and quantizes the members of a site. `room` asks for headroom.
    pub(super) fn group(
        &self,
        site: usize,
        method: Method,
        folds: &Folds,
        room: bool,
        statistics: &mut SiteStatistics<S::Matrix>,
    ) -> Result<QuantizedGroup> {
        let (solver, n) = (self.solver, statistics.channels());
        let mut members = (self.weights)(site)?;
        let outputs = self.outputs(&members, statistics)?;
        let plain = self.under_max(&members, &vec![1.0; n], &outputs, statistics)?;
        let factors = folds.smoothing(site).map_or(vec![1.0; n], |smoothing| smoothing.factors.clone());
        self.fold(site, folds, &mut members)?;
        let global = group_scale(solver, &members)?;
        let input_amax = statistics.input_amax(&factors);
        let headroom = match room {
            true => headroom(&solver.read(&solver.served(&statistics.fit, &factors, None)?)?, input_amax),
            false => 1.0,
        };
        let mut importance = match method.codes {
            Codes::Sweep => vec![1.0; n],
            _ => statistics.importance(solver)?,
        };
        importance.iter_mut().zip(&factors).for_each(|(x, f)| *x *= f * f);
        let (factor, trouble) = self.factor(statistics, &factors, &importance)?;
        let group = Group {
            layer: self,
            method,
            global,
            served: self.served(statistics, &factors, headroom)?,
            importance: at_least_some(importance),
            factor: factor.as_ref().map(|(factor, _)| factor),
        };
        let mut quantized = Vec::new();
        for (i, w) in members.iter().enumerate() {
            let number = self.quantized[site][i];
            let rows = folds.rows(number, self.spec.linears[number].rows);
            let back = rows.map(|rows| rows.iter().map(|f| 1.0 / f).collect());
            let kept = group.choose(Linear { w, outputs: &outputs[i], back, plain: plain[i] })?;
            quantized.push(kept.read(solver, solver.largest(w)?, plain[i])?);
        }
        let again = method.codes == Codes::Gptq && factor.is_none() && trouble.is_none();
        let reasons = [
            folds
                .gave_up(site)
                .then(|| "its fold gave worse outputs than max scales and was left out".into()),
            (method.headroom && self.quantized_inputs && !room)
                .then(|| "room above its largest input gave worse outputs and was left out".into()),
            again.then(|| "what was left is without a Hessian, so wsweep took the place of GPTQ".into()),
            trouble,
        ];
        let reasons: Vec<String> = reasons.into_iter().flatten().collect();
        Ok(QuantizedGroup {
            site,
            global,
            input_amax,
            headroom,
            smoothing: folds.smoothing(site).cloned(),
            damping: factor.map(|(_, damping)| damping),
            fallback: (!reasons.is_empty()).then(|| reasons.join("; ")),
            members: quantized,
        })
    }

    /// Whether no member's outputs are worse under max scales with the folds than without.
    pub(super) fn wins(
        &self,
        site: usize,
        members: &[S::Matrix],
        folds: &Folds,
        statistics: &SiteStatistics<S::Matrix>,
    ) -> Result<bool> {
        let Some(smoothing) = folds.smoothing(site) else { return Ok(true) };
        let outputs = self.outputs(members, statistics)?;
        let without = self.under_max(members, &vec![1.0; statistics.channels()], &outputs, statistics)?;
        let with = self.under_max(members, &smoothing.factors, &outputs, statistics)?;
        Ok(with.iter().zip(without).all(|(with, without)| *with <= without))
    }

    /// What the members make of the rows that judge.
    fn outputs(
        &self,
        members: &[S::Matrix],
        statistics: &SiteStatistics<S::Matrix>,
    ) -> Result<Vec<S::Matrix>> {
        members.iter().map(|w| self.solver.outputs(statistics.judges(), w)).collect()
    }

    /// Each member's squared output error under max scales, columns divided by `factors`.
    fn under_max(
        &self,
        members: &[S::Matrix],
        factors: &[f32],
        outputs: &[S::Matrix],
        statistics: &SiteStatistics<S::Matrix>,
    ) -> Result<Vec<f64>> {
        let (solver, n) = (self.solver, factors.len());
        let served = self.served(statistics, factors, 1.0)?;
        // One member's fold at a time: for a large layer two of them are as large as everything else.
        let mut largest = 0f32;
        for w in members {
            largest = largest.max(solver.largest(&solver.divided(w, factors)?)?);
        }
        let global = GlobalScale::from_amax(largest);
        let error = |(w, outputs): (&S::Matrix, &S::Matrix)| {
            let codes = solver.round_max(&solver.divided(w, factors)?, global)?;
            let values = solver.dequantize(&codes, n, global)?;
            solver.relative_error(&solver.outputs(&served, &values)?, outputs)
        };
        members.iter().zip(outputs).map(error).collect()
    }

    /// The rows to judge with, as an engine sees them.
    fn served(
        &self,
        statistics: &SiteStatistics<S::Matrix>,
        factors: &[f32],
        headroom: f32,
    ) -> Result<S::Matrix> {
        let amax = headroom * statistics.input_amax(factors);
        let input = self.quantized_inputs.then(|| GlobalScale::from_amax(amax));
        self.solver.served(statistics.judges(), factors, input)
    }

    /// The factor of the site's folded Hessian and its damping, or why there is none. The products are given up: both
    /// together are the largest that a site needs.
    fn factor(
        &self,
        statistics: &mut SiteStatistics<S::Matrix>,
        factors: &[f32],
        diagonal: &[f32],
    ) -> Result<Factored<S::Factor>> {
        let n = statistics.channels();
        let Some(mut products) = statistics.take_products(self.solver)? else { return Ok((None, None)) };
        if self.tokens < LEAST_TOKENS * n {
            let reason = format!(
                "{} calibration tokens, a Hessian of {n} channels needs {}",
                self.tokens,
                LEAST_TOKENS * n
            );
            return Ok((None, Some(reason)));
        }
        self.solver.scale(&mut products, Some(factors), Some(factors))?;
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

/// What the members of a group have in common.
struct Group<'a, S: Solver> {
    layer: &'a Layer<'a, S>,
    method: Method,
    global: GlobalScale,
    /// The rows to judge with, as an engine sees them.
    served: S::Matrix,
    importance: Vec<f32>,
    factor: Option<&'a S::Factor>,
}

/// A member of a group.
struct Linear<'a, S: Solver> {
    /// Its folded weights.
    w: &'a S::Matrix,
    /// What its source makes of the rows that judge.
    outputs: &'a S::Matrix,
    /// What scales its folded outputs back.
    back: Option<Vec<f32>>,
    /// Its squared output error under max scales, without folds.
    plain: f64,
}

impl<S: Solver> Group<'_, S> {
    /// Codes as the method asks for them; with `guard`, those with the smallest output error. Max scales take the place
    /// of codes that are far from the weights, and of all others where nothing else is as good.
    fn choose(&self, linear: Linear<'_, S>) -> Result<Kept<S>> {
        let (asked, guard) = (self.method.codes, self.method.guard);
        let asked = if asked == Codes::Gptq && self.factor.is_none() { Codes::Wsweep } else { asked };
        let mut tried = vec![self.judge(asked, &linear)?];
        if guard && asked == Codes::Gptq {
            tried.push(self.judge(Codes::Wsweep, &linear)?);
        }
        let far = tried.iter().any(|codes| codes.weight_error > CLOSE);
        let loses = guard && tried.iter().all(|codes| codes.error > linear.plain);
        if asked != Codes::Max && (far || loses) {
            let max = self.judge(Codes::Max, &linear)?;
            let close = CLOSE.max(CLOSE_TO_MAX * max.weight_error);
            tried.retain(|codes| codes.weight_error <= close);
            tried.push(max);
        }
        if guard {
            // Stable: of equal errors the first is kept.
            tried.sort_by(|a, b| a.error.total_cmp(&b.error));
        }
        let mut tried = tried.into_iter();
        let judged = tried.next().expect("something was tried");
        let other = tried.next().filter(|_| guard).map(|codes| codes.error);
        Ok(Kept { judged, other })
    }

    fn judge(&self, codes: Codes, linear: &Linear<'_, S>) -> Result<Judged<S>> {
        let (solver, global, n) = (self.layer.solver, self.global, self.importance.len());
        let q = match (codes, self.factor) {
            (Codes::Max, _) => solver.round_max(linear.w, global)?,
            (Codes::Gptq, Some(factor)) => solver.round_gptq(linear.w, factor, global)?,
            _ => solver.round_searched(linear.w, &self.importance, global)?,
        };
        let values = solver.dequantize(&q, n, global)?;
        let mut outputs = solver.outputs(&self.served, &values)?;
        if let Some(back) = &linear.back {
            solver.scale(&mut outputs, None, Some(back))?;
        }
        let error = solver.relative_error(&outputs, linear.outputs)?;
        let weight_error = solver.relative_error(&values, linear.w)?.sqrt();
        Ok(Judged { codes, q, error, weight_error })
    }
}

/// Codes and how far off their outputs are: squared, relative.
struct Judged<S: Solver> {
    codes: Codes,
    q: S::Codes,
    error: f64,
    weight_error: f64,
}

/// Codes that were kept, and the squared output error of the best that were not.
struct Kept<S: Solver> {
    judged: Judged<S>,
    other: Option<f64>,
}

impl<S: Solver> Kept<S> {
    fn read(self, solver: &S, amax: f32, plain: f64) -> Result<QuantizedMember> {
        let Judged { codes, q, error, weight_error } = self.judged;
        let verdict = Verdict {
            codes: codes.name().to_string(),
            weight_error,
            output_error_max: plain.sqrt(),
            output_error: error.sqrt(),
            output_error_other: self.other.map(f64::sqrt),
        };
        Ok(QuantizedMember { linear: solver.read_codes(q)?, amax, verdict })
    }
}

/// Raises the importance of channels that count for next to nothing beside the others of their block.
fn at_least_some(mut importance: Vec<f32>) -> Vec<f32> {
    for block in importance.as_chunks_mut::<BLOCK>().0 {
        let least = LEAST_IMPORTANCE * block.iter().sum::<f32>() / BLOCK as f32;
        block.iter_mut().for_each(|x| *x = x.max(least));
    }
    importance
}

/// The members' common scale.
fn group_scale<S: Solver>(solver: &S, members: &[S::Matrix]) -> Result<GlobalScale> {
    let mut largest = 0f32;
    for w in members {
        largest = largest.max(solver.largest(w)?);
    }
    Ok(GlobalScale::from_amax(largest))
}

/// A factor and its damping, or why there is none, or why it is another than asked for.
type Factored<F> = (Option<(F, f32)>, Option<String>);
