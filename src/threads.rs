//! Threads by name, and what is said where the system refuses one.

use std::thread::JoinHandle;

use rayon::ThreadPool;

use crate::error::{Error, Result};

/// `threads` threads of their own for parallel work, named after what they do.
///
/// # Errors
/// Exit code 5 where the system refuses them.
pub fn pool(name: &'static str, threads: usize) -> Result<ThreadPool> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.thread_name(move |i| format!("{name}-{i}")).build().map_err(|e| refused(name, &e))
}

/// Starts a thread.
///
/// # Errors
/// Exit code 5 where the system refuses it.
pub fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name.into()).spawn(work).map_err(|e| refused(name, &e))
}

fn refused(name: &str, error: &dyn std::fmt::Display) -> Error {
    Error::run(format!("can't start a thread ({name}): {error}"))
        .fix("free memory, or allow more threads (ulimit -u, a container's pids.max)")
}
