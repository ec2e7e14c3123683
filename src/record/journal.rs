//! The journal of a run: what it was asked to do, and every part that is finished.
//!
//! One JSON object a line, appended by rank 0 only, in `OUT.partial/`. The first line is the run's
//! [`Fingerprint`]; each further line is a finished [`PartRecord`], or the running maxima of a layer ([`Observed`]).
//! Each ends with a digest of itself and of the line before. With the first line that is not what its digest says (cut
//! short by a crash, damaged, out of place) the history ends, so what it and later lines say is simply done again.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::fingerprint::Fingerprint;
use super::part::{Observed, PartId, PartRecord};
use crate::checkpoint::{JOURNAL, NEW_JOURNAL};
use crate::error::{Error, Result};

/// A line of the journal behind the first one.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A finished part.
    Finished(PartRecord),
    /// The running maxima of a layer.
    Observed(Observed),
}

/// What an interrupted run had done, according to its journal.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The newest record of each finished part.
    pub records: Vec<PartRecord>,
    /// The newest maxima of each layer that has any.
    pub observed: Vec<Observed>,
    /// Whether weights have changed since the run began. Maxima that depend on changed weights are left out.
    pub changed: bool,
}

/// The most bytes of a journal that are read. The journal of a thousand layers is smaller.
const LONGEST: u64 = 256 << 20;

impl History {
    /// Reads the journal of an interrupted run. `forwarded` says whether layers depend on the layers before them, and
    /// `fits` whether a line can be about this model.
    ///
    /// # Errors
    /// Exit code 2 where there is no journal, or where it belongs to another model, other data or other options.
    pub fn read(
        dir: &Path,
        fingerprint: &Fingerprint,
        forwarded: bool,
        fits: &dyn Fn(&Line) -> bool,
    ) -> Result<History> {
        let path = dir.join(JOURNAL);
        let unusable = |what: &str| {
            Error::usage(format!("the run can't be resumed: {what}"))
                .file(&path)
                .fix("start again with --overwrite")
        };
        let bytes = bytes_of(&path)?.ok_or_else(|| unusable("it has no journal"))?;
        let mut seal = String::new();
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n').map_while(|line| {
            let text;
            (text, seal) = unsealed(&seal, line)?;
            Some(text)
        });
        let first = lines.next().and_then(|line| serde_json::from_str::<Fingerprint>(&line).ok());
        let began = first.ok_or_else(|| unusable("its journal has no readable first line"))?;
        if let Some(difference) = fingerprint.difference(&began) {
            return Err(Error::usage(format!("can't resume: {difference}"))
                .file(&path)
                .fix("repeat the run with what it was started with, or start again with --overwrite"));
        }
        let changed = fingerprint.changed(&began);
        let depends = |part: PartId| changed.iter().find(|&&other| part.depends_on(other, forwarded));
        let mut history = History { changed: !changed.is_empty(), ..History::default() };
        for line in lines.map_while(|line| serde_json::from_str(&line).ok()).take_while(|line| fits(line)) {
            match line {
                Line::Finished(record) => {
                    if let Some(other) = depends(record.part) {
                        return Err(Error::usage(format!(
                            "can't resume: the model differs: the weights of {other} are not those with which {} \
                             was finished",
                            record.part
                        ))
                        .file(&path)
                        .fix("repeat the run with what it was started with, or start again with --overwrite"));
                    }
                    history.records.retain(|earlier| earlier.part != record.part);
                    history.records.push(record);
                }
                Line::Observed(observed) if depends(PartId::Layer(observed.layer)).is_some() => {}
                Line::Observed(observed) => {
                    let known = history.observed.iter_mut().find(|known| known.layer == observed.layer);
                    match known {
                        Some(known) if known.documents <= observed.documents => *known = observed,
                        Some(_) => {}
                        None => history.observed.push(observed),
                    }
                }
            }
        }
        Ok(history)
    }
}

/// The bytes of a journal, [`LONGEST`] at most; none where there is no such file.
fn bytes_of(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut bytes = vec![];
    // The name may lead to something else: a directory, or a pipe, which would wait for a writer.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    match opened.and_then(|file| file.take(LONGEST).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("can't read the journal", path, e)),
    }
}

/// The open journal.
pub struct Journal {
    file: File,
    path: PathBuf,
    /// The digest at the end of the last line.
    seal: String,
}

impl Journal {
    /// Starts a journal in `dir`, where there is none.
    ///
    /// # Errors
    /// Exit code 5 where the disk refuses.
    pub fn create(dir: &Path, fingerprint: &Fingerprint) -> Result<Journal> {
        Journal::begin(dir.join(JOURNAL), fingerprint, &History::default())
    }

