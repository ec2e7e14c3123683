//! The life of an output directory: `OUT.partial/` while it is being made, `OUT` in one rename.
//!
//! `OUT.partial/` holds some files that are not part of the output. They are removed after the rename, the journal last:
//! a directory with a journal in it is one that `--resume` can finish, under either name.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::digests::DIGESTS;
use super::lock::{LOCK, Lock};
use super::sidefiles::{TEMPLATES, is_side_file};
use super::writer::failed;
use crate::error::{Error, ExitCode, Result};

/// What the run was asked to do and what it has finished.
pub const JOURNAL: &str = "distq-journal.jsonl";
/// A journal that is being written.
pub const NEW_JOURNAL: &str = "distq-journal.jsonl.new";
/// A file with the run's name, the same after every `--resume`, and a word that is new each time: by this other ranks
/// recognise that they see rank 0's directory and not one of the same name.
pub const NONCE: &str = "distq-nonce";
/// An empty file in `OUT.partial/` of a run that was started with `--overwrite`, so that resuming it may replace OUT.
const OVERWRITES: &str = "distq-overwrites";
/// The output that was replaced, until it is removed.
const REPLACED: &str = "distq-replaced";

/// Files of a run that are not part of the output, in the order in which they are removed.
const SCRATCH: [&str; 5] = [OVERWRITES, NONCE, NEW_JOURNAL, LOCK, JOURNAL];

/// What to do with what an earlier run left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Stop.
    Refuse,
    /// Go on with an unfinished run.
    Resume,
    /// Replace it.
    Overwrite,
}

/// An output directory that is not published yet.
#[derive(Debug)]
pub struct OutputDir {
    /// Where the output will be.
    pub out: PathBuf,
    /// Where it is made.
    pub partial: PathBuf,
    /// Whether an unfinished run is continued.
    pub resumed: bool,
    /// Whether OUT may be replaced.
    overwrites: bool,
    /// Where the files of an unfinished run were when it was locked: `OUT.partial/`, or OUT where an earlier process was
    /// stopped after the rename.
    place: PathBuf,
    /// Held from the moment at which `OUT.partial/` is there.
    lock: Option<Lock>,
}

impl OutputDir {
    /// Checks the paths. Changes nothing, but locks an unfinished run that is to be continued or removed.
    ///
    /// # Errors
    /// Exit code 2: OUT exists, lies inside the source or around it, can't be replaced without removing what no run of
    /// distq made, or an unfinished run is in the way or still running.
    pub fn check(source: &Path, out: &Path, existing: Existing) -> Result<OutputDir> {
        let out = absolute(out)?;
        if out.to_str().is_none() {
            return Err(Error::usage("the output's path is not UTF-8")
                .file(&out)
                .fix("choose a path of plain letters"));
        }
        let source = fs::canonicalize(source).unwrap_or_else(|_| source.to_path_buf());
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let partial = out.with_file_name(name);
        // Both may be removed or replaced, so the source must lie in neither.
        for ours in [&out, &partial] {
            if ours.starts_with(&source) || source.starts_with(ours) {
                return Err(Error::usage("the output and the source overlap")
                    .file(ours)
                    .fix("write to a directory outside of the source"));
            }
        }
        let unfinished = is_directory(&partial)?;
        let vacant = !is_directory(&out)? || entries(&out)?.is_empty();
        if !is_on_the_disk_of_its_parent(&out) {
            return Err(Error::usage(
                "the output's name is that of a mount point, which can't be replaced by a rename",
            )
            .file(&out)
            .fix("name a directory inside of it"));
        }
        let (mut overwrites, mut locked) = (existing == Existing::Overwrite, unfinished.then_some(&partial));
        // OUT of a run that was stopped after the rename is this run's own.
        let mut is_ours = false;
        match existing {
            Existing::Refuse if unfinished => {
                // Dropped at once: only whether another process holds it matters.
                if let Err(held) = Lock::acquire(&partial)
                    && held.exit == ExitCode::Usage
                {
                    return Err(held);
                }
                return Err(Error::usage("an earlier run did not finish")
                    .file(&partial)
                    .fix("continue it with --resume, or start again with --overwrite"));
            }
            Existing::Resume if unfinished => {
                only_files(&partial)?;
                overwrites = partial.join(OVERWRITES).exists();
            }
            // Stopped between the rename and the removal of its journal.
            Existing::Resume if out.join(JOURNAL).exists() => {
                only_files(&out)?;
                (overwrites, locked, is_ours) = (out.join(OVERWRITES).exists(), Some(&out), true);
            }
            Existing::Resume if vacant => {
                return Err(Error::usage("there is no unfinished run to resume")
                    .file(&partial)
                    .fix("start without --resume"));
            }
            Existing::Overwrite => {
                replaceable(&partial)?;
                replaceable(&out)?;
            }
            Existing::Refuse | Existing::Resume => {}
        }
        if !vacant && !overwrites && !is_ours {
            return Err(Error::usage("the output exists")
                .file(&out)
                .fix("choose another name, or use --overwrite"));
        }
        let lock = locked.map(|dir| Lock::acquire(dir)).transpose()?;
        let place = locked.unwrap_or(&partial).clone();
        Ok(OutputDir { out, partial, resumed: existing == Existing::Resume, overwrites, place, lock })
    }

