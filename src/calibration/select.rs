//! Which documents are used, and how much of each.

use std::path::Path;

use super::chat::template::TODAY;
use super::documents::{Place, Row, Source};
use super::row::HOLD_A_DOCUMENT;
use super::shuffle::Shuffled;
use super::tokenize::Tokenize;
use crate::confined::{self, Limits};
use crate::error::{Error, Result, printable};

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibOptions {
    /// Where documents come from.
    pub source: Source,
    /// Documents to use.
    pub samples: usize,
    /// Documents with fewer tokens are skipped.
    pub min_tokens: usize,
    /// Documents with more are cut.
    pub max_tokens: usize,
    /// 0 keeps the source's order; any other number shuffles it.
    pub seed: u64,
}

/// The documents used, as token ids.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Calibration {
    /// Tokens of each document.
    pub lengths: Vec<usize>,
    /// The documents' ids, one after another.
    pub ids: Vec<u32>,
    /// What was used, for the report.
    pub summary: Summary,
}

/// What calibration data was used.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// The file, or `builtin`.
    pub source: String,
    /// Documents used.
    pub samples: usize,
    /// Tokens used.
    pub tokens: usize,
    /// Tokens of the shortest document used.
    pub shortest: usize,
    /// Tokens of the longest document used.
    pub longest: usize,
    /// Rows looked at.
    pub read: usize,
    /// Documents that were too short.
    pub skipped: usize,
    /// Rows of which no document could be made.
    pub unusable: usize,
    /// The first of them: where each stands, and why.
    pub unusable_rows: Vec<String>,
    /// Documents that were cut.
    pub truncated: usize,
    /// Positions in the source of the documents used, from 0.
    pub documents: Vec<usize>,
    /// The order's seed.
    pub seed: u64,
    /// blake3 of lengths and ids.
    pub digest: String,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Characters of a reason that are shown at most.
const LONGEST_REASON: usize = 300;

/// Skipped rows that are shown to the user.
const SHOWN: usize = 5;

impl Calibration {
    /// Reads, tokenizes and selects documents for the checkpoint in `model`, whose vocabulary has `vocab`
    /// entries. Rows that hold no document are skipped and counted.
    ///
    /// # Errors
    /// Exit code 3: unreadable data, no tokenizer, no document long enough, no row with a document.
    pub fn load(options: &CalibOptions, model: &Path, vocab: usize) -> Result<Calibration> {
        let (options, model) = (options.clone(), model.to_path_buf());
        confined::run(Limits::USUAL, move || Calibration::select(&options, &model, vocab))
    }

    fn select(options: &CalibOptions, model: &Path, vocab: usize) -> Result<Calibration> {
        let mut chosen = Calibration::default();
        let mut tokenize = Tokenize::new(model);
        let mut longest_seen = 0;
        let mut rows = ordered(options)?;
        while chosen.lengths.len() < options.samples {
            let Some(row) = rows.next() else { break };
            let (position, Row { place, document }) = row?;
            chosen.summary.read += 1;
            let ids = match document {
                Ok(document) => tokenize.ids(document, options.max_tokens)?,
                Err(reason) => Err(reason),
            };
            let mut ids = match ids.and_then(|ids| within(ids, options.max_tokens, vocab)) {
                Ok(ids) => ids,
                Err(reason) => {
                    chosen.summary.leave_out(place, &reason);
                    continue;
                }
            };
            longest_seen = longest_seen.max(ids.len());
            if ids.len() < options.min_tokens || ids.is_empty() {
                chosen.summary.skipped += 1;
                continue;
            }
            if ids.len() > options.max_tokens {
                ids.truncate(options.max_tokens);
                chosen.summary.truncated += 1;
            }
            chosen.summary.documents.push(position);
            chosen.lengths.push(ids.len());
            chosen.ids.extend(ids);
        }
        if chosen.lengths.is_empty() {
            return Err(nothing(options, &chosen.summary, longest_seen));
        }
        chosen.summarize(options, &tokenize);
        Ok(chosen)
    }

