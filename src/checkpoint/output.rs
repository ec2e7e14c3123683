//! The life of an output directory: `OUT.partial/` while it is being made, `OUT` in one rename.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::writer::failed;
use crate::error::{Error, Result};

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
#[derive(Clone, Debug, PartialEq)]
pub struct OutputDir {
    /// Where the output will be.
    pub out: PathBuf,
    /// Where it is made.
    pub partial: PathBuf,
    /// Whether an unfinished run is continued.
    pub resumed: bool,
    overwrite: bool,
}

impl OutputDir {
    /// Checks the paths, and changes nothing.
    ///
    /// # Errors
    /// Exit code 2: OUT exists, lies inside the source or around it, or an unfinished run is in the way.
    pub fn check(source: &Path, out: &Path, existing: Existing) -> Result<OutputDir> {
        let out = absolute(out)?;
        let source = fs::canonicalize(source).unwrap_or_else(|_| source.to_path_buf());
        let mut name =
            out.file_name().expect("an absolute path outside of the root has a name").to_os_string();
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
        if fs::symlink_metadata(&out).is_ok() && !out.is_dir() {
            return Err(Error::usage("the output's name is taken by something that is not a directory")
                .file(&out)
                .fix("choose another name, or remove it"));
        }
        if out.exists() && existing != Existing::Overwrite {
            return Err(Error::usage("the output exists")
                .file(&out)
                .fix("choose another name, or use --overwrite"));
        }
        let resumed = existing == Existing::Resume;
        match (partial.exists(), existing) {
            (true, Existing::Refuse) => {
                return Err(Error::usage("an earlier run did not finish")
                    .file(&partial)
                    .fix("continue it with --resume, or start again with --overwrite"));
            }
            (false, Existing::Resume) => {
                return Err(Error::usage("there is no unfinished run to resume")
                    .file(&partial)
                    .fix("start without --resume"));
            }
            _ => {}
        }
        Ok(OutputDir { out, partial, resumed, overwrite: existing == Existing::Overwrite })
    }

    /// Creates `OUT.partial/`, unless an unfinished run is continued.
    ///
    /// # Errors
    /// Exit code 5 where the file system refuses.
    pub fn create(&self) -> Result<()> {
        if self.resumed {
            return Ok(());
        }
        if self.partial.exists() {
            fs::remove_dir_all(&self.partial).map_err(|e| failed("can't remove", &self.partial, e))?;
        }
        fs::create_dir(&self.partial).map_err(|e| failed("can't create the output", &self.partial, e))
    }

    /// Removes `scratch` files and makes `OUT` appear, complete, in one rename.
    ///
    /// # Errors
    /// Exit code 5 where the file system refuses.
    pub fn publish(&self, scratch: &[&str]) -> Result<()> {
        for name in scratch {
            let path = self.partial.join(name);
            if path.exists() {
                fs::remove_file(&path).map_err(|e| failed("can't remove", &path, e))?;
            }
        }
        sync_files(&self.partial)?;
        sync_dir(&self.partial)?;
        // A name of this process's own: OUT.old may be somebody's, even the source.
        let mut old = self.out.clone().into_os_string();
        old.push(format!(".old.{}", std::process::id()));
        let old = PathBuf::from(old);
        let replaced = self.overwrite && self.out.exists();
        if replaced {
            fs::rename(&self.out, &old)
                .map_err(|e| failed("can't move the old output away", &self.out, e))?;
        }
        if let Err(e) = fs::rename(&self.partial, &self.out) {
            if replaced {
                // Put the old output back; the first error is the one to report.
                let _ = fs::rename(&old, &self.out);
            }
            return Err(failed("can't publish the output", &self.out, e));
        }
        if replaced {
            fs::remove_dir_all(&old).map_err(|e| failed("can't remove", &old, e))?;
        }
        match self.out.parent() {
            Some(parent) => sync_dir(parent),
            None => Ok(()),
        }
    }
}

/// Waits until the files of a directory are on the disk: a rename may reach it before their contents do.
fn sync_files(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| failed("can't list", dir, e))? {
        let path = entry.map_err(|e| failed("can't list", dir, e))?.path();
        File::open(&path).and_then(|file| file.sync_all()).map_err(|e| failed("can't write", &path, e))?;
    }
    Ok(())
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed("can't write", dir, e))
}

/// The path with its parent resolved; the last component need not exist.
fn absolute(path: &Path) -> Result<PathBuf> {
    if let Ok(path) = fs::canonicalize(path) {
        return Ok(path);
    }
    let absolute = std::path::absolute(path).map_err(|e| failed("not a usable path", path, e))?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(Error::usage("this is not a name for a directory")
            .file(path)
            .fix("give a path that ends in a name"));
    };
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

    #[test]
    fn nothing_looks_finished_before_it_is() {
        let (_dir, source, out) = dirs();
        let output = OutputDir::check(&source, &out, Existing::Refuse).unwrap();
        output.create().unwrap();
        fs::write(output.partial.join("journal"), "x").unwrap();
        fs::write(output.partial.join("model"), "x").unwrap();
        assert!(!out.exists());
        output.publish(&["journal", "nonce"]).unwrap();
        assert!(out.join("model").exists() && !out.join("journal").exists() && !output.partial.exists());
    }

    #[test]
    fn paths_that_make_no_sense_are_refused() {
        let (dir, source, out) = dirs();
        let refused =
            |out: &Path, existing| OutputDir::check(&source, out, existing).unwrap_err().to_string();
        assert!(refused(&source, Existing::Overwrite).contains("overlap"));
        assert!(refused(&source.join("out"), Existing::Overwrite).contains("overlap"));
        assert!(refused(dir.path(), Existing::Overwrite).contains("overlap"));
        assert!(refused(&dir.path().join("no/out"), Existing::Refuse).contains("parent"));
        assert!(refused(&out, Existing::Resume).contains("no unfinished run"));
        fs::create_dir(&out).unwrap();
        assert!(refused(&out, Existing::Refuse).contains("--overwrite"));
        fs::remove_dir(&out).unwrap();
        OutputDir::check(&source, &out, Existing::Refuse).unwrap().create().unwrap();
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
        fs::remove_dir_all(&partial).unwrap();
        let old = dir.path().join("out.old");
        fs::create_dir(&old).unwrap();
        fs::write(old.join("weights"), "x").unwrap();
        fs::create_dir(&out).unwrap();
        let output = OutputDir::check(&old, &out, Existing::Overwrite).unwrap();
        output.create().unwrap();
        output.publish(&[]).unwrap();
        assert!(old.join("weights").exists());
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "only source, out.old and out: {left:?}");
    }

    #[test]
    fn a_name_taken_by_a_file_or_a_dangling_link_is_refused() {
        let (dir, source, out) = dirs();
        fs::write(&out, "x").unwrap();
        let refused =
            |out: &Path| OutputDir::check(&source, out, Existing::Overwrite).unwrap_err().to_string();
        assert!(refused(&out).contains("not a directory"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("gone"), &link).unwrap();
        assert!(refused(&link).contains("not a directory"));
    }

    #[test]
    fn overwriting_replaces_the_old_output_only_when_the_new_one_is_done() {
        let (_dir, source, out) = dirs();
        fs::create_dir(&out).unwrap();
        fs::write(out.join("old"), "x").unwrap();
        let output = OutputDir::check(&source, &out, Existing::Overwrite).unwrap();
        output.create().unwrap();
        assert!(out.join("old").exists());
        output.publish(&[]).unwrap();
        assert!(out.exists() && !out.join("old").exists());
    }
}