    /// Where the run's files are: `OUT.partial/`, or OUT where an earlier process was stopped after the rename.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Creates `OUT.partial/`, empty but for the lock, or brings that of an unfinished run back.
    ///
    /// # Errors
    /// Exit code 2 where another run was faster, 5 where the file system refuses.
    pub fn create(&mut self) -> Result<()> {
        if self.resumed {
            if self.place != self.partial {
                fs::rename(&self.place, &self.partial)
                    .map_err(|e| failed("can't go on with the published output", &self.place, e))?;
                self.place.clone_from(&self.partial);
                // A new output has taken its place, and its removal may have begun.
                self.remove_replaced()?;
            }
            return self.forget_descriptions();
        }
        match fs::create_dir(&self.partial) {
            Ok(()) => self.lock = Some(Lock::acquire(&self.partial)?),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                if self.lock.is_none() {
                    self.lock = Some(Lock::acquire(&self.partial)?);
                    return Err(Error::usage("another run began to write this output just now")
                        .file(&self.partial)
                        .fix("choose another name for the output"));
                }
                // Looked at again: it was checked before the model was read.
                replaceable(&self.partial)?;
                self.empty()?;
            }
            Err(e) => return Err(failed("can't create the output", &self.partial, e)),
        }
        if self.overwrites {
            let path = self.partial.join(OVERWRITES);
            File::create(&path).map_err(|e| failed("can't create", &path, e))?;
        }
        Ok(())
    }

    /// Removes what an earlier process wrote beside the weights. It is written anew, and a file that the source has no
    /// more would stay.
    fn forget_descriptions(&self) -> Result<()> {
        self.remove(|name| WRITTEN.contains(&name) || is_side_file(name))
    }

    fn remove(&self, which: impl Fn(&str) -> bool) -> Result<()> {
        for path in
            files(&self.partial)?.iter().filter(|name| which(name)).map(|name| self.partial.join(name))
        {
            fs::remove_file(&path).map_err(|e| failed("can't remove", &path, e))?;
        }
        // Made again where it is needed.
        let _ = fs::remove_dir(self.partial.join(TEMPLATES));
        Ok(())
    }

    /// Removes a directory that was just created, in which there is nothing worth going on with.
    pub fn discard(&self) {
        let _ = fs::remove_dir_all(&self.partial);
    }

    /// Removes everything but the lock. An output that an earlier run had moved away to replace it is put back: it stays
    /// until there is a new one.
    fn empty(&self) -> Result<()> {
        let replaced = self.partial.join(REPLACED);
        // An empty directory may have been made in its place; a rename replaces that.
        if replaced.exists() && entries(&self.out).map_or(true, |names| names.is_empty()) {
            fs::rename(&replaced, &self.out)
                .map_err(|e| failed("can't put the old output back", &self.out, e))?;
        }
        self.remove_replaced()?;
        self.remove(|name| name != LOCK)
    }

    /// Removes an output that was moved away to be replaced.
    fn remove_replaced(&self) -> Result<()> {
        let replaced = self.partial.join(REPLACED);
        match replaced.exists() {
            true => fs::remove_dir_all(&replaced).map_err(|e| failed("can't remove", &replaced, e)),
            false => Ok(()),
        }
    }

    /// Makes `OUT` appear, complete, in one rename, when all of it is on the disk; then removes what is not part of it.
    /// Stopped at any point, it leaves what `--resume` publishes.
    ///
    /// # Errors
    /// Exit code 2 where OUT is no longer what could be replaced, 5 where the file system refuses.
    pub fn publish(&self) -> Result<()> {
        sync_files(&self.partial)?;
        sync_dir(&self.partial)?;
        let replaced = self.partial.join(REPLACED);
        let replaces = self.replaces()?;
        if replaces {
            self.remove_replaced()?;
            fs::rename(&self.out, &replaced)
                .map_err(|e| failed("can't move the old output away", &self.out, e))?;
        }
        if let Err(e) = fs::rename(&self.partial, &self.out) {
            if replaces {
                // Put the old output back; the first error is the one to report.
                let _ = fs::rename(&replaced, &self.out);
            }
            return Err(failed("can't publish the output", &self.out, e));
        }
        self.out.parent().map_or(Ok(()), sync_dir)?;
        self.clean();
        Ok(())
    }

    /// Whether there is an output that is replaced.
    ///
    /// # Errors
    /// Exit code 2 where it may not be: it may have been made or changed since the run began.
    fn replaces(&self) -> Result<bool> {
        let fix = "move it away, then use --resume: everything is computed, and only its name is missing";
        let found = is_directory(&self.out).and_then(|there| Ok(there && !entries(&self.out)?.is_empty()));
        let replaces = found.map_err(|error| error.fix(fix))?;
        if replaces && !self.overwrites {
            return Err(Error::usage("the output's name was taken while the run went on")
                .file(&self.out)
                .fix(fix));
        }
        replaceable(&self.out).map_err(|error| error.fix(fix))?;
        Ok(replaces)
    }

    /// Removes what is not part of the published output. It is complete with these files as well, so this is no reason
    /// to fail.
    fn clean(&self) {
        let replaced = self.out.join(REPLACED);
        let mut removed = vec![];
        if replaced.exists() {
            removed.push((replaced.clone(), fs::remove_dir_all(&replaced)));
        }
        removed.extend(SCRATCH.map(|name| (self.out.join(name), fs::remove_file(self.out.join(name)))));
        for (path, error) in removed.into_iter().filter_map(|(path, removed)| Some((path, removed.err()?))) {
            if error.kind() != ErrorKind::NotFound {
                tracing::warn!(
                    "{}: can't be removed ({error}); the output is complete, remove this by hand",
                    path.display()
                );
            }
        }
    }
}