    fn summarize(&mut self, options: &CalibOptions, tokenize: &Tokenize) {
        let mut digest = blake3::Hasher::new();
        self.lengths.iter().for_each(|length| {
            digest.update(&(*length as u64).to_le_bytes());
        });
        digest.update(bytemuck::cast_slice(&self.ids));
        let summary = &mut self.summary;
        summary.source = options.source.to_string();
        summary.samples = self.lengths.len();
        summary.tokens = self.ids.len();
        summary.shortest = self.lengths.iter().copied().min().unwrap_or(0);
        summary.longest = self.lengths.iter().copied().max().unwrap_or(0);
        summary.seed = options.seed;
        summary.digest = digest.finalize().to_hex().to_string();
        if summary.unusable > 0 {
            summary.warnings.push(format!("calibration data ({}): {}", options.source, summary.left_out()));
        }
        if summary.samples < options.samples {
            let too_short = format!("{} are shorter than {} tokens", summary.skipped, options.min_tokens);
            let unusable = format!("{} hold no document that can be used", summary.unusable);
            let why: Vec<String> = [(summary.skipped, too_short), (summary.unusable, unusable)]
                .into_iter()
                .filter_map(|(count, why)| (count > 0).then_some(why))
                .collect();
            let why = if why.is_empty() { String::new() } else { format!(": {}", why.join(", ")) };
            let warning =
                format!("{} of {} calibration documents found{why}", summary.samples, options.samples);
            summary.warnings.push(warning);
        }
        if tokenize.lacks_template() {
            summary
                .warnings
                .push("the checkpoint has no chat template: messages were joined as plain text".into());
        }
        if tokenize.holds_a_date() {
            summary.warnings.push(format!(
                "the chat template writes the current date: calibration always writes {TODAY}, so that the same \
                 command gives the same bytes on any day"
            ));
        }
    }
}

impl Summary {
    fn leave_out(&mut self, place: Place, reason: &str) {
        self.unusable += 1;
        if self.unusable_rows.len() < SHOWN {
            let reason = printable(reason, LONGEST_REASON);
            self.unusable_rows.push(format!("{place}: {reason}"));
        }
    }

    /// Which rows can't be used, as a sentence.
    fn left_out(&self) -> String {
        let more = self.unusable - self.unusable_rows.len();
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let rows = if self.unusable == 1 {
            "1 row is skipped".into()
        } else {
            format!("{} rows are skipped", self.unusable)
        };
        format!(
            "{rows}, because no document can be made of what is in it: {}{more}",
            self.unusable_rows.join("; ")
        )
    }
}

/// The ids, where the vocabulary has all of those that are used.
fn within(ids: Vec<u32>, used: usize, vocab: usize) -> Result<Vec<u32>, String> {
    match ids.iter().take(used).find(|&&id| id as usize >= vocab) {
        Some(id) => Err(format!("it has token id {id}, the model's vocabulary has {vocab} entries")),
        None => Ok(ids),
    }
}

/// The error where no document is left.
fn nothing(options: &CalibOptions, summary: &Summary, longest_seen: usize) -> Error {
    let too_short = format!(
        "of {} documents the longest has {longest_seen} tokens, {} are needed",
        summary.skipped, options.min_tokens
    );
    let (what, fix) = match (summary.skipped, summary.unusable) {
        (0, 0) => ("there is no document in it".to_string(), "name a file with documents".to_string()),
        (_, 0) => (too_short, "give more text, or lower --calib-min-tokens".into()),
        (0, _) => (
            format!("no row can be used: {}", summary.left_out()),
            format!(
                "use rows with one of {HOLD_A_DOCUMENT}, and the tokenizer that belongs to the checkpoint"
            ),
        ),
        _ => {
            let what = format!("{too_short}; {}", summary.left_out());
            (what, "give more text, or lower --calib-min-tokens".into())
        }
    };
    Error::input(format!("calibration data ({}): {what}", options.source)).fix(fix)
}

type Numbered = Box<dyn Iterator<Item = Result<(usize, Row)>>>;

