//! Work on files that strangers made, done by libraries that may panic over them, ask for any amount of memory or never
//! end.
//!
//! The work runs on a thread of its own. A panic there ends the thread alone, and its allocations are counted: a thread
//! that wants more than its share is stopped for good. One that does not get on is left behind. In each case the caller
//! gets an error that names the file.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::units::binary;

/// What confined work may take.
pub struct Limits {
    /// Bytes of memory that it may hold.
    pub memory: usize,
    /// Seconds from one [`suspect`] to the next.
    pub seconds: usize,
}

impl Limits {
    /// Enough for reading a file and tokenizing a document: tokenizers with 262,144 entries need a quarter of this memory
    /// while they are read, and seconds.
    pub const USUAL: Limits = Limits { memory: 2 << 30, seconds: 300 };

    /// Enough for tokenizing so many bytes of text at once.
    pub fn for_text(bytes: usize) -> Limits {
        // Positions, tokens and their copies take some hundred times the text; a slow core does 100 kB in a second.
        let Limits { memory, seconds } = Limits::USUAL;
        Limits { memory: memory + bytes.saturating_mul(256), seconds: seconds + bytes / 100_000 }
    }
}

/// How often the caller looks whether the work gets on. It counts these looks and reads no clock, so that a process that
/// was stopped for a while goes on.
const LOOK: Duration = Duration::from_millis(20);

/// Libraries parse nested structures recursively.
const STACK: usize = 32 << 20;

/// The file that is being worked on, and what to do if it can't be used.
struct Suspect {
    what: String,
    file: PathBuf,
    fix: String,
}

impl Suspect {
    fn error(&self, why: &str) -> Error {
        Error::input(format!("{} can't be used: {why}", self.what)).file(&self.file).fix(self.fix.as_str())
    }
}

#[derive(Default)]
struct Confinement {
    suspect: Mutex<Option<Suspect>>,
    /// Counts the suspects.
    steps: AtomicUsize,
    is_over: AtomicBool,
}

thread_local! {
    static CONFINEMENT: RefCell<Option<Arc<Confinement>>> = const { RefCell::new(None) };
    // Apart from the above, because the allocator reads them: neither allocates nor needs to be dropped.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    static OVER: Cell<Option<&'static AtomicBool>> = const { Cell::new(None) };
}

/// Does `work` on a confined thread.
///
/// # Errors
/// Exit code 3, naming the file of the last [`suspect`], where the work panics or goes beyond its limits; the work's own
/// error otherwise.
pub fn run<T: Send + 'static>(
    Limits { memory, seconds }: Limits,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    // The allocator of a stopped thread may look at it at any time, so it is never freed.
    let confinement: &'static Arc<Confinement> = Box::leak(Box::default());
    let (sender, receiver) = channel();
    let confined = move || {
        CONFINEMENT.set(Some(confinement.clone()));
        OVER.set(Some(&confinement.is_over));
        LEFT.set(Some(memory));
        let result = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        // Nobody listens where the caller is gone.
        let _ = sender.send(result.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or(panic.downcast_ref::<&str>().map(|text| text.to_string())).unwrap_or_default()
        }));
    };
    std::thread::Builder::new()
        .name("confined".into())
        .stack_size(STACK)
        .spawn(confined)
        .map_err(|e| Error::run(format!("can't start a thread: {e}")))?;
    let error = |why: &str| {
        let suspect = confinement.suspect.lock().expect("no holder of this lock panics");
        match suspect.as_ref() {
            Some(suspect) => suspect.error(why),
            None => Error::input(format!("a file can't be used: {why}")),
        }
    };
    let (mut seen, mut looks) = (0, 0);
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(Ok(result)) => return result,
            Ok(Err(panic)) => return Err(error(&format!("the library that reads it gave up ({panic})"))),
            Err(_) if confinement.is_over.load(Ordering::Acquire) => {
                return Err(error(&format!("it takes more than {} of memory", binary(memory as u64))));
            }
            Err(_) => {
                let steps = confinement.steps.load(Ordering::Relaxed);
                looks = if steps == seen { looks + 1 } else { 0 };
                seen = steps;
            }
        }
        if looks > seconds.saturating_mul(1000 / LOOK.as_millis() as usize) {
            return Err(error(&format!("it is not done after {seconds} seconds")));
        }
    }
}

/// From now on it is this file's fault where the confined work of this thread fails; `what` it is, and what to do.
pub fn suspect(what: &str, file: &Path, fix: &str) {
    CONFINEMENT.with_borrow(|confinement| {
        if let Some(confinement) = confinement {
            let suspect = Suspect { what: what.into(), file: file.into(), fix: fix.into() };
            *confinement.suspect.lock().expect("no holder of this lock panics") = Some(suspect);
            confinement.steps.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// Whether this thread is confined: its panics are no fault of the program.
pub fn is_here() -> bool {
    LEFT.get().is_some()
}

/// Counts what a confined thread allocates. Stops it for good where that is too much. Allocates nothing.
pub fn allocated(size: usize) {
    // A thread that is ending has no thread-local values any more.
    let Ok(Some(left)) = LEFT.try_with(Cell::get) else { return };
    match left.checked_sub(size) {
        Some(left) => LEFT.set(Some(left)),
        None => {
            if let Some(over) = OVER.get() {
                over.store(true, Ordering::Release);
            }
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
    }
}

/// Counts what a confined thread gives back.
pub fn freed(size: usize) {
    if let Ok(Some(left)) = LEFT.try_with(Cell::get) {
        LEFT.set(Some(left.saturating_add(size)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_that_names_the_file() {
        let error = run::<()>(Limits::USUAL, || {
            suspect("the tokenizer", Path::new("a/tokenizer.json"), "download it again");
            panic!("index out of bounds")
        });
        let text = error.unwrap_err().to_string();
        assert!(
            ["a/tokenizer.json", "index out of bounds", "download"].iter().all(|word| text.contains(word)),
            "{text}"
        );
        assert!(!is_here());
    }

    #[test]
    fn what_wants_all_memory_is_stopped() {
        let greedy = || {
            suspect("the file", Path::new("bomb"), "use another one");
            let parts: Vec<Vec<u8>> = (0..64).map(|_| Vec::with_capacity(64 << 20)).collect();
            Ok(parts.len())
        };
        assert!(run(Limits::USUAL, greedy).unwrap_err().to_string().contains("2.00 GiB"));
    }

    #[test]
    fn what_does_not_get_on_is_left_behind() {
        let slow = |steps: u64| {
            move || {
                for _ in 0..steps {
                    suspect("the file", Path::new("slow"), "use another one");
                    std::thread::sleep(Duration::from_millis(3000 / steps));
                }
                Ok(())
            }
        };
        let limits = || Limits { memory: 1 << 20, seconds: 1 };
        assert!(run(limits(), slow(1)).unwrap_err().to_string().contains("not done after 1 seconds"));
        assert!(run(limits(), slow(15)).is_ok());
    }

    #[test]
    fn memory_that_is_given_back_does_not_count() {
        let modest = || Ok((0..64).map(|_| Vec::<u8>::with_capacity(64 << 20).capacity()).sum::<usize>());
        assert_eq!(run(Limits::USUAL, modest).unwrap(), 4 << 30);
    }
}
