//! From hidden states to scores.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::forward::Text;
use super::scores::Scores;
use super::weights::Weights;
use super::{OnBackend, Solver};
use crate::backend::cpu::exp;
use crate::error::{Error, Result};
use crate::forward::finish_logits;
use crate::model::TensorSpec;
use crate::simd::wide;

/// Yields a micro-batch's logits `[tokens, vocab]`.
pub type Logits<'a> = &'a dyn Fn(usize) -> Result<Vec<f32>>;

/// Final norm and lm_head over the last hidden states, loaded once.
pub struct Head<'a, F> {
    /// The checkpoint.
    pub weights: &'a Weights,
    /// By micro-batch: `[tokens, hidden]` in the compute dtype.
    pub hidden: &'a BTreeMap<usize, Vec<u8>>,
    /// What is to be done with the logits.
    pub then: F,
}

impl<T, F: FnOnce(Logits<'_>) -> Result<T>> OnBackend for Head<'_, F> {
    type Output = Result<T>;

    fn run<B: Solver>(self, backend: &B) -> Result<T> {
        let model = &self.weights.model;
        let load = |spec: &Option<TensorSpec>| -> Result<Option<B::Tensor>> {
            spec.as_ref().map(|spec| backend.load(&self.weights.tensor(&spec.name)?)).transpose()
        };
        let (weight, bias) = (load(&model.norm.weight)?, load(&model.norm.bias)?);
        let lm_head = backend.load(&self.weights.lm_head()?)?;
        (self.then)(&|batch| {
            let hidden = &self.hidden[&batch];
            let tokens = hidden.len() / (model.hidden * backend.compute().bytes());
            let mut x = backend.activation(tokens, model.hidden)?;
            backend.upload(hidden, &mut x)?;
            let mut normed = backend.activation(tokens, model.hidden)?;
            backend.norm(&x, &model.norm.kind, weight.as_ref(), bias.as_ref(), &mut normed)?;
            let mut logits = backend.activation(tokens, model.vocab)?;
            backend.linear(&normed, &lm_head, None, &mut logits)?;
            finish_logits(backend, &model.logits, &mut logits)?;
            backend.values(&logits)
        })
    }
}

/// One prediction.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Token {
    /// `-log p` of the token that came.
    nll: f64,
    /// KL divergence from the reference, in nats, and whether both prefer the same token.
    against: Option<(f64, bool)>,
}

/// Every prediction of a micro-batch: of every token of every window but the first, beside a reference's where there
/// is one. Vocabularies of different sizes are compared over their common part, as if there were no other tokens:
/// padding adds rows that no tokenizer names.
///
/// # Errors
/// Exit code 3 where a prediction is NaN or infinite, and what the logits return.
pub fn predictions(
    text: &Text,
    batch: usize,
    mine: Logits<'_>,
    reference: Option<Logits<'_>>,
) -> Result<Vec<Token>> {
    let (logits, theirs) = (mine(batch)?, reference.map(|of| of(batch)).transpose()?);
    let ids = text.ids_of(batch);
    let vocab = logits.len() / ids.len();
    let their_vocab = theirs.as_ref().map_or(vocab, |theirs| theirs.len() / ids.len());
    let common = vocab.min(their_vocab);
    let scored: Vec<usize> = (0..ids.len()).filter(|i| (i + 1) % text.window != 0).collect();
    let predicted = |i: usize| {
        let mine = &logits[i * vocab..][..vocab];
        let normal = log_sum_exp(mine);
        let against = theirs.as_ref().map(|theirs| {
            let (theirs, mine) = (&theirs[i * their_vocab..][..common], &mine[..common]);
            let normal = if common == vocab { normal } else { log_sum_exp(mine) };
            (divergence(theirs, log_sum_exp(theirs), mine, normal), largest(theirs).0 == largest(mine).0)
        });
        Token { nll: normal - mine[ids[i + 1] as usize] as f64, against }
    };
    let tokens: Vec<Token> = scored.par_iter().map(|&i| predicted(i)).collect();
    let odd = |token: &Token| !token.nll.is_finite() || token.against.is_some_and(|(kl, _)| !kl.is_finite());
    match tokens.iter().position(odd) {
        None => Ok(tokens),
        Some(at) => {
            let window = text.batches[batch].samples.start + scored[at] / text.window;
            let (token, Token { nll, against }) = (scored[at] % text.window + 2, tokens[at]);
            let what = match against {
                Some((kl, _)) if nll.is_finite() => format!("the KL divergence is {kl}"),
                _ => format!("the loss is {nll}"),
            };
            Err(Error::input(format!("{what} at token {token} of window {}", window + 1))
                .fix("check the checkpoint with distq verify: a weight or a scale is NaN or overflows"))
        }
    }
}