/// Rows with their positions, in the source's order or shuffled.
fn ordered(options: &CalibOptions) -> Result<Numbered> {
    let rows = options.source.rows()?;
    if options.seed != 0 {
        return Ok(Box::new(Shuffled::new(options)));
    }
    Ok(Box::new(rows.enumerate().map(|(position, row)| Ok((position, row?)))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(lines: &str, change: impl Fn(&mut CalibOptions)) -> Result<Calibration> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, lines).unwrap();
        let mut options =
            CalibOptions { source: Source::File(path), samples: 2, min_tokens: 2, max_tokens: 3, seed: 0 };
        change(&mut options);
        Calibration::load(&options, dir.path(), 10)
    }

    const LINES: &str = "{\"input_ids\": [1]}\n{\"input_ids\": [1,2,3,4]}\n{\"input_ids\": [5,6]}\n{\"input_ids\": [7,8,9]}\n";

    #[test]
    fn short_documents_are_skipped_and_long_ones_cut() {
        let chosen = load(LINES, |_| {}).unwrap();
        assert_eq!((chosen.lengths, chosen.ids), (vec![3, 2], vec![1, 2, 3, 5, 6]));
        let s = chosen.summary;
        assert_eq!((s.read, s.skipped, s.truncated, s.documents), (3, 1, 1, vec![1, 2]));
        assert!(s.warnings.is_empty());
    }

    #[test]
    fn rows_that_hold_no_document_are_skipped_and_shown() {
        let odd = "{\"text\": null}\n{oops\n{\"input_ids\": [1,99]}\n[]\n7\n{\"messages\": []}\n";
        let chosen = load(&format!("{odd}{LINES}"), |_| {}).unwrap();
        assert_eq!(chosen.lengths, [3, 2]);
        let s = chosen.summary;
        assert_eq!((s.read, s.skipped, s.unusable, s.documents), (9, 1, 6, vec![7, 8]));
        assert_eq!(s.unusable_rows.len(), 5);
        let warning = &s.warnings[0];
        for words in [
            "6 rows",
            "line 1: text is null",
            "line 2: not valid JSON",
            "line 3: it has token id 99",
            "1 more",
        ] {
            assert!(warning.contains(words), "{warning}");
        }
    }

    #[test]
    fn an_id_beyond_the_vocabulary_counts_only_where_it_is_used() {
        assert_eq!(load("{\"input_ids\": [1,2,3,99]}", |_| {}).unwrap().ids, [1, 2, 3]);
    }

    #[test]
    fn fewer_documents_than_asked_for_is_a_warning() {
        let chosen = load(LINES, |options| options.samples = 9).unwrap();
        assert_eq!(chosen.lengths.len(), 3);
        assert!(chosen.summary.warnings[0].contains("3 of 9"));
    }

    #[test]
    fn a_seed_shuffles_and_repeats_itself() {
        let all = |seed| load(LINES, |o| (o.samples, o.min_tokens, o.seed) = (4, 1, seed)).unwrap();
        assert_eq!(all(0).summary.documents, [0, 1, 2, 3]);
        assert_eq!(all(7).summary.digest, all(7).summary.digest);
        let mut sorted = all(7).summary.documents;
        sorted.sort();
        assert_eq!(sorted, [0, 1, 2, 3]);
        assert!((1..20).any(|seed| all(seed).summary.documents != [0, 1, 2, 3]));
    }

    #[test]
    fn unusable_data_is_named() {
        for (lines, words) in [
            ("", vec!["no document"]),
            ("{\"input_ids\": [1]}", vec!["longest has 1", "2 are needed"]),
            ("{\"input_ids\": [1, 10]}", vec!["token id 10", "line 1"]),
            ("{\"input_ids\": [1]}\n{\"body\": 1}", vec!["longest has 1", "line 2", "its keys are body"]),
            ("{\"text\": \"abc\"}", vec!["tokenizer.json", "input_ids"]),
        ] {
            let error = load(lines, |_| {}).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
