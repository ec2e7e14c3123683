//! The journal of a run: what it was asked to do, and every part that is finished.
//!
//! One JSON object a line, appended by rank 0 only, in `OUT.partial/`. The first line is the run's
//! [`Fingerprint`]; each further line is a finished [`PartRecord`], or what a layer has [`Observed`] so far. A line
//! that a crash cut short is ignored, so what it says is simply done again.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::methods::Smoothing;
use crate::methods::layer::Verdict;
use crate::model::Site;

/// The journal's file name inside `OUT.partial/`.
pub const JOURNAL: &str = "distq-journal.jsonl";

/// Everything that the output's bytes depend on. Two runs with equal fingerprints write the same files.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint {
    /// distq's version.
    pub version: String,
    /// Digest of the source's configuration and headers.
    pub model: String,
    /// Digest of the calibration tokens; empty where none are needed.
    pub data: String,
    /// Layout, scheme, method, ignored modules and shard size, as text.
    pub options: String,
}

impl Fingerprint {
    /// What differs between this fingerprint and the one in the journal, in words.
    fn difference(&self, journal: &Fingerprint) -> Option<String> {
        let pairs = [
            ("the version of distq", &self.version, &journal.version),
            ("the model", &self.model, &journal.model),
            ("the calibration data", &self.data, &journal.data),
            ("the options", &self.options, &journal.options),
        ];
        pairs
            .into_iter()
            .find(|(_, now, then)| now != then)
            .map(|(what, now, then)| format!("{what} differs: now {now:?}, then {then:?}"))
    }
}

/// A part of the model: what the journal and the report call its pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartId {
    /// The embedding.
    Head,
    /// A decoder layer.
    Layer(usize),
    /// The final norm and lm_head.
    Tail,
}

/// A finished part: all its tensors are at their places.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PartRecord {
    /// Which part.
    pub part: PartId,
    /// blake3 of the blake3 digests of its output tensors, in the inventory's order.
    pub digest: String,
    /// What was measured of its fused groups.
    pub groups: Vec<GroupRecord>,
}

/// blake3 of a tensor's bytes.
pub fn digest(bytes: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update_rayon(bytes).finalize()
}

/// blake3 of the digests of a part's output tensors, in the inventory's order, as hexadecimal digits.
pub fn part_digest(tensors: impl IntoIterator<Item = blake3::Hash>) -> String {
    let mut whole = blake3::Hasher::new();
    tensors.into_iter().for_each(|tensor| {
        whole.update(tensor.as_bytes());
    });
    whole.finalize().to_hex().to_string()
}

/// What was measured of one fused group.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GroupRecord {
    /// Where in the layer.
    pub site: Site,
    /// `max |x|` of the input over all calibration tokens; absent where none was needed.
    pub input_amax: Option<f32>,
    /// Module names and their `max |w|`.
    pub members: Vec<(String, f32)>,
    /// What a method other than max chose, and how good it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
}

/// What was chosen for one fused group.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Chosen {
    /// Its fold.
    pub smoothing: Option<Smoothing>,
    /// How many times the largest input its scale has room for.
    pub headroom: f32,
    /// The damping of its Hessian.
    pub damping: Option<f32>,
    /// Why codes were chosen otherwise than asked for.
    pub fallback: Option<String>,
    /// By member.
    pub verdicts: Vec<Verdict>,
}

/// The running maxima of an unfinished layer's inputs. They don't depend on how documents were grouped.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Observed {
    /// The decoder layer.
    pub layer: usize,
    /// So many documents have passed, from the first on.
    pub documents: usize,
    /// `max |x|` by site.
    pub maxima: [f32; 4],
}

/// What an interrupted run had done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Finished parts.
    pub records: Vec<PartRecord>,
    /// The newest maxima of each layer that has any.
    pub observed: Vec<Observed>,
}

impl History {
    /// Takes a line; whether it could be read.
    fn take(&mut self, line: &str) -> bool {
        if let Ok(record) = serde_json::from_str(line) {
            self.records.push(record);
        } else if let Ok(observed) = serde_json::from_str::<Observed>(line) {
            let known = self.observed.iter_mut().find(|known| known.layer == observed.layer);
            match known {
                Some(known) if known.documents <= observed.documents => *known = observed,
                Some(_) => {}
                None => self.observed.push(observed),
            }
        } else {
            return false;
        }
        true
    }
}

