//! Proof of an output directory: the rules that loaders rely on, and the distance to the source.
//!
//! Everything is read again from disk; nothing that the writer believed is taken over. The rules are named
//! as users find them in the report: A1 to A19 (compressed-tensors, most of them shared), B1 to B8
//! (ModelOpt), S1 to S4 (against the source).

mod description;
mod digests;
mod report;
mod rules;
mod scan;
mod subject;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use description::{Description, describe};
pub use report::{Level, Report, RuleResult, Summary, TensorError};

use crate::checkpoint::Layout;
use crate::error::Result;
use subject::Subject;

/// Findings of one rule.
#[derive(Debug, Default)]
struct Findings {
    level: Option<Level>,
    texts: Vec<String>,
}

impl Findings {
    fn error(&mut self, text: impl Into<String>) {
        self.level = Some(Level::Error);
        self.texts.push(text.into());
    }

    fn warn(&mut self, text: impl Into<String>) {
        self.level = self.level.max(Some(Level::Warning));
        self.texts.push(text.into());
    }
}

/// A rule: its name, what it asks for, what it needs to be judged, whether there is anything to judge, and the check.
struct Rule {
    id: &'static str,
    title: &'static str,
    concerns: Concerns,
    /// Whether the checkpoint has what the rule is about. Asked only where the rule can be judged; a rule about
    /// something that is not there does not apply, and is not met either.
    about: fn(&Subject) -> bool,
    check: fn(&Subject, &mut Findings),
}

/// For rules that have something to judge in every checkpoint.
fn any(_: &Subject) -> bool {
    true
}

/// When a rule is judged.
#[derive(Clone, Copy, PartialEq)]
enum Concerns {
    /// Always.
    Directory,
    /// The configuration is readable and declares this layout.
    Config(Option<Layout>),
    /// The configuration is sound, every file is intact, and the layout is this one.
    Tensors(Option<Layout>),
    /// As before, and every linear has its tensors in the right dtype and shape.
    Values(Option<Layout>),
    /// As before, and a source is given.
    Source,
}

/// How many findings of a rule are listed.
const LISTED: usize = 5;

/// Verifies `dir`, against the checkpoint in `source` where one is given.
///
/// # Errors
/// Exit code 3 where there is no quantized checkpoint in `dir`, or `source` can't be opened; 5 where the source can't
/// be read. What is wrong with `dir` is in the report.
pub fn verify(dir: &Path, source: Option<&Path>) -> Result<Report> {
    Proof::begin(dir, source)?.finish()
}

/// A verification under way: layers whose bytes are all there can be read while others are still being made.
pub struct Proof {
    subject: Subject,
}

impl Proof {
    /// Opens the directory, whose files, headers and descriptions must be there, and the source.
    ///
    /// # Errors
    /// Exit code 3 where `dir` holds no quantized checkpoint, or `source` can't be opened.
    pub fn begin(dir: &Path, source: Option<&Path>) -> Result<Proof> {
        Ok(Proof { subject: Subject::open(dir, source)? })
    }

    /// Reads a layer that is finished.
    pub fn layer(&mut self, layer: usize) {
        self.subject.scan_layer(layer);
    }

    /// Reads what has not been read, and judges every rule.
    ///
    /// # Errors
    /// Exit code 5 where the source can't be read.
    pub fn finish(self) -> Result<Report> {
        let mut subject = self.subject;
        let mut results = vec![];
        for stage in [rules::files::RULES, rules::config::RULES, rules::tensors::RULES] {
            judge(&subject, stage, &mut results);
        }
        if sound(&results, &["A3", "A4", "A5", "A10", "B3"]) && readable(&subject, &results) {
            subject.scan();
        }
        for stage in [rules::scales::RULES, rules::source::RULES, digests::RULES] {
            judge(&subject, stage, &mut results);
        }
        if let Some(error) = subject.source.as_ref().and_then(|source| source.trouble()) {
            // A source that can't be read proves nothing against the output.
            return Err(error.clone());
        }
        results.sort_by_key(|rule: &RuleResult| (rule.id.as_bytes()[0], rule.id[1..].parse().unwrap_or(0u8)));
        Ok(Report::new(Description::of(&subject), results, subject.errors()))
    }
}

fn judge(subject: &Subject, rules: &[Rule], results: &mut Vec<RuleResult>) {
    for rule in rules {
        let mut findings = Findings::default();
        let (concerned, possible) = match rule.concerns {
            Concerns::Directory => (true, true),
            Concerns::Config(layout) => (subject.has_layout(layout), subject.config.is_ok()),
            Concerns::Tensors(layout) => (subject.has_layout(layout), readable(subject, results)),
            Concerns::Values(layout) => (subject.has_layout(layout), subject.scanned),
            Concerns::Source => (subject.source.is_some(), subject.scanned),
        };
        let level = if !concerned {
            Level::NotApplicable
        } else if !possible {
            Level::NotJudged
        } else if !(rule.about)(subject) {
            Level::NotApplicable
        } else {
            (rule.check)(subject, &mut findings);
            findings.level.unwrap_or(Level::Pass)
        };
        results.push(RuleResult {
            id: rule.id,
            title: rule.title,
            level,
            count: findings.texts.len(),
            findings: findings.texts.into_iter().take(LISTED).collect(),
        });
    }
}

/// Whether headers and configuration are good enough to look at tensors.
fn readable(subject: &Subject, results: &[RuleResult]) -> bool {
    subject.config.is_ok()
        && subject.model.is_ok()
        && subject.layout.is_some()
        && sound(results, &["A1", "A2", "A13", "B1"])
}

fn sound(results: &[RuleResult], ids: &[&str]) -> bool {
    !results.iter().any(|rule| ids.contains(&rule.id) && rule.level == Level::Error)
}
