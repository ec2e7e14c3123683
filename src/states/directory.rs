//! The directory in which a run keeps its hidden states.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::file::{DIGEST, PREFIX, SUFFIX, UNFINISHED, failed, path, remove, seeded, temporary};
use super::snapshot::{Snapshot, Writer};
use crate::backend::Compute;
use crate::error::{Error, Result};
use crate::schedule::Kept;
use crate::units::binary;

/// Bytes that are read at a time, a multiple of the size of every dtype.
const READ: usize = 8 << 20;

/// The directory of one run's hidden states, as one rank sees it.
pub struct States {
    /// The run's own directory.
    dir: PathBuf,
    /// The user who owns the files that this process writes there.
    owner: u32,
    compute: Compute,
    /// Bytes of a token's hidden state.
    row: usize,
    /// The number of tokens before each document, and of all documents at the end.
    starts: Vec<usize>,
    /// The complete files that this rank can read.
    files: Arc<Mutex<Vec<Kept>>>,
}

/// Checks that hidden states can be kept in `dir`, by writing a file there and removing it.
///
/// # Errors
/// Exit code 5 where it does not exist or can't be written to.
pub fn check(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        return Err(Error::run("--work-dir is not a directory on this host")
            .file(dir)
            .fix("create it on every host, or name another"));
    }
    let tried = temporary(dir).and_then(|mut probe| probe.write_all(b"x"));
    tried.map_err(|e| failed("can't write in --work-dir", dir, e))
}

/// Creates a run's directory, which only this user can enter, unless it exists; returns the user who owns files that
/// this process writes there.
///
/// # Errors
/// Exit code 5 where the file system refuses, or where others may write there.
fn make_own(dir: &Path) -> Result<u32> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(failed("can't create a directory in --work-dir", dir, e));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(dir).map_err(|e| failed("can't use --work-dir", dir, e))?;
    // The owner of a new file is the user as which the file system knows this process: some turn root into nobody.
    let probe = temporary(dir).and_then(|file| file.as_file().metadata());
    let owner = probe.map_err(|e| failed("can't write in --work-dir", dir, e))?.uid();
    if !found.is_dir() || found.uid() != owner || found.mode() & 0o022 != 0 {
        return Err(Error::run("others may write in this run's directory")
            .file(dir)
            .fix("remove it, or name another --work-dir"));
    }
    Ok(owner)
}

impl States {
    /// The states of run `id` in `dir`, of documents of these lengths and `hidden` features. Removes what an earlier
    /// process of this run did not finish, and says what other runs have left.
    ///
    /// # Errors
    /// Exit code 5 where the directory can't be read.
    pub fn open(dir: &Path, id: &str, compute: Compute, hidden: usize, lengths: &[usize]) -> Result<States> {
        let mut starts = vec![0];
        starts.extend(lengths.iter().scan(0, |sum, length| {
            *sum += length;
            Some(*sum)
        }));
        let own = dir.join(format!("{PREFIX}{id}"));
        let states = States {
            owner: make_own(&own)?,
            dir: own,
            compute,
            row: hidden * compute.bytes(),
            starts,
            files: Arc::default(),
        };
        states.remove(|name| name.ends_with(UNFINISHED))?;
        let others = of_others(dir, &states.dir);
        if others > 0 {
            tracing::warn!(
                "{}: {} are hidden states of other runs, and not used; remove them if those are not to be resumed",
                dir.display(),
                binary(others),
            );
        }
        Ok(states)
    }

