//! The names of files with hidden states, their digests, and operations on single files.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::schedule::Kept;

/// How the name of a run's directory begins.
pub const PREFIX: &str = "distq-";
/// How the name of a complete file ends.
pub const SUFFIX: &str = ".states";
/// How the name of a file that is being written ends.
pub const UNFINISHED: &str = ".unfinished";
/// Bytes of the digest at the end of a file.
pub const DIGEST: usize = blake3::OUT_LEN;

/// The path of a file in a run's directory: `LAYER-START-END.states`, where START..END are the documents.
pub fn path(dir: &Path, Kept { layer, documents }: &Kept) -> PathBuf {
    dir.join(format!("{layer}-{}-{}{SUFFIX}", documents.start, documents.end))
}

/// A hasher that has already read the names of a file and of its directory. The rows follow, so that the digest of a
/// renamed file, or of one from another run, does not match.
pub fn seeded(path: &Path) -> blake3::Hasher {
    let mut digest = blake3::Hasher::new();
    for name in [path.parent().and_then(Path::file_name), path.file_name()].into_iter().flatten() {
        digest.update(name.as_encoded_bytes()).update(b"/");
    }
    digest
}

/// Creates a file of a random name that only this user can read. It is removed when dropped.
pub fn temporary(dir: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(PREFIX).suffix(UNFINISHED).tempfile_in(dir)
}

/// Removes a file. That it is gone already is no error: on a shared disk another rank may have removed it.
pub fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The error of an operation on `path`, with exit code 5.
pub fn failed(what: &str, path: &Path, error: std::io::Error) -> Error {
    Error::run(format!("{what}: {error}"))
        .file(path)
        .fix("free some space there or name another --work-dir, then use --resume")
}
