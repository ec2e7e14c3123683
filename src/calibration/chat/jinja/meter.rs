//! Limits on what a template may use, and how it fails.

use std::cell::Cell;
use std::fmt;

/// Steps that one conversation may take: some seconds of work.
const MOST_STEPS: u64 = 10_000_000;
/// Bytes that one conversation's values and text may take, counting what was dropped again.
const MOST_BYTES: u64 = 256 << 20;
/// Bytes of which the work is that of one step.
const BYTES_PER_STEP: u64 = 32;
/// Calls, statements and expressions inside each other.
const MOST_NESTED: u32 = 1500;
/// Containers inside each other.
const DEEPEST_VALUE: u32 = 200;

/// Why a template does not compile or does not render.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What happened.
    pub message: String,
    /// The template's line, from 1, where it is known.
    pub line: Option<u32>,
    /// The template took more time or memory than any may, so that no other conversation is to be tried.
    pub limit: bool,
}

/// The result of everything that can fail here.
pub type Outcome<T> = Result<T, Fault>;

impl Fault {
    /// A fault whose line the caller adds.
    pub fn new(message: impl Into<String>) -> Fault {
        Fault { message: message.into(), line: None, limit: false }
    }

    fn limit(message: &str) -> Fault {
        Fault { limit: true, ..Fault::new(message) }
    }

    /// Adds the line, unless a line further inside is known.
    pub fn at(mut self, line: u32) -> Fault {
        self.line = self.line.or(Some(line));
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{} (line {line} of the template)", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Ends with a fault.
pub fn fail<T>(message: impl Into<String>) -> Outcome<T> {
    Err(Fault::new(message))
}

/// Counts what a rendering uses.
#[derive(Default)]
pub struct Meter {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    nested: Cell<u32>,
}

impl Meter {
    /// One step.
    pub fn step(&self) -> Outcome<()> {
        self.steps.set(self.steps.get() + 1);
        if self.steps.get() > MOST_STEPS {
            return Err(Fault::limit("it does not end: it takes more steps than any chat template needs"));
        }
        Ok(())
    }

    /// Looks at this many bytes or items.
    pub fn work(&self, amount: usize) -> Outcome<()> {
        self.steps.set(self.steps.get().saturating_add(amount as u64 / BYTES_PER_STEP));
        self.step()
    }

    /// Takes memory; to be called before it is taken.
    pub fn take(&self, bytes: usize) -> Outcome<()> {
        self.bytes.set(self.bytes.get().saturating_add(bytes as u64));
        if self.bytes.get() > MOST_BYTES {
            return Err(Fault::limit("it makes more text or values than memory is set aside for"));
        }
        self.work(bytes)
    }

    /// The nesting of a container around others, which is not to grow without end.
    pub fn deeper(&self, inside: u32) -> Outcome<u32> {
        if inside >= DEEPEST_VALUE {
            return fail("it puts lists into lists without end");
        }
        Ok(inside + 1)
    }

    /// Runs something one level further inside.
    pub fn nest<T>(&self, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        if self.nested.get() >= MOST_NESTED {
            return fail("its macros, loops or expressions are nested without end");
        }
        self.nested.set(self.nested.get() + 1);
        let outcome = work();
        self.nested.set(self.nested.get() - 1);
        outcome
    }
}
