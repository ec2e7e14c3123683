//! One run at a time for an output: a lock on a file in its directory, which the system releases when the process ends,
//! however it ends.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::writer::failed;
use crate::error::{Error, Result};

/// The file that is locked.
pub(in crate::checkpoint) const LOCK: &str = "distq-lock";

/// Bytes of the file that are read at most: it names a process and a host.
const LONGEST: u64 = 300;

/// A lock that is held until it is dropped or the process ends.
#[derive(Debug)]
pub(in crate::checkpoint) struct Lock {
    _file: File,
}

impl Lock {
    /// Locks `dir` for this process, on this host and on others that see the directory.
    ///
    /// # Errors
    /// Exit code 2, naming the process and its host, where another process holds the lock; 5 where the file system
    /// refuses the file.
    pub(in crate::checkpoint) fn acquire(dir: &Path) -> Result<Lock> {
        let path = dir.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&path).map_err(|e| failed("can't open the lock", &path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(&mut file, dir)),
            Err(TryLockError::Error(error)) => tracing::warn!(
                "{}: the file system has no locks ({error}); do not start a second run with this output",
                dir.display()
            ),
        }
        // The run that held the lock may have published or removed the directory between the two calls.
        let opened = file.metadata().map_err(|e| failed("can't read the lock", &path, e))?;
        let there = fs::symlink_metadata(&path).ok();
        if there.is_none_or(|there| (there.dev(), there.ino()) != (opened.dev(), opened.ino())) {
            return Err(Error::usage("another run published or removed this directory just now")
                .file(dir)
                .fix("look whether the output is there, and start again where it is not"));
        }
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let holder = format!("process {} on host {}\n", std::process::id(), host.trim());
        // Only for the message that a second run gets, so a full disk does not matter.
        let _ = file.set_len(0).and_then(|()| file.write_all(holder.as_bytes()));
        Ok(Lock { _file: file })
    }
}

/// Says who holds the lock, as far as the file tells.
fn held(file: &mut File, dir: &Path) -> Error {
    let mut holder = String::new();
    let read = file.take(LONGEST).read_to_string(&mut holder);
    let holder = match read {
        Ok(_) if !holder.trim().is_empty() => holder.trim(),
        _ => "another process",
    };
    Error::usage(format!("another run is writing this output: {holder}"))
        .file(dir)
        .fix("wait until it has ended, or choose another name for the output")
}
