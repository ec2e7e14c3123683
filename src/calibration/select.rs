//! Which documents are used, and how much of each.

use std::collections::BTreeMap;
use std::path::Path;

use super::documents::{Document, Source};
use super::template::TODAY;
use super::tokenize::Tokenize;
use crate::error::{Error, Result};

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
    /// Documents looked at.
    pub read: usize,
    /// Documents that were too short.
    pub skipped: usize,
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

impl Calibration {
    /// Reads, tokenizes and selects documents for the checkpoint in `model`, whose vocabulary has `vocab`
    /// entries.
    ///
    /// # Errors
    /// Exit code 3: unreadable data, no tokenizer, no document long enough, an id beyond the vocabulary.
    pub fn load(options: &CalibOptions, model: &Path, vocab: usize) -> Result<Calibration> {
        let mut chosen = Calibration::default();
        let mut tokenize = Tokenize::new(model);
        let mut longest_seen = 0;
        for (position, document) in ordered(options)? {
            if chosen.lengths.len() == options.samples {
                break;
            }
            chosen.summary.read += 1;
            let mut ids = tokenize.ids(document?)?;
            longest_seen = longest_seen.max(ids.len());
            if ids.len() < options.min_tokens || ids.is_empty() {
                chosen.summary.skipped += 1;
                continue;
            }
            if ids.len() > options.max_tokens {
                ids.truncate(options.max_tokens);
                chosen.summary.truncated += 1;
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
                let what = format!("document {} has token id {id}, the vocabulary has {vocab}", position + 1);
                return Err(error(options, what).fix("use the tokenizer that belongs to the checkpoint"));
            }
            chosen.summary.documents.push(position);
            chosen.lengths.push(ids.len());
            chosen.ids.extend(ids);
        }
        if chosen.lengths.is_empty() {
            let what = match chosen.summary.read {
                0 => "there is no document".to_string(),
                read => format!(
                    "of {read} documents the longest has {longest_seen} tokens, {} are needed",
                    options.min_tokens
                ),
            };
            return Err(error(options, what).fix("give more text, or lower --calib-min-tokens"));
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
        if summary.samples < options.samples {
            summary.warnings.push(format!(
                "{} of {} calibration documents found: {} are shorter than {} tokens",
                summary.samples, options.samples, summary.skipped, options.min_tokens
            ));
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

fn error(options: &CalibOptions, what: String) -> Error {
    Error::input(format!("calibration data ({}): {what}", options.source))
}

type Numbered = Box<dyn Iterator<Item = (usize, Result<Document>)>>;

/// Documents with their positions: in the source's order, read as needed, or all of them shuffled.
fn ordered(options: &CalibOptions) -> Result<Numbered> {
    let documents = options.source.documents()?;
    if options.seed == 0 {
        return Ok(Box::new(documents.enumerate()));
    }
    // Sorting by a hash of (seed, position) is a shuffle that depends on nothing else.
    let mut state = BTreeMap::new();
    for (position, document) in documents.enumerate() {
        state.insert((splitmix(options.seed ^ splitmix(position as u64)), position), document);
    }
    Ok(Box::new(state.into_iter().map(|((_, position), document)| (position, document))))
}

/// One step of SplitMix64 (Steele, Lea and Flood, 2014).
fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
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
            ("{\"input_ids\": [1, 10]}", vec!["token id 10", "document 1"]),
            ("{\"text\": \"abc\"}", vec!["tokenizer.json", "input_ids"]),
        ] {
            let error = load(lines, |_| {}).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