    /// Reads the files of this run with hidden states before one of `layers`, and returns those that are undamaged.
    ///
    /// # Errors
    /// Exit code 5 where the directory can't be read; a damaged file is only a warning.
    pub fn find(&self, layers: &Range<usize>) -> Result<Vec<Kept>> {
        let mut found = Vec::new();
        for name in self.names()? {
            let Some(kept) = self.parse(&name).filter(|kept| layers.contains(&kept.layer)) else { continue };
            match self.is_whole(&kept) {
                Ok(true) => found.push(kept),
                Ok(false) => {
                    tracing::warn!(
                        "{}: damaged hidden states, or with NaN, and not used",
                        self.path(&kept).display()
                    )
                }
                Err(e) => tracing::warn!("{}: not used: {e}", self.path(&kept).display()),
            }
        }
        found.sort_by_key(|kept| (kept.layer, kept.documents.start));
        self.lock().clone_from(&found);
        Ok(found)
    }

    /// Removes the files with hidden states before one of `layers` that are not `wanted`.
    ///
    /// # Errors
    /// Exit code 5 where the directory refuses.
    pub fn retain(&self, layers: &Range<usize>, wanted: impl Fn(&Kept) -> bool) -> Result<()> {
        self.lock().retain(&wanted);
        self.remove(|name| {
            self.parse(name).is_some_and(|kept| layers.contains(&kept.layer) && !wanted(&kept))
        })
    }

    /// Removes all files of this run.
    ///
    /// # Errors
    /// Exit code 5 where the directory refuses.
    pub fn clear(&self) -> Result<()> {
        self.lock().clear();
        self.remove(|_| true)?;
        // This fails where other ranks still have files in the directory, or have removed it already.
        let _ = fs::remove_dir(&self.dir);
        Ok(())
    }

    /// Begins a file, which a thread of its own writes. When it is complete, files of the same documents before earlier
    /// layers are removed, except for the newest of them: the layer behind that one may not be finished yet. No file
    /// before layer `protected` or an earlier layer is removed.
    ///
    /// # Errors
    /// Exit code 5 where the system refuses a thread.
    pub fn begin(&self, kept: Kept, protected: usize) -> Result<Snapshot> {
        let writer = Writer {
            path: self.path(&kept),
            dir: self.dir.clone(),
            bytes: self.bytes(&kept.documents),
            files: self.files.clone(),
            protected,
            kept,
        };
        Snapshot::begin(writer)
    }

    /// Reads the hidden states of `documents` before `layer` into `bytes`, which is resized.
    ///
    /// # Errors
    /// Exit code 5 where they are not there or can't be read.
    pub fn read(&self, layer: usize, documents: &Range<usize>, bytes: &mut Vec<u8>) -> Result<()> {
        let kept = self.lock().iter().find(|kept| kept.holds(layer, documents)).cloned();
        let kept = kept.ok_or_else(|| Error::run(format!("no kept hidden states before layer {layer}")))?;
        let path = self.path(&kept);
        let before = self.bytes(&(kept.documents.start..documents.start));
        bytes.resize(self.bytes(documents) as usize, 0);
        let read = self.own_file(&path).and_then(|file| file.read_exact_at(bytes, before));
        read.map_err(|e| failed("can't read hidden states", &path, e))
    }

    /// Bytes of these documents' rows.
    fn bytes(&self, documents: &Range<usize>) -> u64 {
        ((self.starts[documents.end] - self.starts[documents.start]) * self.row) as u64
    }

    /// Whether a file is complete and has the digest that belongs to its name. A file with NaN or infinity does not
    /// count: the health check ended the run that wrote it, and after the source has been repaired the file is wrong.
    fn is_whole(&self, kept: &Kept) -> std::io::Result<bool> {
        let (file, bytes) = (self.own_file(&self.path(kept))?, self.bytes(&kept.documents));
        if file.metadata()?.len() != bytes + DIGEST as u64 {
            return Ok(false);
        }
        let (mut digest, mut finite) = (seeded(&self.path(kept)), true);
        let (mut rows, mut at) = (vec![0; READ], 0);
        while at < bytes {
            rows.truncate((bytes - at).min(READ as u64) as usize);
            file.read_exact_at(&mut rows, at)?;
            digest.update_rayon(&rows);
            finite &= all_finite(&rows, self.compute);
            at += rows.len() as u64;
        }
        let mut stored = [0; DIGEST];
        file.read_exact_at(&mut stored, bytes)?;
        Ok(finite && digest.finalize().as_bytes() == &stored)
    }

