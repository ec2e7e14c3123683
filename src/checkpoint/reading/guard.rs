//! A source file that shrinks, or can't be read, under a mapping: the kernel answers the access with SIGBUS, whose
//! default is a death without a word.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Once};

use crate::last_words;

/// A mapped file, in a list that only grows: a signal handler reads it without a lock.
struct Mapped {
    descriptor: RawFd,
    bytes: u64,
    became_shorter: String,
    next: *const Mapped,
}

static FILES: AtomicPtr<Mapped> = AtomicPtr::new(std::ptr::null_mut());
static HANDLER: Once = Once::new();

/// From now on, an access to a mapping of this file of `bytes` bytes that fails ends the process with exit code 5 and
/// the file's name.
pub fn watch(file: &Arc<File>, path: &Path, bytes: u64) {
    // Kept open for good: a number that is used again must not name another file.
    let file: &'static Arc<File> = Box::leak(Box::new(file.clone()));
    let became_shorter = format!(
        "the file became shorter than {bytes} bytes while it was in use ({}); restore the source and use --resume",
        path.display()
    );
    let node = Box::leak(Box::new(Mapped {
        descriptor: file.as_raw_fd(),
        bytes,
        became_shorter,
        next: FILES.load(Ordering::Acquire),
    }));
    while let Err(now) =
        FILES.compare_exchange(node.next.cast_mut(), node, Ordering::AcqRel, Ordering::Acquire)
    {
        node.next = now;
    }
    HANDLER.call_once(|| {
        // SAFETY: the handler calls fstat and what `last_words` calls, takes no lock, and allocates nothing.
        let registered = unsafe { signal_hook::low_level::register(signal_hook::consts::SIGBUS, failed) };
        if let Err(error) = registered {
            tracing::warn!("can't listen for SIGBUS: {error}");
        }
    });
}

/// Says which file it was, and ends the process.
fn failed() {
    let mut node: *const Mapped = FILES.load(Ordering::Acquire);
    // SAFETY: nodes are never freed nor changed once they are in the list.
    while let Some(file) = unsafe { node.as_ref() } {
        // SAFETY: plain data, for which zero is a value.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is kept open, and `stat` is written only.
        if unsafe { libc::fstat(file.descriptor, &mut stat) } == 0 && (stat.st_size as u64) < file.bytes {
            last_words::end(&file.became_shorter);
        }
        node = file.next;
    }
    last_words::end(
        "a mapped file of the source can't be read; check the disk or the network it is on, then use --resume",
    );
}
