//! From hidden states to scores.

use rayon::prelude::*;

use super::forward::Text;
use super::weights::Weights;
use super::{OnBackend, Solver};
use crate::backend::cpu::exp;
use crate::error::{Error, Result};
use crate::report::Scores;
use crate::simd::wide;

/// Yields a micro-batch's logits `[tokens, vocab]`.
pub type Logits<'a> = &'a dyn Fn(usize) -> Result<Vec<f32>>;

/// Final norm and lm_head over the last hidden states, loaded once.
pub struct Head<'a, F> {
    /// The checkpoint.
    pub weights: &'a Weights,
    /// By micro-batch: `[tokens, hidden]` in the compute dtype.
    pub hidden: &'a [Vec<u8>],
    /// What is to be done with the logits.
    pub then: F,
}

impl<T, F: FnOnce(Logits<'_>) -> Result<T>> OnBackend for Head<'_, F> {
    type Output = Result<T>;

    fn run<B: Solver>(self, backend: &B) -> Result<T> {
        let model = &self.weights.model;
        let norm = backend.load(&self.weights.tensor("model.norm.weight")?)?;
        let lm_head = backend.load(&self.weights.lm_head()?)?;
        (self.then)(&|batch| {
            let hidden = &self.hidden[batch];
            let tokens = hidden.len() / (model.hidden * backend.compute().bytes());
            let mut x = backend.activation(tokens, model.hidden)?;
            backend.upload(hidden, &mut x)?;
            let mut normed = backend.activation(tokens, model.hidden)?;
            backend.rms_norm(&x, &norm, model.norm_eps, &mut normed)?;
            let mut logits = backend.activation(tokens, model.vocab)?;
            backend.linear(&normed, &lm_head, None, &mut logits)?;
            backend.values(&logits)
        })
    }
}

/// One prediction.
struct Token {
    /// `-log p` of the token that came.
    nll: f64,
    /// KL divergence from the reference, in nats, and whether both prefer the same token.
    against: Option<(f64, bool)>,
}

/// Scores every token of every window but the first, beside a reference's where there is one.
///
/// # Errors
/// Exit code 3 where a prediction is NaN or infinite, and what the logits return.
pub fn score(text: &Text, mine: Logits<'_>, reference: Option<Logits<'_>>) -> Result<Scores> {
    let mut tokens: Vec<Token> = Vec::new();
    for batch in 0..text.batches.len() {
        let (logits, theirs, ids) =
            (mine(batch)?, reference.map(|of| of(batch)).transpose()?, text.ids_of(batch));
        let vocab = logits.len() / ids.len();
        let scored: Vec<usize> = (0..ids.len()).filter(|i| (i + 1) % text.window != 0).collect();
        tokens.par_extend(scored.into_par_iter().map(|i| {
            let row = |logits: &'_ [f32]| i * vocab..i * vocab + vocab.min(logits.len());
            let mine = &logits[row(&logits)];
            let normal = log_sum_exp(mine);
            let against = theirs.as_ref().map(|theirs| {
                let theirs = &theirs[row(theirs)];
                (divergence(theirs, log_sum_exp(theirs), mine, normal), largest(theirs).0 == largest(mine).0)
            });
            Token { nll: normal - mine[ids[i + 1] as usize] as f64, against }
        }));
    }
    if let Some(at) = tokens.iter().position(|token| !token.nll.is_finite()) {
        return Err(Error::input(format!("prediction {at} of {} is NaN or infinite", tokens.len()))
            .fix("check the checkpoint with distq verify: a scale or a weight overflows"));
    }
    let count = tokens.len() as f64;
    let mut divergences: Vec<f64> =
        tokens.iter().filter_map(|token| token.against.map(|(kl, _)| kl)).collect();
    let same = tokens.iter().filter(|token| token.against.is_some_and(|(_, same)| same)).count();
    let compared = !divergences.is_empty();
    let mean_kl = divergences.iter().sum::<f64>() / count;
    divergences.sort_by(f64::total_cmp);
    let at = (divergences.len() * 99).div_ceil(100).saturating_sub(1);
    Ok(Scores {
        model: String::new(),
        tokens: tokens.len(),
        perplexity: (tokens.iter().map(|token| token.nll).sum::<f64>() / count).exp(),
        mean_kl: compared.then_some(mean_kl),
        p99_kl: divergences.get(at).copied(),
        top1: compared.then_some(same as f64 / count),
        seconds: 0.0,
    })
}

/// The logarithm of a softmax's denominator.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = largest(logits).1;
    let mut exponentials = vec![0.0; logits.len()];
    exponentials_of(logits, top, &mut exponentials);
    top as f64 + total(&exponentials).ln()
}

/// `Σ p (log p − log q)` for logits and their normalizers.
fn divergence(p: &[f32], p_normal: f64, q: &[f32], q_normal: f64) -> f64 {
    let mut terms = vec![0.0; p.len()];
    exponentials_of(p, p_normal as f32, &mut terms);
    let shift = (q_normal - p_normal) as f32;
    terms.iter_mut().zip(p.iter().zip(q)).for_each(|(term, (p, q))| *term *= p - q + shift);
    total(&terms)
}

wide! {
    fn exponentials_of(x: &[f32], top: f32, out: &mut [f32]) => exponentials_body
}

#[inline(always)]
fn exponentials_body(x: &[f32], top: f32, out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = exp(x - top);
    }
}

/// A sum in f64 of short sums in f32, whose order vectorizes.
fn total(x: &[f32]) -> f64 {
    let short = |part: &[f32]| {
        let mut lanes = [0f32; 16];
        let (whole, rest) = part.as_chunks::<16>();
        whole.iter().for_each(|x| lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane += x));
        (lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()) as f64
    };
    x.chunks(1024).map(short).sum()
}

/// The largest logit's index and value; the first of equal ones.
fn largest(logits: &[f32]) -> (usize, f32) {
    let top = logits.iter().copied().fold(f32::MIN, f32::max);
    (logits.iter().position(|&x| x == top).unwrap_or(0), top)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::micro_batches;

    #[test]
    fn scores_follow_their_definitions() {
        // Two windows of three tokens, a vocabulary of two; every prediction gives token 1 the odds 3 : 1.
        let text = Text { batches: micro_batches(&[3, 3], 3), ids: vec![0, 1, 1, 1, 0, 1], window: 3 };
        let odds = vec![0.0, 3f32.ln(), 0.0, 3f32.ln(), 0.0, 3f32.ln()];
        let even = vec![0.0; 6];
        let scores = score(&text, &|_| Ok(odds.clone()), Some(&|_| Ok(even.clone()))).unwrap();
        assert_eq!(scores.tokens, 4);
        let nll = -(3.0 * 0.75f64.ln() + 0.25f64.ln()) / 4.0;
        assert!((scores.perplexity / nll.exp() - 1.0).abs() < 1e-6);
        let kl = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((scores.mean_kl.unwrap() - kl).abs() < 1e-6);
        assert!((scores.p99_kl.unwrap() - kl).abs() < 1e-6);
        assert_eq!(scores.top1, Some(0.0));
        let alone = score(&text, &|_| Ok(odds.clone()), None).unwrap();
        assert_eq!((alone.mean_kl, alone.top1), (None, None));
        let mut broken = odds.clone();
        broken[2] = f32::NAN;
        let error = score(&text, &|_| Ok(broken.clone()), None).unwrap_err();
        assert!(error.exit as i32 == 3 && error.to_string().contains("prediction 1 of 4"), "{error}");
    }
}