/// Whether a directory of this name is on the same disk as the directory around it: a mount point can't be renamed, nor
/// replaced by a rename.
fn is_on_the_disk_of_its_parent(out: &Path) -> bool {
    let disk = |path: &Path| fs::metadata(path).map(|found| found.dev());
    match (disk(out), out.parent().map(disk)) {
        (Ok(mine), Some(Ok(around))) => mine == around,
        _ => true,
    }
}

/// Names in a directory.
fn entries(dir: &Path) -> Result<Vec<String>> {
    let listed = fs::read_dir(dir).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let listed = listed.map_err(|e| failed("can't list", dir, e))?;
    Ok(listed.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// Names of all files in a directory but those of a replaced output, with the folder of those that may be in one.
fn files(dir: &Path) -> Result<Vec<String>> {
    let mut names = entries(dir)?;
    names.retain(|name| name != REPLACED);
    let templates = dir.join(TEMPLATES);
    if fs::symlink_metadata(&templates).is_ok_and(|found| found.is_dir()) {
        names.retain(|name| name != TEMPLATES);
        names.extend(entries(&templates)?.iter().map(|name| format!("{TEMPLATES}/{name}")));
    }
    Ok(names)
}

/// Whether there is a directory of this name.
///
/// # Errors
/// Exit code 2 where there is something else: it can't be replaced, and a link leads elsewhere.
fn is_directory(path: &Path) -> Result<bool> {
    let taken = |what: &str| {
        Err(Error::usage(format!("the output's name is taken by {what}"))
            .file(path)
            .fix("choose another name, or remove it"))
    };
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(true),
        Ok(found) if found.is_symlink() => taken("a symbolic link, which distq does not follow"),
        Ok(_) => taken("something that is not a directory"),
        Err(_) => Ok(false),
    }
}

/// Refuses an unfinished run with something in it that distq did not put there: written through a link, a file outside
/// of the directory would change.
fn only_files(dir: &Path) -> Result<()> {
    for name in files(dir)? {
        let path = dir.join(name);
        if !fs::symlink_metadata(&path).is_ok_and(|found| found.is_file()) {
            return Err(Error::usage("this is no file of an unfinished run")
                .file(&path)
                .fix("remove it, then use --resume again"));
        }
    }
    Ok(())
}

/// Refuses to have a directory removed that is neither a checkpoint nor an unfinished run, or that holds anything else.
fn replaceable(dir: &Path) -> Result<()> {
    if !is_directory(dir)? {
        return Ok(());
    }
    let refused = |what: String| {
        Err(Error::usage(format!("--overwrite does not remove this directory: {what}"))
            .file(dir)
            .fix("choose another name for the output, or remove the directory yourself"))
    };
    let (names, listed) = (files(dir)?, listed_in_digests(dir));
    for name in &names {
        let is_dir = fs::symlink_metadata(dir.join(name)).is_ok_and(|found| found.is_dir());
        if is_dir || !(is_of_checkpoint(name) || listed.contains(name)) {
            return refused(format!("{name} is not part of a checkpoint"));
        }
    }
    let has = |wanted: &dyn Fn(&String) -> bool| names.iter().any(wanted);
    let checkpoint = has(&|name| name == "config.json") && has(&|name| name.ends_with(".safetensors"));
    let unfinished =
        has(&|name| name == JOURNAL) || names.iter().all(|name| SCRATCH.contains(&name.as_str()));
    match checkpoint || unfinished {
        true => Ok(()),
        false => refused("it is neither a checkpoint nor an unfinished run".into()),
    }
}

/// Files beside the weights that distq writes.
const WRITTEN: [&str; 4] = ["config.json", "hf_quant_config.json", DIGESTS, "model.safetensors.index.json"];

/// Files that stand beside the weights of many checkpoints. distq neither writes nor carries them over.
const OTHERS: [&str; 3] = ["README.md", ".gitattributes", "recipe.yaml"];

/// Whether a name alone says that a file belongs to a checkpoint or to an unfinished run. Programs may be anybody's.
fn is_of_checkpoint(name: &str) -> bool {
    SCRATCH.contains(&name)
        || name.ends_with(".safetensors")
        || (is_description(name) && !name.ends_with(".py"))
}

/// Whether a file stands beside the weights of a checkpoint and describes it.
fn is_description(name: &str) -> bool {
    WRITTEN.contains(&name) || OTHERS.contains(&name) || is_side_file(name)
}

/// The names in a `digests.json`, which is in every output of distq and names all of its files.
fn listed_in_digests(dir: &Path) -> Vec<String> {
    let mut text = vec![];
    let read = File::open(dir.join(DIGESTS)).and_then(|file| file.take(64 << 20).read_to_end(&mut text));
    let value: serde_json::Value = match read {
        Ok(_) => serde_json::from_slice(&text).unwrap_or_default(),
        Err(_) => return vec![],
    };
    let files = value.get("files").and_then(serde_json::Value::as_object);
    files.map_or(vec![], |files| files.keys().cloned().collect())
}

/// Waits until the files of a directory are on the disk: a rename may reach it before their contents do.
fn sync_files(dir: &Path) -> Result<()> {
    for name in files(dir)? {
        let path = dir.join(name);
        File::open(&path).and_then(|file| file.sync_all()).map_err(|e| failed("can't write", &path, e))?;
    }
    let templates = dir.join(TEMPLATES);
    if templates.is_dir() { sync_dir(&templates) } else { Ok(()) }
}

pub(in crate::checkpoint) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed("can't write", dir, e))
}