/// The open journal.
pub struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// Starts a journal in `dir`.
    pub fn create(dir: &Path, fingerprint: &Fingerprint) -> Result<Journal> {
        let path = dir.join(JOURNAL);
        let file = File::create(&path).map_err(|e| failed("can't create the journal", &path, e))?;
        let mut journal = Journal { file, path };
        journal.line(fingerprint)?;
        Ok(journal)
    }

    /// Opens the journal of an interrupted run and returns what it finished.
    ///
    /// # Errors
    /// Exit code 2 where the journal belongs to another model, other data or other options.
    pub fn resume(dir: &Path, fingerprint: &Fingerprint) -> Result<(Journal, History)> {
        let path = dir.join(JOURNAL);
        let text = std::fs::read_to_string(&path).map_err(|e| failed("can't read the journal", &path, e))?;
        let mut lines = text.split_inclusive('\n').take_while(|line| line.ends_with('\n'));
        let first = lines.next().and_then(|line| serde_json::from_str::<Fingerprint>(line).ok());
        let Some(journal_of) = first else {
            return Err(Error::usage("the journal has no readable first line")
                .file(&path)
                .fix("start again with --overwrite"));
        };
        if let Some(difference) = fingerprint.difference(&journal_of) {
            return Err(Error::usage(format!("can't resume: {difference}"))
                .file(&path)
                .fix("repeat the run with what it was started with, or start again with --overwrite"));
        }
        let mut history = History::default();
        lines.take_while(|line| history.take(line)).for_each(drop);
        // Rewritten rather than appended to: a line that was cut short must not swallow the next one.
        let mut journal = Journal::create(dir, fingerprint)?;
        for record in &history.records {
            journal.line(record)?;
        }
        for observed in &history.observed {
            journal.line(observed)?;
        }
        Ok((journal, history))
    }

    /// Records a finished part.
    pub fn finished(&mut self, record: &PartRecord) -> Result<()> {
        self.line(record)
    }

    /// Records what a layer has seen.
    pub fn observed(&mut self, observed: &Observed) -> Result<()> {
        self.line(observed)
    }

    fn line(&mut self, value: &impl serde::Serialize) -> Result<()> {
        let mut line = serde_json::to_string(value).expect("records are plain data");
        line.push('\n');
        // One write a line: a crash leaves a prefix of it, never two lines mixed.
        self.file.write_all(line.as_bytes()).map_err(|e| failed("can't write the journal", &self.path, e))
    }
}

fn failed(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::run(format!("{what}: {error}"))
        .file(path)
        .fix("check the disk and the permissions, then use --resume")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint() -> Fingerprint {
        Fingerprint { version: "1".into(), model: "m".into(), data: "d".into(), options: "o".into() }
    }

    fn record(layer: usize) -> PartRecord {
        PartRecord {
            part: PartId::Layer(layer),
            digest: format!("digest{layer}"),
            groups: vec![GroupRecord {
                site: Site::Qkv,
                input_amax: Some(0.1),
                members: vec![("q".into(), f32::MIN_POSITIVE)],
                chosen: None,
            }],
        }
    }

    #[test]
    fn finished_parts_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), &fingerprint()).unwrap();
        journal.finished(&record(3)).unwrap();
        journal.finished(&record(0)).unwrap();
        let (_, history) = Journal::resume(dir.path(), &fingerprint()).unwrap();
        assert_eq!(history.records, [record(3), record(0)]);
    }

    #[test]
    fn of_what_a_layer_has_seen_the_most_comes_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), &fingerprint()).unwrap();
        let seen = |layer, documents| {
            let maxima = [0.1f32, 1.0 / 3.0, f32::MIN_POSITIVE, f32::MAX].map(|x| x * 0.999);
            Observed { layer, documents, maxima }
        };
        for observed in [seen(2, 5), seen(2, 9), seen(4, 5), seen(2, 7)] {
            journal.observed(&observed).unwrap();
            journal.finished(&record(observed.documents)).unwrap();
        }
        for _ in 0..2 {
            let (_, history) = Journal::resume(dir.path(), &fingerprint()).unwrap();
            assert_eq!(history.observed, [seen(2, 9), seen(4, 5)]);
            assert_eq!(history.records.len(), 4);
        }
    }

    #[test]
    fn a_line_cut_short_is_ignored_and_does_not_harm_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(dir.path(), &fingerprint()).unwrap();
        journal.finished(&record(0)).unwrap();
        journal.finished(&record(1)).unwrap();
        let path = dir.path().join(JOURNAL);
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let (mut journal, history) = Journal::resume(dir.path(), &fingerprint()).unwrap();
        assert_eq!(history.records, [record(0)]);
        journal.finished(&record(2)).unwrap();
        assert_eq!(Journal::resume(dir.path(), &fingerprint()).unwrap().1.records, [record(0), record(2)]);
    }

    #[test]
    fn another_run_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        Journal::create(dir.path(), &fingerprint()).unwrap();
        type Change = fn(&mut Fingerprint);
        let changes: [(&str, Change); 4] = [
            ("version", |f| f.version = "2".into()),
            ("model", |f| f.model = "n".into()),
            ("calibration data", |f| f.data = "e".into()),
            ("options", |f| f.options = "p".into()),
        ];
        for (word, change) in changes {
            let mut other = fingerprint();
            change(&mut other);
            let error = Journal::resume(dir.path(), &other).err().unwrap().to_string();
            assert!(error.contains(word) && error.contains("can't resume"), "{error}");
        }
    }
}
