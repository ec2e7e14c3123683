//! The names of files with hidden states, and what directories and files are treated alike with.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::schedule::Kept;

pub const PREFIX: &str = "distq-";
pub const SUFFIX: &str = ".states";
pub const UNFINISHED: &str = ".unfinished";
/// Bytes of the digest at the end of a file.
pub const DIGEST: usize = blake3::OUT_LEN;

pub fn path(dir: &Path, Kept { layer, documents }: &Kept) -> PathBuf {
    dir.join(format!("{layer}-{}-{}{SUFFIX}", documents.start, documents.end))
}

/// The digest of a file's name and of the run's, to go on with its rows.
pub fn seeded(path: &Path) -> blake3::Hasher {
    let mut digest = blake3::Hasher::new();
    for name in [path.parent().and_then(Path::file_name), path.file_name()].into_iter().flatten() {
        digest.update(name.as_encoded_bytes()).update(b"/");
    }
    digest
}

/// A file of a random name that did not exist, for this user alone; removed when dropped.
pub fn temporary(dir: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(PREFIX).suffix(UNFINISHED).tempfile_in(dir)
}

/// Removes a file; on a shared disk another rank may have been faster.
pub fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

pub fn failed(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::run(format!("{what}: {error}"))
        .file(path)
        .fix("free some space there or name another --work-dir, then use --resume")
}
