//! The one place where threads are made: by name, and with what is said where the system refuses one.

use std::thread::{JoinHandle, Scope, ScopedJoinHandle};

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

/// Starts the common threads for parallel work, on which everything computes that has no threads of its own.
///
/// # Errors
/// Exit code 5 where the system refuses them.
pub fn start_common(threads: usize) -> Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.thread_name(|i| format!("common-{i}")).build_global().map_err(|e| refused("common", &e))
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

/// Starts a thread that ends within a scope.
///
/// # Errors
/// Exit code 5 where the system refuses it.
pub fn scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    std::thread::Builder::new().name(name.into()).spawn_scoped(scope, work).map_err(|e| refused(name, &e))
}

/// What a thread came to. A panic ends the whole process before anybody can wait for the thread.
pub fn value<T>(joined: std::thread::Result<T>) -> T {
    joined.expect("a thread that panics ends the process")
}

/// What it means that the system refuses a thread.
pub const REFUSED: &str = "out of memory, or of threads that the system allows";
/// What to do about it.
pub const REMEDY: &str = "free some memory, allow more threads (ulimit -u, a container's pids.max) or more memory (ulimit \
                          -v), or give this rank fewer layers or less with --memory-per-rank; then use --resume where \
                          the run had begun";

fn refused(name: &str, error: &dyn std::fmt::Display) -> Error {
    Error::run(format!("{REFUSED}: the thread {name:?} can't be started: {error}")).fix(REMEDY)
}