/// The path with its parent resolved; the last component need not exist, and is not followed.
fn absolute(path: &Path) -> Result<PathBuf> {
    let no_name = || {
        Error::usage("this is not a name for a directory").file(path).fix("give a path that ends in a name")
    };
    let name: &OsStr = path.file_name().ok_or_else(no_name)?;
    let absolute = std::path::absolute(path).map_err(|e| failed("not a usable path", path, e))?;
    let parent = absolute.parent().ok_or_else(no_name)?;
    match fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        Err(_) => Err(Error::usage("the parent directory does not exist").file(path).fix("create it first")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("source"), dir.path().join("out"));
        fs::create_dir(&source).unwrap();
        (dir, source, out)
    }

    /// A directory with these empty files.
    fn filled(dir: &Path, names: &[&str]) {
        fs::create_dir_all(dir).unwrap();
        names.iter().for_each(|name| fs::write(dir.join(name), "").unwrap());
    }

    fn begun(source: &Path, out: &Path, existing: Existing) -> OutputDir {
        let mut output = OutputDir::check(source, out, existing).unwrap();
        output.create().unwrap();
        output
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names = entries(dir).unwrap();
        names.sort();
        names
    }

    #[test]
    fn nothing_looks_finished_before_it_is() {
        let (_dir, source, out) = dirs();
        let output = begun(&source, &out, Existing::Refuse);
        filled(&output.partial, &[JOURNAL, NONCE, "model"]);
        assert!(!out.exists());
        output.publish().unwrap();
        assert_eq!((names(&out), output.partial.exists()), (vec!["model".to_string()], false));
    }

    #[test]
    fn paths_that_make_no_sense_are_refused() {
        let (dir, source, out) = dirs();
        let refused = |out: &Path, existing| {
            let error = OutputDir::check(&source, out, existing).unwrap_err();
            assert_eq!(error.exit, ExitCode::Usage, "{error}");
            error.to_string()
        };
        assert!(refused(&source, Existing::Overwrite).contains("overlap"));
        assert!(refused(&source.join("out"), Existing::Overwrite).contains("overlap"));
        assert!(refused(dir.path(), Existing::Overwrite).contains("overlap"));
        assert!(refused(&dir.path().join("no/out"), Existing::Refuse).contains("parent"));
        assert!(refused(&out, Existing::Resume).contains("no unfinished run"));
        for no_name in ["/", ".", "..", "../..", ""] {
            assert!(refused(Path::new(no_name), Existing::Overwrite).contains("not a name"), "{no_name}");
        }
        filled(&out, &["config.json", "model.safetensors"]);
        assert!(refused(&out, Existing::Refuse).contains("--overwrite"));
        assert!(refused(&out, Existing::Resume).contains("--overwrite"));
        fs::remove_dir_all(&out).unwrap();
        drop(begun(&source, &out, Existing::Refuse));
        assert!(refused(&out, Existing::Refuse).contains("--resume"));
    }

    #[test]
    fn the_source_is_never_what_overwriting_removes() {
        let (dir, _, out) = dirs();
        let partial = dir.path().join("out.partial");
        fs::create_dir_all(partial.join("deeper")).unwrap();
        for source in [&partial, &partial.join("deeper")] {
            let error = OutputDir::check(source, &out, Existing::Overwrite).unwrap_err();
            assert!(error.to_string().contains("overlap"), "{error}");
        }
    }

    #[test]
    fn names_that_are_taken_by_files_and_links_are_refused() {
        let (dir, source, out) = dirs();
        let link = dir.path().join("link");
        fs::write(&out, "x").unwrap();
        filled(&dir.path().join("elsewhere"), &["config.json", "model.safetensors"]);
        for (path, target) in [(&out, None), (&link, Some("gone")), (&link, Some("elsewhere"))] {
            if let Some(target) = target {
                let _ = fs::remove_file(path);
                std::os::unix::fs::symlink(dir.path().join(target), path).unwrap();
            }
            let error = OutputDir::check(&source, path, Existing::Overwrite).unwrap_err();
            assert!(error.to_string().contains("name is taken"), "{error}");
        }
    }

    #[test]
    fn overwriting_replaces_the_old_output_only_when_the_new_one_is_done() {
        let (dir, source, out) = dirs();
        filled(&out, &["config.json", "model.safetensors", "tokenizer.model"]);
        let output = begun(&source, &out, Existing::Overwrite);
        filled(&output.partial, &[JOURNAL, "new"]);
        assert!(out.join("config.json").exists());
        output.publish().unwrap();
        assert_eq!(
            (names(&out), names(dir.path())),
            (vec!["new".into()], vec!["out".into(), "source".into()])
        );
    }

    #[test]
    fn overwriting_removes_nothing_that_is_not_of_a_checkpoint() {
        let (_dir, source, out) = dirs();
        let partial = out.with_file_name("out.partial");
        for dir in [&out, &partial] {
            let foreign: [&[&str]; 6] = [
                &["thesis.tex"],
                &["config.json", "model.safetensors", "train.py"],
                &["config.json", "model.safetensors", ".env"],
                &[JOURNAL, "notes.txt"],
                &["config.json", "README.md"],
                &["model.safetensors"],
            ];
            for files in foreign {
                filled(dir, files);
                let error = OutputDir::check(&source, &out, Existing::Overwrite).unwrap_err();
                assert_eq!(error.exit, ExitCode::Usage);
                assert!(error.to_string().contains("--overwrite does not remove"), "{error}");
                assert_eq!(names(dir).len(), files.len());
                fs::remove_dir_all(dir).unwrap();
            }
            filled(dir, &["config.json", "model.safetensors"]);
            fs::create_dir(dir.join("src")).unwrap();
            assert!(OutputDir::check(&source, &out, Existing::Overwrite).is_err(), "it has a directory");
            fs::remove_dir(dir.join("src")).unwrap();
            // Programs of the model's authors are named by the digests.
            fs::write(dir.join("modeling_x.py"), "").unwrap();
            assert!(OutputDir::check(&source, &out, Existing::Overwrite).is_err());
            fs::write(dir.join("digests.json"), r#"{"files": {"modeling_x.py": ""}}"#).unwrap();
            OutputDir::check(&source, &out, Existing::Overwrite).unwrap();
            fs::remove_dir_all(dir).unwrap();
        }
    }

    #[test]
    fn what_was_put_into_the_old_output_meanwhile_is_not_removed() {
        let (_dir, source, out) = dirs();
        filled(&out, &["config.json", "model.safetensors"]);
        let output = begun(&source, &out, Existing::Overwrite);
        filled(&output.partial, &[JOURNAL, "new"]);
        filled(&out, &["thesis.tex"]);
        assert!(output.publish().unwrap_err().to_string().contains("--resume"));
        assert!(out.join("thesis.tex").exists() && output.partial.join("new").exists());
        drop(output);
        fs::rename(&out, out.with_file_name("moved")).unwrap();
        begun(&source, &out, Existing::Resume).publish().unwrap();
        assert_eq!(names(&out), ["new"]);
    }

    #[test]
    fn an_empty_directory_is_as_good_as_none() {
        let (_dir, source, out) = dirs();
        fs::create_dir(&out).unwrap();
        let output = begun(&source, &out, Existing::Refuse);
        filled(&output.partial, &["model"]);
        output.publish().unwrap();
        assert_eq!(names(&out), ["model"]);
    }

    #[test]
    fn stopped_anywhere_in_publishing_it_can_be_resumed() {
        // After how many renames: none, that of the old output, that of the new one.
        for renames in 0..3 {
            let (dir, source, out) = dirs();
            filled(&out, &["config.json", "model.safetensors"]);
            let output = begun(&source, &out, Existing::Overwrite);
            filled(&output.partial, &[JOURNAL, "new.safetensors"]);
            let partial = output.partial.clone();
            drop(output);
            if renames > 0 {
                fs::rename(&out, partial.join(REPLACED)).unwrap();
            }
            if renames > 1 {
                fs::rename(&partial, &out).unwrap();
            } else if renames > 0 {
                // Beginning anew puts the old output back, which stays until there is a new one.
                let again = begun(&source, &out, Existing::Overwrite);
                assert!(out.join("config.json").exists());
                filled(&again.partial, &[JOURNAL, "new.safetensors", "vocab.json"]);
            }
            let output = begun(&source, &out, Existing::Resume);
            assert!(output.partial.join("new.safetensors").exists());
            output.publish().unwrap();
            let left = (names(&out), names(dir.path()));
            assert_eq!(
                left,
                (vec!["new.safetensors".into()], vec!["out".into(), "source".into()]),
                "{renames}"
            );
        }
    }

    #[test]
    fn a_second_run_is_refused_by_name_until_the_first_has_ended() {
        let (_dir, source, out) = dirs();
        let first = begun(&source, &out, Existing::Refuse);
        filled(&first.partial, &[JOURNAL, "model.safetensors"]);
        for existing in [Existing::Refuse, Existing::Resume, Existing::Overwrite] {
            let error = OutputDir::check(&source, &out, existing).unwrap_err();
            let holder = format!("process {}", std::process::id());
            assert_eq!(error.exit, ExitCode::Usage);
            assert!(error.to_string().contains(&holder), "{existing:?}: {error}");
        }
        drop(first);
        OutputDir::check(&source, &out, Existing::Resume).unwrap();
        // Two that began when there was nothing yet.
        let (second, third) = (out.with_file_name("second"), out.with_file_name("second"));
        let [mut second, mut third] =
            [second, third].map(|out| OutputDir::check(&source, &out, Existing::Refuse).unwrap());
        second.create().unwrap();
        assert!(third.create().unwrap_err().to_string().contains("another run"));
    }

    #[test]
    fn a_folder_of_templates_is_part_of_an_output() {
        let (_dir, source, out) = dirs();
        for existing in [Existing::Refuse, Existing::Overwrite] {
            let output = begun(&source, &out, existing);
            filled(&output.partial, &[JOURNAL, "config.json", "model.safetensors"]);
            filled(&output.partial.join(TEMPLATES), &["rag.jinja"]);
            drop(output);
            let resumed = begun(&source, &out, Existing::Resume);
            assert!(!resumed.partial.join(TEMPLATES).exists(), "made anew");
            filled(&resumed.partial, &["config.json"]);
            filled(&resumed.partial.join(TEMPLATES), &["rag.jinja"]);
            resumed.publish().unwrap();
            assert_eq!(names(&out), [TEMPLATES, "config.json", "model.safetensors"]);
        }
        filled(&out.join(TEMPLATES), &["thesis.tex"]);
        let error = OutputDir::check(&source, &out, Existing::Overwrite).unwrap_err().to_string();
        assert!(error.contains("additional_chat_templates/thesis.tex"), "{error}");
    }

    #[test]
    fn a_link_in_an_unfinished_run_is_refused() {
        let (_dir, source, out) = dirs();
        let partial = begun(&source, &out, Existing::Refuse).partial;
        std::os::unix::fs::symlink("/nowhere", partial.join("config.json")).unwrap();
        let error = OutputDir::check(&source, &out, Existing::Resume).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
