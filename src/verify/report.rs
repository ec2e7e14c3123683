//! What verification found. `--json` prints a [`Report`]; its field names are stable.

use std::fmt;

use super::description::Description;
use crate::units::counted;

/// How a rule was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// The checkpoint has nothing that the rule is about.
    NotApplicable,
    /// An earlier failure keeps it from being judged.
    NotJudged,
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
    /// Rules that had something to judge, and were judged.
    pub judged: usize,
    /// Rules that were met.
    pub passed: usize,
    /// Rules with warnings only.
    pub warnings: usize,
    /// Broken rules.
    pub errors: usize,
    /// Mean of the tensors' relative errors, where a source was given.
    pub mean_relative_error: Option<f64>,
    /// The largest relative error, where a source was given.
    pub max_relative_error: Option<f64>,
}

/// The whole outcome.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
    /// What the checkpoint says of itself.
    #[serde(flatten)]
    pub description: Description,
    /// The outcome in a few numbers.
    pub summary: Summary,
    /// Every rule, in order.
    pub rules: Vec<RuleResult>,
    /// Every quantized linear, where a source was given.
    pub tensors: Vec<TensorError>,
}

impl Report {
    pub(super) fn new(description: Description, rules: Vec<RuleResult>, tensors: Vec<TensorError>) -> Report {
        let count = |level| rules.iter().filter(|rule| rule.level == level).count();
        let errors = tensors.iter().map(|tensor| tensor.relative_error);
        let (passed, warnings, broken) = (count(Level::Pass), count(Level::Warning), count(Level::Error));
        let summary = Summary {
            judged: passed + warnings + broken,
            passed,
            warnings,
            errors: broken,
            mean_relative_error: (!tensors.is_empty())
                .then(|| errors.clone().sum::<f64>() / tensors.len() as f64),
            // NaN is the largest.
            max_relative_error: errors.max_by(f64::total_cmp),
        };
        Report { description, summary, rules, tensors }
    }

    /// Whether no rule is broken.
    pub fn passed(&self) -> bool {
        self.summary.errors == 0
    }

    /// What to do where a rule is broken, which depends on whose work the checkpoint is.
    pub fn advice(&self) -> String {
        let again = match &self.description.producer {
            Some(producer) if producer.starts_with("distq") => {
                "quantize again with distq quantize".to_string()
            }
            Some(producer) => format!("export it again with the program that wrote it ({producer})"),
            None => "make it again with the program that wrote it".to_string(),
        };
        format!("do not serve this directory; copy it again from where it was made, or {again}")
    }

    /// The names of the broken rules.
    pub fn failed_rules(&self) -> Vec<&'static str> {
        self.rules.iter().filter(|rule| rule.level == Level::Error).map(|rule| rule.id).collect()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { judged, passed, warnings, errors, .. } = self;
        write!(f, "{}: {passed} met", counted(*judged, "rule judged", "rules judged"))?;
        if *warnings > 0 {
            write!(f, ", {}", counted(*warnings, "with a warning", "with warnings"))?;
        }
        if *errors > 0 {
            write!(f, ", {errors} broken")?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.description)?;
        let names = |level: Level| {
            let rules = self.rules.iter().filter(|rule| rule.level == level).map(|rule| rule.id);
            rules.collect::<Vec<_>>().join(", ")
        };
        for rule in &self.rules {
            let level = match rule.level {
                Level::NotApplicable | Level::NotJudged => continue,
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
        if let (Some(mean), Some(max)) = (self.summary.mean_relative_error, self.summary.max_relative_error) {
            let tensors = counted(self.tensors.len(), "weight", "weights");
            writeln!(f, "relative error of {tensors}: mean {mean:.4}, largest {max:.4}")?;
        }
        for (level, what) in [
            (Level::NotApplicable, "nothing to judge"),
            (Level::NotJudged, "not judged because of what is broken"),
        ] {
            let names = names(level);
            if !names.is_empty() {
                writeln!(f, "{what}: {names}")?;
            }
        }
        write!(f, "{}", self.summary)
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layout {
            Some(layout) => write!(f, "layout {layout}")?,
            None => write!(f, "unknown layout")?,
        }
        write!(f, ", {}", self.scheme.as_deref().unwrap_or("no linear quantized"))?;
        if let Some(method) = &self.method {
            write!(f, ", method {method}")?;
        }
        if let Some(kv_cache) = &self.kv_cache {
            write!(f, ", KV cache {kv_cache}")?;
        }
        match &self.producer {
            Some(producer) => write!(f, ", written by {producer}"),
            None => Ok(()),
        }
    }
}
