//! The outcome of an evaluation.

use crate::backend::Compute;

/// The outcome. `--json` prints it; its field names are stable.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// The file of text.
    pub text: String,
    /// The dtype of activations.
    pub compute: Compute,
    /// Windows that were read.
    pub windows: usize,
    /// Tokens of a window.
    pub window_tokens: usize,
    /// The checkpoint that others are compared with.
    pub reference: Option<String>,
    /// By checkpoint: the reference first, then in the order of the command line, each directory once.
    pub models: Vec<Scores>,
}

/// One checkpoint's scores. Numbers that are infinite are null in JSON.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Scores {
    /// Its directory.
    pub model: String,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Mean negative log-likelihood, in nats.
    pub loss: f64,
    /// Its standard error, over windows; absent for a single window.
    pub loss_error: Option<f64>,
    /// `exp` of the loss; infinite where that is beyond 709 nats.
    pub perplexity: f64,
    /// Mean over tokens of KL(reference ‖ this), in nats.
    pub mean_kl: Option<f64>,
    /// Its standard error, over windows.
    pub mean_kl_error: Option<f64>,
    /// The 99th percentile of the KL divergence.
    pub p99_kl: Option<f64>,
    /// Share of tokens where both prefer the same next token.
    pub top1: Option<f64>,
    /// What of the checkpoint has no part in the scores.
    pub notes: Vec<String>,
    /// Wall time.
    pub seconds: f64,
}
