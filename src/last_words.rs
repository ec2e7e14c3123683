//! What a rank says when it can't go on at all: no memory, or a mapping that can't be read. Nothing here allocates,
//! locks or returns, so it may be called from an allocator and from a signal handler.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

use crate::confined;
use crate::error::ExitCode;

/// Rank and host, where there are several.
static SPEAKER: OnceLock<String> = OnceLock::new();

/// Last words that the main thread may pass on to the other ranks, or [`TAKEN`]. It points to the text's address and
/// length, which lie together on the stack of a thread that never returns.
static WORDS: AtomicPtr<&'static str> = AtomicPtr::new(std::ptr::null_mut());

/// How long the process is given to be ended by the thread that has taken it upon itself.
// A test leaves threads behind that wait for this long, and must not end the other tests with them.
const PATIENCE: Duration = if cfg!(test) { Duration::from_secs(3600) } else { Duration::from_secs(15) };

/// What [`WORDS`] points to when the main thread has them: it ends the process.
static TAKEN: &str = "";

/// From now on, last words begin with this: the rank and the host. Where it is not empty, the main thread asks for them
/// with [`taken`].
pub fn speak_for(speaker: String) {
    // Set once, when the job starts.
    let _ = SPEAKER.set(speaker);
}

/// The last words of another thread, once: whoever takes them ends the job.
pub fn taken() -> Option<&'static str> {
    let taken = (&raw const TAKEN).cast_mut();
    let words = WORDS.load(Ordering::Acquire);
    if words.is_null() || words == taken {
        return None;
    }
    WORDS.store(taken, Ordering::Release);
    // SAFETY: it points to a text's address and length that were written before it was stored, that do not change and
    // that live on with the text, since the thread that left them never returns.
    Some(unsafe { *words })
}

/// Ends the job with exit code 5 and one line: through the main thread, so that all ranks leave with one message, or,
/// where that does not listen or there are no others, at once. A launcher then ends the other ranks.
pub fn end(words: &str) -> ! {
    let speaker = SPEAKER.get().map_or("", String::as_str);
    if !speaker.is_empty() {
        let mine = (&raw const words).cast_mut().cast::<&'static str>();
        let (nothing, taken) = (std::ptr::null_mut(), (&raw const TAKEN).cast_mut());
        if WORDS.compare_exchange(nothing, mine, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // Another thread has spoken, and ends the process. If that can't go on either, this one does.
            std::thread::sleep(PATIENCE);
        }
        // Sleeping is a system call and nothing else.
        std::thread::sleep(Duration::from_secs(2));
        if WORDS.load(Ordering::Acquire) == taken {
            // Taken: the main thread ends the process.
            std::thread::sleep(PATIENCE);
        }
    }
    let parts = ["distq: ", speaker, words, "\n"]
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    // SAFETY: both may be called anywhere, and the parts are valid for their lengths; writev only reads them.
    unsafe {
        libc::writev(libc::STDERR_FILENO, parts.as_ptr(), parts.len() as i32);
        libc::_exit(ExitCode::Run as i32)
    }
}

/// The system's allocator, with a message that says who ran out of memory and what to do. It counts for [`confined`]
/// threads.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

// SAFETY: every call is the system allocator's, and what it can't give ends the process.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        confined::allocated(layout.size());
        // SAFETY: as the caller promises.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        confined::allocated(layout.size());
        // SAFETY: as the caller promises.
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        confined::allocated(size);
        confined::freed(layout.size());
        // SAFETY: as the caller promises.
        given(unsafe { System.realloc(old, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        confined::freed(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn given(memory: *mut u8, bytes: usize) -> *mut u8 {
    if memory.is_null() {
        out_of_memory(bytes);
    }
    memory
}

#[cold]
fn out_of_memory(bytes: usize) -> ! {
    let mut words = [0; 160];
    let mut rest = &mut words[..];
    // Formatting a number into a buffer allocates nothing; a line that does not fit is cut.
    let _ = write!(
        rest,
        "out of memory: the system gives no {bytes} bytes more; free some, give this rank fewer layers or less \
         --memory-per-rank, then use --resume"
    );
    let left = rest.len();
    end(std::str::from_utf8(&words[..words.len() - left]).unwrap_or("out of memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two threads that can't go on at the same moment: one of them is heard, whole, and the other not at all.
    #[test]
    fn of_two_last_words_one_is_passed_on() {
        const LONG: &str = "a line of some length, and of a length that the other one does not have";
        speak_for("rank 1 (test): ".into());
        for words in ["short", LONG] {
            std::thread::spawn(move || end(words));
        }
        let heard = loop {
            match taken() {
                Some(words) => break words,
                None => std::thread::yield_now(),
            }
        };
        assert!(heard == "short" || heard == LONG, "{heard}");
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(taken(), None);
    }
}