/// The scores of all predictions, in the order of the text.
pub fn summary(tokens: &[Token], window: usize) -> Scores {
    let nll: Vec<f64> = tokens.iter().map(|token| token.nll).collect();
    let kl: Vec<f64> = tokens.iter().filter_map(|token| token.against.map(|(kl, _)| kl)).collect();
    let same = tokens.iter().filter(|token| token.against.is_some_and(|(_, same)| same)).count();
    let compared = !kl.is_empty();
    let loss = mean(&nll);
    let mut sorted = kl.clone();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() * 99).div_ceil(100).saturating_sub(1);
    Scores {
        tokens: tokens.len(),
        loss,
        loss_error: standard_error(&nll, window - 1),
        perplexity: loss.exp(),
        mean_kl: compared.then(|| mean(&kl)),
        mean_kl_error: standard_error(&kl, window - 1).filter(|_| compared),
        p99_kl: sorted.get(at).copied(),
        top1: compared.then_some(same as f64 / tokens.len() as f64),
        ..Scores::default()
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// The standard error of the mean, from the means of windows of `of` tokens: within a window tokens depend on each
/// other. None for fewer than two windows.
fn standard_error(x: &[f64], of: usize) -> Option<f64> {
    let means: Vec<f64> = x.chunks_exact(of).map(mean).collect();
    let n = means.len() as f64;
    let middle = mean(&means);
    let squares: f64 = means.iter().map(|m| (m - middle) * (m - middle)).sum();
    (means.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt())
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

    /// Two windows of three tokens; by prediction: the logits of a vocabulary of two.
    fn two_windows() -> Text {
        Text { batches: micro_batches(&[3, 3], 3), ids: vec![0, 1, 1, 1, 0, 1], window: 3 }
    }

    fn scores(text: &Text, mine: Logits<'_>, reference: Option<Logits<'_>>) -> Scores {
        let batches = 0..text.batches.len();
        let tokens: Vec<Token> =
            batches.flat_map(|batch| predictions(text, batch, mine, reference).unwrap()).collect();
        summary(&tokens, text.window)
    }

    #[test]
    fn scores_follow_their_definitions() {
        // Every prediction gives token 1 the odds 3 : 1.
        let text = two_windows();
        let odds = [0.0, 3f32.ln(), 0.0, 3f32.ln(), 0.0, 3f32.ln()];
        let found = scores(&text, &|_| Ok(odds.to_vec()), Some(&|_| Ok(vec![0.0; 6])));
        assert_eq!(found.tokens, 4);
        let nll = [0.75f64, 0.75, 0.25, 0.75].map(|p| -p.ln());
        let loss = nll.iter().sum::<f64>() / 4.0;
        assert!((found.loss - loss).abs() < 1e-6 && (found.perplexity / loss.exp() - 1.0).abs() < 1e-6);
        // The means of the windows lie ln(3) / 2 apart.
        assert!((found.loss_error.unwrap() - 3f64.ln() / 4.0).abs() < 1e-6);
        let kl = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((found.mean_kl.unwrap() - kl).abs() < 1e-6);
        assert!((found.p99_kl.unwrap() - kl).abs() < 1e-6);
        assert!(found.mean_kl_error.unwrap() < 1e-6);
        assert_eq!(found.top1, Some(0.0));
        let alone = scores(&text, &|_| Ok(odds.to_vec()), None);
        assert_eq!((alone.mean_kl, alone.mean_kl_error, alone.top1), (None, None, None));
    }

    #[test]
    fn a_padded_vocabulary_is_compared_over_the_common_part() {
        let text = two_windows();
        let small = [0.5, 3.0, -1.0, 3.0, 0.0, 2.0];
        let padded: Vec<f32> = small.chunks(2).flat_map(|row| [row[0], row[1], 1.0, 7.0]).collect();
        let (small, padded): (Logits<'_>, Logits<'_>) = (&|_| Ok(small.to_vec()), &|_| Ok(padded.clone()));
        for (mine, reference) in [(small, padded), (padded, small)] {
            let found = scores(&text, mine, Some(reference));
            assert!(found.mean_kl.unwrap().abs() < 1e-6 && found.top1 == Some(1.0), "{found:?}");
        }
    }

    #[test]
    fn a_loss_beyond_numbers_is_an_error_and_one_beyond_perplexities_a_result() {
        let text = two_windows();
        for (at, value) in [(2, f32::NAN), (2, f32::INFINITY)] {
            let mut broken = [0.0; 6];
            broken[at] = value;
            let error = predictions(&text, 1, &|_| Ok(broken.to_vec()), None).unwrap_err();
            assert!(error.exit as i32 == 3, "{error}");
            assert!(error.to_string().contains("at token 3 of window 2"), "{error}");
        }
        let sure = [0.0, -3000.0, 0.0, -3000.0, 0.0, 0.0];
        let found = scores(&text, &|_| Ok(sure.to_vec()), None);
        assert_eq!((found.loss, found.perplexity), (2250.0, f64::INFINITY));
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!((&json["perplexity"], json["loss"].as_f64()), (&serde_json::Value::Null, Some(2250.0)));
    }
}