    /// Opens a file, if it is a regular file that this user wrote.
    fn own_file(&self, path: &Path) -> std::io::Result<File> {
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        let found = file.metadata()?;
        match found.is_file() && found.uid() == self.owner {
            true => Ok(file),
            false => Err(std::io::Error::other("another user wrote it, or it is not a file")),
        }
    }

    fn path(&self, kept: &Kept) -> PathBuf {
        path(&self.dir, kept)
    }

    /// What the file with this name holds; none for other names.
    fn parse(&self, name: &str) -> Option<Kept> {
        let numbers = name.strip_suffix(SUFFIX)?;
        let numbers: Vec<usize> = numbers.split('-').map(str::parse).collect::<Result<_, _>>().ok()?;
        match numbers[..] {
            [layer, start, end] if start < end && end < self.starts.len() => {
                Some(Kept { layer, documents: start..end })
            }
            _ => None,
        }
    }

    /// The names of all files in the run's directory; none where another rank has removed it.
    fn names(&self) -> Result<Vec<String>> {
        let listed = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            listed => listed.map_err(|e| failed("can't list --work-dir", &self.dir, e))?,
        };
        Ok(listed.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }

    fn remove(&self, which: impl Fn(&str) -> bool) -> Result<()> {
        for name in self.names()?.iter().filter(|name| which(name)) {
            remove(&self.dir.join(name)).map_err(|e| failed("can't remove", &self.dir.join(name), e))?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Kept>> {
        self.files.lock().expect("no holder of this lock panics")
    }
}

/// The bytes of hidden states of other runs in `dir`, as far as this user may read the directories.
fn of_others(dir: &Path, own: &Path) -> u64 {
    let runs = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let others = runs.filter(|path| {
        path != own && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))
    });
    let files = others.flat_map(|run| fs::read_dir(run).into_iter().flatten().flatten());
    let states = files.filter(|file| file.file_name().to_string_lossy().ends_with(SUFFIX));
    states.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

fn all_finite(rows: &[u8], compute: Compute) -> bool {
    // All bits of the exponent are set in NaN and infinity.
    match compute {
        Compute::Bf16 => rows.chunks_exact(2).all(|x| u16::from_le_bytes([x[0], x[1]]) & 0x7F80 != 0x7F80),
        Compute::F32 => {
            rows.chunks_exact(4).all(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_finite())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 4] = [2, 3, 1, 4];

    fn open(dir: &Path, id: &str) -> States {
        States::open(dir, id, Compute::Bf16, 4, &LENGTHS).unwrap()
    }

    /// Rows that say which document they are of.
    fn rows(documents: Range<usize>) -> Vec<u8> {
        documents.flat_map(|document| vec![document as u8; LENGTHS[document] * 8]).collect()
    }

    fn keep(states: &States, layer: usize, documents: Range<usize>) {
        let snapshot = states.begin(Kept { layer, documents: documents.clone() }, 0).unwrap();
        documents.for_each(|document| assert!(snapshot.take(rows(document..document + 1))));
        snapshot.finish().unwrap();
    }

    fn layers(states: &States) -> Vec<usize> {
        open(states.dir.parent().unwrap(), "a")
            .find(&(0..100))
            .unwrap()
            .iter()
            .map(|kept| kept.layer)
            .collect()
    }

    #[test]
    fn what_was_kept_is_found_and_read_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        keep(&open(dir.path(), "a"), 3, 1..4);
        let states = open(dir.path(), "a");
        assert_eq!(states.find(&(0..3)).unwrap(), []);
        assert_eq!(states.find(&(3..4)).unwrap(), [Kept { layer: 3, documents: 1..4 }]);
        let mut bytes = Vec::new();
        for documents in [1..4, 2..3, 3..4] {
            states.read(3, &documents, &mut bytes).unwrap();
            assert_eq!(bytes, rows(documents));
        }
        assert!(states.read(3, &(0..2), &mut bytes).is_err());
        states.clear().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_renamed_foreign_and_short_files_are_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = open(dir.path(), "a").path(&Kept { layer: 3, documents: 0..4 });
        let damage: [&dyn Fn(); 4] = [
            &|| {
                let mut bytes = fs::read(&path).unwrap();
                bytes[7] ^= 1;
                fs::write(&path, bytes).unwrap();
            },
            &|| fs::rename(&path, path.with_file_name(format!("4-0-4{SUFFIX}"))).unwrap(),
            &|| {
                let other = open(dir.path(), "b");
                keep(&other, 3, 0..4);
                fs::rename(other.path(&Kept { layer: 3, documents: 0..4 }), &path).unwrap();
            },
            &|| File::options().write(true).open(&path).unwrap().set_len(50).unwrap(),
        ];
        for (number, damage) in damage.iter().enumerate() {
            let states = open(dir.path(), "a");
            keep(&states, 3, 0..4);
            damage();
            assert_eq!(layers(&states), Vec::<usize>::new(), "{number}");
            states.clear().unwrap();
        }
    }

    #[test]
    fn the_two_newest_stay() {
        let dir = tempfile::tempdir().unwrap();
        let states = open(dir.path(), "a");
        keep(&states, 1, 0..2);
        keep(&states, 1, 2..4);
        for layer in 2..6 {
            keep(&states, layer, 0..4);
            let expected = if layer == 2 { vec![1, 1, 2] } else { vec![layer - 1, layer] };
            assert_eq!(layers(&states), expected);
        }
        // Other documents, and what a later sweep starts from, are left alone.
        keep(&states, 7, 0..2);
        assert_eq!(layers(&states), [4, 5, 7]);
        let snapshot = states.begin(Kept { layer: 8, documents: 0..4 }, 5).unwrap();
        assert!(snapshot.take(rows(0..4)));
        snapshot.finish().unwrap();
        assert_eq!(layers(&states), [4, 5, 7, 8]);
    }

    #[test]
    fn half_a_file_leaves_nothing_and_nan_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let states = open(dir.path(), "a");
        for (bytes, files) in [(rows(0..2), 0), (vec![0xFF; rows(0..4).len()], 1)] {
            let snapshot = states.begin(Kept { layer: 1, documents: 0..4 }, 0).unwrap();
            snapshot.take(bytes);
            snapshot.finish().unwrap();
            assert_eq!(states.names().unwrap().len(), files);
            assert_eq!(layers(&states), Vec::<usize>::new());
        }
    }

    #[test]
    fn nobody_else_can_read_what_is_kept_or_put_anything_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let states = open(dir.path(), "a");
        keep(&states, 3, 0..4);
        let path = states.path(&Kept { layer: 3, documents: 0..4 });
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&states.dir), mode(&path)), (0o700, 0o600));
        // The same bytes behind a link, and a directory that others made or may write in.
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_eq!(layers(&states), Vec::<usize>::new());
        let (link, open_to_all) = (dir.path().join("distq-b"), dir.path().join("distq-c"));
        std::os::unix::fs::symlink(&states.dir, link).unwrap();
        fs::DirBuilder::new().mode(0o700).create(&open_to_all).unwrap();
        fs::set_permissions(&open_to_all, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        for id in ["b", "c"] {
            let refused = States::open(dir.path(), id, Compute::Bf16, 4, &LENGTHS).err().unwrap();
            assert!(refused.to_string().contains("others may write"), "{refused}");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path()).unwrap();
        assert_eq!(check(&dir.path().join("no")).unwrap_err().exit, crate::error::ExitCode::Run);
    }
}
