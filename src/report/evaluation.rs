//! `distq eval`: checkpoints side by side.

use std::fmt;

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
    /// By checkpoint: the reference first, then in the order of the command line.
    pub models: Vec<Scores>,
}

/// One checkpoint's scores.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Scores {
    /// Its directory.
    pub model: String,
    /// Tokens that were scored.
    pub tokens: usize,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean over tokens of KL(reference ‖ this), in nats.
    pub mean_kl: Option<f64>,
    /// The 99th percentile of the same.
    pub p99_kl: Option<f64>,
    /// Share of tokens where both prefer the same next token.
    pub top1: Option<f64>,
    /// Wall time.
    pub seconds: f64,
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>10} {:>9} {:>9} {:>7} {:>8}  checkpoint",
            "perplexity", "mean KL", "p99 KL", "top-1", "time"
        )?;
        for scores in &self.models {
            let number = |value: Option<f64>, digits: usize| match value {
                Some(value) => format!("{value:.digits$}"),
                None => "-".to_string(),
            };
            writeln!(
                f,
                "{:>10.3} {:>9} {:>9} {:>7} {:>8}  {}",
                scores.perplexity,
                number(scores.mean_kl, 4),
                number(scores.p99_kl, 3),
                number(scores.top1, 4),
                crate::units::duration(scores.seconds),
                scores.model
            )?;
        }
        let (windows, tokens, compute) = (self.windows, self.window_tokens, self.compute);
        write!(
            f,
            "{windows} windows of {tokens} tokens of {}, computed in {compute}; all but a window's first token are \
             scored",
            self.text
        )
    }
}