    /// Continues the journal in `dir`, of which `known` was read and is still true. The new journal is written beside
    /// the old one and replaces it by a rename when it is on the disk, so that there is a complete one at any moment.
    ///
    /// # Errors
    /// Exit code 5 where the disk refuses.
    pub fn resume(dir: &Path, fingerprint: &Fingerprint, known: &History) -> Result<Journal> {
        let (path, new) = (dir.join(JOURNAL), dir.join(NEW_JOURNAL));
        let journal = Journal::begin(new, fingerprint, known)?;
        let renamed = journal.file.sync_all().and_then(|()| std::fs::rename(&journal.path, &path));
        let renamed = renamed.and_then(|()| File::open(dir)?.sync_all());
        renamed.map_err(|e| failed("can't write the journal", &path, e))?;
        Ok(Journal { path, ..journal })
    }

    fn begin(path: PathBuf, fingerprint: &Fingerprint, known: &History) -> Result<Journal> {
        let file = File::create(&path).map_err(|e| failed("can't create the journal", &path, e))?;
        let mut journal = Journal { file, path, seal: String::new() };
        journal.line(fingerprint)?;
        known.records.iter().try_for_each(|record| journal.line(record))?;
        known.observed.iter().try_for_each(|observed| journal.line(observed))?;
        Ok(journal)
    }

    /// Records a finished part.
    pub fn finished(&mut self, record: &PartRecord) -> Result<()> {
        self.line(record)
    }

    /// Records the running maxima of a layer.
    pub fn observed(&mut self, observed: &Observed) -> Result<()> {
        self.line(observed)
    }

    fn line(&mut self, value: &impl serde::Serialize) -> Result<()> {
        let text = serde_json::to_string(value).expect("records are plain data");
        self.seal = seal(&self.seal, &text);
        let line = format!("{}{SEAL}{}\"}}\n", &text[..text.len() - 1], self.seal);
        // One write for each line: a crash can leave a line incomplete, but never mixes two.
        self.file.write_all(line.as_bytes()).map_err(|e| failed("can't write the journal", &self.path, e))
    }
}

/// The text between the fields of a line and its digest.
const SEAL: &str = ",\"seal\":\"";

/// The digest of a line, given that of the line before.
fn seal(before: &str, text: &str) -> String {
    let digest = blake3::Hasher::new().update(before.as_bytes()).update(text.as_bytes()).finalize();
    digest.to_hex()[..32].to_string()
}

/// Splits a line into its text and its digest; none where the digest does not belong to this text after the line
/// before.
fn unsealed(before: &str, line: &[u8]) -> Option<(String, String)> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix("\"}\n")?;
    let (fields, found) = line.rsplit_once(SEAL)?;
    let text = format!("{fields}}}");
    (seal(before, &text) == found).then(|| (text, found.to_string()))
}

fn failed(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::run(format!("{what}: {error}"))
        .file(path)
        .fix("check the disk and the permissions, then use --resume")
}

#[cfg(test)]
mod tests {
    use super::super::part::GroupRecord;
    use super::*;

    fn fingerprint() -> Fingerprint {
        let weights = ["head", "0", "1", "2", "tail"].map(String::from).to_vec();
        Fingerprint { version: "1".into(), model: "m".into(), weights, data: "d".into(), options: "o".into() }
    }

    fn record(layer: usize) -> PartRecord {
        PartRecord {
            part: PartId::Layer(layer),
            digests: vec![format!("digest{layer}")],
            groups: vec![GroupRecord {
                site: "qkv".into(),
                input_amax: Some(0.1),
                members: vec![("q".into(), f32::MIN_POSITIVE)],
                chosen: None,
            }],
        }
    }

    fn seen(layer: usize, documents: usize) -> Observed {
        let maxima = [0.1f32, 1.0 / 3.0, f32::MIN_POSITIVE, f32::MAX].map(|x| x * 0.999).to_vec();
        Observed { layer, documents, maxima }
    }

    fn begin(dir: &Path) -> Journal {
        Journal::create(dir, &fingerprint()).unwrap()
    }

    fn read(dir: &Path) -> History {
        History::read(dir, &fingerprint(), true, &|_| true).unwrap()
    }

