//! The files of a model directory: which one a name stands for, what may be opened, how much of it is read.
//!
//! A checkpoint comes from strangers. A link in it could lead to any file of this machine, which would then be copied
//! into an output that is published, so links are followed inside the directory and into the blobs of a Hugging Face
//! cache only. A pipe or a device would never end.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, quoted, remedy};
use crate::units::binary;

/// A JSON file may be this large: a config.json that lists every expert's linears has a few megabytes.
pub const LARGEST_CONFIG: u64 = 16 << 20;

/// The directory that holds the files: `dir` itself, or the snapshot of a Hugging Face cache folder that `refs/main`
/// names, or its only one. Says which where there was a choice.
///
/// # Errors
/// Exit code 3 where there is no such directory, or where nothing says which snapshot is meant.
pub fn snapshot(dir: &Path) -> Result<(PathBuf, Option<String>)> {
    if !dir.is_dir() {
        return Err(no_directory(dir));
    }
    let snapshots = dir.join("snapshots");
    if dir.join("config.json").exists() || !snapshots.is_dir() {
        return Ok((dir.to_path_buf(), None));
    }
    let mut found: Vec<String> = fs::read_dir(&snapshots)
        .map_err(|e| unreadable(&snapshots, &e))?
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    found.sort();
    if let [only] = found.as_slice() {
        return Ok((snapshots.join(only), None));
    }
    let main = read(dir, "refs/main", 4096).ok().and_then(|text| String::from_utf8(text).ok());
    let main = main.as_deref().map(str::trim);
    if let Some(named) = found.iter().find(|name| Some(name.as_str()) == main) {
        let note =
            format!("the cache folder has {} snapshots; refs/main names {named}, which is used", found.len());
        return Ok((snapshots.join(named), Some(note)));
    }
    let (what, fix) = match found.first() {
        None => (
            "the cache folder has no snapshot".to_string(),
            "download the model again with hf download".into(),
        ),
        Some(first) => (
            format!(
                "the cache folder has {} snapshots, and its refs/main names none of them: {}",
                found.len(),
                found.join(", ")
            ),
            format!("give the snapshot's own directory, such as {}", snapshots.join(first).display()),
        ),
    };
    Err(Error::input(what).file(&snapshots).fix(fix))
}

/// What somebody probably meant who named something that is no directory.
fn no_directory(path: &Path) -> Error {
    let parts: Vec<_> = path.components().collect();
    let text = path.display().to_string();
    if path.exists() {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return Error::input("this is a file, and a model is a directory").file(path).fix(format!(
            "give the directory that holds config.json and the weights, such as {}",
            parent.display()
        ));
    }
    let error = Error::input("there is no such directory").file(path);
    match (parts.as_slice(), text.split_once('/')) {
        ([std::path::Component::Normal(_), std::path::Component::Normal(_)], Some((_, name))) => error.fix(format!(
            "if this is a model's name on the Hugging Face hub, download it first with: hf download {text} --local-dir {name}"
        )),
        _ => error.fix("give the path of a downloaded checkpoint; distq does not download"),
    }
}

/// Opens a file of the directory.
///
/// # Errors
/// Exit code 3, naming the file: it is missing or can't be read, it is a link that leads out of the directory, it is a
/// pipe, a device or a directory.
pub fn open(dir: &Path, name: &str) -> Result<(File, u64)> {
    let path = dir.join(name);
    let target = path.canonicalize().map_err(|e| unreadable(&path, &e))?;
    if !belongs(dir, &target) {
        return Err(Error::input(format!("the link leads out of the model's directory, to {}", target.display()))
            .file(&path)
            .fix("links are followed inside the directory and into a Hugging Face cache only: put the file itself there (cp or ln), or remove the link"));
    }
    let metadata = target.metadata().map_err(|e| unreadable(&path, &e))?;
    if !metadata.is_file() {
        return Err(Error::input("this is no regular file")
            .file(&path)
            .fix("put the file itself there, or remove it"));
    }
    let file = File::open(&target).map_err(|e| unreadable(&path, &e))?;
    Ok((file, metadata.len()))
}

/// Whether a resolved path is inside the directory or a blob of a Hugging Face cache, where the files lie that
/// snapshots and, with older versions of its tools, local directories link to.
fn belongs(dir: &Path, target: &Path) -> bool {
    let blob = |folder: &Path| {
        let repository = folder.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let kinds = ["models--", "datasets--", "spaces--"];
        folder.ends_with("blobs") && kinds.iter().any(|kind| repository.starts_with(kind))
    };
    let Ok(dir) = dir.canonicalize() else { return false };
    let cache = dir.parent().filter(|parent| parent.ends_with("snapshots")).and_then(Path::parent);
    target.starts_with(&dir)
        || target
            .parent()
            .is_some_and(|folder| blob(folder) || cache.is_some_and(|cache| folder == cache.join("blobs")))
}

/// Reads a file of the directory.
///
/// # Errors
/// Exit code 3, naming the file: as for [`open`], more than `largest` bytes, a git-lfs pointer in its place.
pub fn read(dir: &Path, name: &str, largest: u64) -> Result<Vec<u8>> {
    let path = dir.join(name);
    let (file, length) = bounded(dir, name, largest)?;
    let mut bytes = Vec::with_capacity(length as usize);
    // The file may grow while it is read.
    file.take(largest).read_to_end(&mut bytes).map_err(|e| unreadable(&path, &e))?;
    match is_pointer(&bytes) {
        true => Err(pointer(&path)),
        false => Ok(bytes),
    }
}

/// Whether [`read`] would take a file, from its first bytes.
///
/// # Errors
/// As [`read`].
pub fn check(dir: &Path, name: &str, largest: u64) -> Result<()> {
    let path = dir.join(name);
    let (file, _) = bounded(dir, name, largest)?;
    let mut start = Vec::new();
    file.take(64).read_to_end(&mut start).map_err(|e| unreadable(&path, &e))?;
    if is_pointer(&start) { Err(pointer(&path)) } else { Ok(()) }
}

fn bounded(dir: &Path, name: &str, largest: u64) -> Result<(File, u64)> {
    let (file, length) = open(dir, name)?;
    if length > largest {
        let what =
            format!("the file has {}, more than the {} that distq reads", binary(length), binary(largest));
        return Err(Error::input(what).file(dir.join(name)).fix("check that this is the right file"));
    }
    Ok((file, length))
}

/// Whether these are the first bytes of what git keeps in the place of a large file.
pub fn is_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}

/// The error for a git-lfs pointer.
pub fn pointer(path: &Path) -> Error {
    let dir = path.parent().unwrap_or(Path::new("."));
    Error::input("this is a git-lfs pointer: git cloned the repository without its large files")
        .file(path)
        .fix(format!(
            "fetch them with: git -C {} lfs pull, or download the model with hf download",
            quoted(&dir.display().to_string())
        ))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::input(format!("can't read: {error}"))
        .file(path)
        .fix(remedy(error).unwrap_or("check that the file exists and that you may read it"))
}
