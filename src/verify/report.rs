//! What verification found. `--json` prints a [`Report`]; its field names are stable.

use std::fmt;

use crate::checkpoint::Layout;

/// How a rule was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// The rule does not concern this output, or an earlier failure keeps it from being judged.
    NotApplicable,
    /// Met.
    Pass,
    /// Legal, but worth a look.
    Warning,
    /// Broken: a loader would fail, or worse, would not.
    Error,
}

/// One rule's outcome.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct RuleResult {
    /// The rule's name, such as `A13`.
    pub id: &'static str,
    /// What it asks for.
    pub title: &'static str,
    /// How it was met.
    pub level: Level,
    /// How often it was not met.
    pub count: usize,
    /// The first offenders: what is wrong and where.
    pub findings: Vec<String>,
}

/// How far a tensor is from its source.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TensorError {
    /// The linear's module name.
    pub module: String,
    /// `‖w − q‖ / ‖w‖`.
    pub relative_error: f64,
    /// The cosine between source and dequantized weight.
    pub cosine: f64,
    /// Block scales by their exponent, from 2^-6 and less to 2^8.
    pub block_scales: Vec<u64>,
}

/// The outcome in a few numbers.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Rules that were met.
    pub passed: usize,
    /// Rules with warnings only.
    pub warnings: usize,
    /// Broken rules.
    pub errors: usize,
    /// Mean of the tensors' relative errors, where a source was given.
    pub mean_relative_error: Option<f64>,
    /// The largest relative error; 0 without a source.
    pub max_relative_error: f64,
}

/// The whole outcome.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
    /// The layout that config.json declares, where it could be read.
    pub layout: Option<Layout>,
    /// The outcome in a few numbers.
    pub summary: Summary,
    /// Every rule, in order.
    pub rules: Vec<RuleResult>,
    /// Every quantized linear, where a source was given.
    pub tensors: Vec<TensorError>,
}

impl Report {
    pub(super) fn new(layout: Option<Layout>, rules: Vec<RuleResult>, tensors: Vec<TensorError>) -> Report {
        let count = |level| rules.iter().filter(|rule| rule.level == level).count();
        let errors = tensors.iter().map(|tensor| tensor.relative_error);
        let summary = Summary {
            passed: count(Level::Pass),
            warnings: count(Level::Warning),
            errors: count(Level::Error),
            mean_relative_error: (!tensors.is_empty())
                .then(|| errors.clone().sum::<f64>() / tensors.len() as f64),
            max_relative_error: errors.fold(0.0, f64::max),
        };
        Report { layout, summary, rules, tensors }
    }

    /// Whether no rule is broken.
    pub fn passed(&self) -> bool {
        self.summary.errors == 0
    }

    /// The names of the broken rules.
    pub fn failed_rules(&self) -> Vec<&'static str> {
        self.rules.iter().filter(|rule| rule.level == Level::Error).map(|rule| rule.id).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for rule in &self.rules {
            let level = match rule.level {
                Level::NotApplicable => "-",
                Level::Pass => "pass",
                Level::Warning => "WARN",
                Level::Error => "FAIL",
            };
            writeln!(f, "{:<4} {level:<5} {}", rule.id, rule.title)?;
            for finding in &rule.findings {
                writeln!(f, "           {finding}")?;
            }
            if rule.count > rule.findings.len() {
                writeln!(f, "           and {} more", rule.count - rule.findings.len())?;
            }
        }
        if let Some(mean) = self.summary.mean_relative_error {
            let (tensors, max) = (self.tensors.len(), self.summary.max_relative_error);
            writeln!(f, "relative error of {tensors} weights: mean {mean:.4}, largest {max:.4}")?;
        }
        let Summary { passed, warnings, errors, .. } = self.summary;
        write!(f, "{passed} rules met, {warnings} with warnings, {errors} broken")
    }
}
