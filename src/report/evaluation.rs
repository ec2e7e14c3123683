//! `distq eval`: checkpoints side by side.

use std::fmt;

use crate::evaluation::Evaluation;
use crate::units::counted;

/// A number in a column; a dash where it was not measured.
fn column(value: Option<f64>, digits: usize) -> String {
    match value {
        Some(value) if value.is_finite() && value >= 1e7 => format!("{value:.2e}"),
        Some(value) => format!("{value:.digits$}"),
        None => "-".to_string(),
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>10} {:>8} {:>9} {:>8} {:>8} {:>7} {:>8}  checkpoint",
            "perplexity", "±", "mean KL", "±", "p99 KL", "top-1", "time"
        )?;
        for scores in &self.models {
            let reference = self.reference.as_ref() == Some(&scores.model);
            writeln!(
                f,
                "{:>10} {:>8} {:>9} {:>8} {:>8} {:>7} {:>8}  {}{}",
                column(Some(scores.perplexity), 3),
                column(scores.loss_error.map(|error| scores.perplexity * error), 3),
                column(scores.mean_kl, 4),
                column(scores.mean_kl_error, 4),
                column(scores.p99_kl, 3),
                column(scores.top1, 4),
                crate::units::duration(scores.seconds),
                scores.model,
                if reference { " (reference)" } else { "" },
            )?;
        }
        for scores in &self.models {
            if scores.perplexity.is_infinite() {
                writeln!(f, "{}: the mean loss is {:.1} nats", scores.model, scores.loss)?;
            }
            for note in &scores.notes {
                writeln!(f, "{}: {note}", scores.model)?;
            }
        }
        let (windows, tokens, compute) =
            (counted(self.windows, "window", "windows"), self.window_tokens, self.compute);
        write!(
            f,
            "{windows} of {tokens} tokens of {}, computed in {compute}; all but a window's first token are scored; \
             ± is the standard error over windows",
            self.text
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Compute;
    use crate::evaluation::Scores;

    #[test]
    fn the_table_shows_what_was_measured_and_nothing_else() {
        let reference =
            Scores { model: "a".into(), perplexity: 20.0, loss_error: Some(0.01), ..Scores::default() };
        let broken = Scores {
            model: "b".into(),
            loss: 2250.0,
            perplexity: f64::INFINITY,
            mean_kl: Some(3.5),
            notes: vec!["a note".into()],
            ..Scores::default()
        };
        let evaluation = Evaluation {
            text: "t".into(),
            compute: Compute::F32,
            windows: 1,
            window_tokens: 8,
            reference: Some("a".into()),
            models: vec![reference, broken],
        };
        let text = evaluation.to_string();
        assert!(text.contains("    20.000    0.200         -") && text.contains("a (reference)"), "{text}");
        assert!(text.contains("       inf        -    3.5000"), "{text}");
        assert!(text.contains("b: the mean loss is 2250.0 nats\nb: a note\n1 window of"), "{text}");
    }
}