    #[test]
    fn finished_parts_come_back_once_as_they_were_finished_last() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = begin(dir.path());
        let first = PartRecord { digests: vec!["torn".into()], ..record(3) };
        for record in [&first, &record(0), &record(3)] {
            journal.finished(record).unwrap();
        }
        assert_eq!(read(dir.path()).records, [record(0), record(3)]);
    }

    #[test]
    fn of_what_a_layer_has_seen_the_most_comes_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = begin(dir.path());
        for (layer, observed) in [seen(2, 5), seen(2, 9), seen(4, 5), seen(2, 7)].iter().enumerate() {
            journal.observed(observed).unwrap();
            journal.finished(&record(layer)).unwrap();
        }
        for _ in 0..2 {
            let history = read(dir.path());
            assert_eq!(history.observed, [seen(2, 9), seen(4, 5)]);
            assert_eq!(history.records.len(), 4);
            Journal::resume(dir.path(), &fingerprint(), &history).unwrap();
        }
    }

    /// Whatever happens to a journal's bytes: a history is a beginning of what was written.
    #[test]
    fn with_the_first_line_that_is_not_as_it_was_written_the_history_ends() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = begin(dir.path());
        (0..3).for_each(|layer| journal.finished(&record(layer)).unwrap());
        let path = dir.path().join(JOURNAL);
        let whole = std::fs::read(&path).unwrap();
        let mut lines: Vec<&[u8]> = whole.split_inclusive(|&byte| byte == b'\n').collect();
        let left = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read(dir.path()).records.len()
        };
        assert_eq!(left(&whole), 3);
        assert_eq!(left(&whole[..whole.len() - 1]), 2, "cut short");
        assert_eq!(left(&[&whole, &b"\xff\xfe{\"part\""[..]].concat()), 3, "not UTF-8");
        let unknown = b"{\"part\":{\"layer\":99},\"digests\":[],\"groups\":[]}\n";
        assert_eq!(left(&[&whole, &unknown[..]].concat()), 3, "a line of somebody else's");
        let (first, third) = (lines[0].len(), whole.len() - lines[3].len());
        for at in (first..whole.len()).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(left(&damaged) < 3, "byte {at}");
        }
        let mut torn = whole.clone();
        torn[first + 20..third].fill(0);
        assert_eq!(left(&torn), 0, "a block of zeros");
        lines.swap(1, 2);
        assert_eq!(left(&lines.concat()), 0, "lines in another order");
        lines.swap(1, 2);
        lines.remove(2);
        assert_eq!(left(&lines.concat()), 1, "a line left out");
        assert_eq!(left(&[&whole, lines[1]].concat()), 3, "a line twice");
        // What is written behind a line that was cut short is read again.
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let mut journal = Journal::resume(dir.path(), &fingerprint(), &read(dir.path())).unwrap();
        journal.finished(&record(2)).unwrap();
        assert_eq!(read(dir.path()).records.len(), 3);
    }

    #[test]
    fn lines_about_another_model_end_the_history() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = begin(dir.path());
        [0, 99, 1].iter().for_each(|&layer| journal.finished(&record(layer)).unwrap());
        let fits = |line: &Line| matches!(line, Line::Finished(record) if record.part != PartId::Layer(99));
        assert_eq!(History::read(dir.path(), &fingerprint(), true, &fits).unwrap().records, [record(0)]);
    }

    #[test]
    fn a_journal_that_is_not_written_to_its_end_replaces_none() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path()).finished(&record(0)).unwrap();
        // In the new journal's place, so that it can't be written.
        std::fs::create_dir(dir.path().join(NEW_JOURNAL)).unwrap();
        assert!(Journal::resume(dir.path(), &fingerprint(), &read(dir.path())).is_err());
        assert_eq!(read(dir.path()).records, [record(0)]);
    }

    #[test]
    fn another_run_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |fingerprint: &Fingerprint| {
            let error = History::read(dir.path(), fingerprint, true, &|_| true).unwrap_err();
            assert_eq!(error.exit, crate::error::ExitCode::Usage);
            error.to_string()
        };
        let missing = refused(&fingerprint());
        assert!(missing.contains("no journal") && missing.contains("--overwrite"), "{missing}");
        begin(dir.path());
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
            let error = refused(&other);
            assert!(error.contains(word) && error.contains("can't resume"), "{error}");
        }
        std::fs::write(dir.path().join(JOURNAL), "{}\n").unwrap();
        assert!(refused(&fingerprint()).contains("--overwrite"));
    }

    #[test]
    fn other_weights_are_refused_where_something_finished_depends_on_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = begin(dir.path());
        journal.finished(&record(1)).unwrap();
        journal.observed(&seen(0, 5)).unwrap();
        journal.observed(&seen(2, 5)).unwrap();
        let read = |part: usize, forwarded: bool| {
            let mut other = fingerprint();
            other.weights[part] += "tuned";
            History::read(dir.path(), &other, forwarded, &|_| true)
        };
        for (part, forwarded) in [(0, true), (1, true), (2, true), (2, false)] {
            let error = read(part, forwarded).unwrap_err().to_string();
            assert!(error.contains("the model differs") && error.contains("layer 1"), "{error}");
        }
        for (part, forwarded, observed) in
            [(3, true, 1), (4, true, 2), (0, false, 2), (1, false, 1), (3, false, 1)]
        {
            let history = read(part, forwarded).unwrap();
            let left = (history.changed, history.records.len(), history.observed.len());
            assert_eq!(left, (true, 1, observed), "{part} {forwarded}");
        }
        assert!(!History::read(dir.path(), &fingerprint(), true, &|_| true).unwrap().changed);
    }
}
