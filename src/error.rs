//! One error type for the whole program: what is wrong, where, and what to do.
//!
//! An [`Error`] carries the [`ExitCode`] that the process ends with. Its text is
//! written for the person who reads it on a terminal: the fault first, then the
//! place (file, tensor), then the remedy. The rank and the host are added by
//! whoever prints it, because only that layer knows them.
//!
//! Names come from checkpoints, that is, from strangers: what could steer a terminal is escaped, and what is too
//! long to be read is cut, here for every error and with [`printable`] for everything else that is printed.

use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

/// How the process ends. The numbers are part of the command line's contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ExitCode {
    /// Finished.
    Done = 0,
    /// The arguments make no sense.
    Usage = 2,
    /// The checkpoint or the calibration data can't be used.
    Input = 3,
    /// The model does not fit, or the requested split is impossible.
    Plan = 4,
    /// A rank, a device or a disk failed, or the health check found NaN or zero.
    Run = 5,
    /// Verification found the output wrong.
    Verify = 6,
}

impl ExitCode {
    /// The code with this number, for codes that crossed the wire; unknown numbers are [`ExitCode::Run`].
    pub fn from_number(n: i32) -> ExitCode {
        match n {
            0 => ExitCode::Done,
            2 => ExitCode::Usage,
            3 => ExitCode::Input,
            4 => ExitCode::Plan,
            6 => ExitCode::Verify,
            _ => ExitCode::Run,
        }
    }
}

/// An error for the person at the terminal.
#[derive(Clone, Debug)]
pub struct Error {
    /// What the process ends with.
    pub exit: ExitCode,
    what: String,
    file: Option<PathBuf>,
    tensor: Option<String>,
    fix: Option<String>,
    reported: bool,
}

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn new(exit: ExitCode, what: impl Into<String>) -> Error {
        Error { exit, what: what.into(), file: None, tensor: None, fix: None, reported: false }
    }

    /// The arguments make no sense (exit code 2).
    pub fn usage(what: impl Into<String>) -> Error {
        Error::new(ExitCode::Usage, what)
    }

    /// The checkpoint or the data can't be used (exit code 3).
    pub fn input(what: impl Into<String>) -> Error {
        Error::new(ExitCode::Input, what)
    }

    /// The plan is impossible (exit code 4).
    pub fn plan(what: impl Into<String>) -> Error {
        Error::new(ExitCode::Plan, what)
    }

    /// Something failed while running (exit code 5).
    pub fn run(what: impl Into<String>) -> Error {
        Error::new(ExitCode::Run, what)
    }

    /// The output is wrong (exit code 6).
    pub fn verify(what: impl Into<String>) -> Error {
        Error::new(ExitCode::Verify, what)
    }

    /// An error with this code whose text is already complete, as it arrives from another rank.
    pub fn reported(exit: ExitCode, text: impl Into<String>) -> Error {
        Error { reported: true, ..Error::new(exit, text) }
    }

    /// Whether the text came from another rank and already says from which.
    pub fn is_reported(&self) -> bool {
        self.reported
    }

    /// Names the file that is at fault.
    pub fn file(mut self, file: impl AsRef<Path>) -> Error {
        self.file = Some(file.as_ref().to_path_buf());
        self
    }

    /// Names the tensor that is at fault.
    pub fn tensor(mut self, tensor: impl Into<String>) -> Error {
        self.tensor = Some(tensor.into());
        self
    }

    /// Says what to do about it, as an imperative sentence without a full stop.
    pub fn fix(mut self, fix: impl Into<String>) -> Error {
        self.fix = Some(fix.into());
        self
    }
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", printable(&self.what, LONGEST_TEXT))?;
        let file = self.file.as_ref().map(|file| printable(&file.display().to_string(), LONGEST_PATH));
        let tensor = self.tensor.as_ref().map(|tensor| printable(tensor, LONGEST_NAME));
        match (file, tensor) {
            (Some(file), Some(tensor)) => write!(f, " ({file}, tensor {tensor})")?,
            (Some(file), None) => write!(f, " ({file})")?,
            (None, Some(tensor)) => write!(f, " (tensor {tensor})")?,
            (None, None) => {}
        }
        match &self.fix {
            Some(fix) => write!(f, "; {}", printable(fix, LONGEST_TEXT)),
            None => Ok(()),
        }
    }
}

/// Characters of a name that are printed at most.
pub const LONGEST_NAME: usize = 200;
const LONGEST_PATH: usize = 1000;
const LONGEST_TEXT: usize = 2000;

/// Text from outside as it may be printed: control characters, and those that change the direction of text or begin
/// a line, are escaped as JSON escapes them; of text with more characters than `longest` the middle is left out.
pub fn printable(text: &str, longest: usize) -> String {
    let mut shown = String::with_capacity(text.len().min(longest.saturating_mul(4)));
    let length = text.chars().count();
    let (head, tail) = if length > longest { (longest * 2 / 3, longest / 3) } else { (length, 0) };
    let mut put = |part: &mut dyn Iterator<Item = char>| {
        for c in part {
            let _ = match c {
                _ if !steers(c) => write!(shown, "{c}"),
                _ => write!(shown, "\\u{:04x}", c as u32),
            };
        }
    };
    put(&mut text.chars().take(head));
    if length > longest {
        put(&mut format!("[{} characters left out]", length - head - tail).chars());
        put(&mut text.chars().skip(length - tail));
    }
    shown
}

/// Whether a terminal may obey a character instead of showing it.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Text as one word of a shell's command line, for commands that a message gives to be pasted.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,".contains(c);
    match !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// What helps against an error of the system where distq knows better than "check that the file is readable".
pub fn remedy(error: &std::io::Error) -> Option<&'static str> {
    match error.raw_os_error() {
        Some(libc::EMFILE) => Some(
            "this process may open no more files: raise its limit with ulimit -n 65536 (a batch system or container \
             may need an option for that), then run the command again",
        ),
        Some(libc::ENFILE) => {
            Some("the system has no more open files to give: raise fs.file-max with sysctl")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_fault_place_and_remedy_in_this_order() {
        let error = Error::input("truncated").file("a.safetensors").tensor("w").fix("download it again");
        assert_eq!(error.to_string(), "truncated (a.safetensors, tensor w); download it again");
        assert_eq!(error.exit, ExitCode::Input);
    }

    #[test]
    fn names_from_outside_can_neither_steer_a_terminal_nor_fill_it() {
        let error = Error::input("no \u{1b}[2J")
            .file("a\n\u{9b}31m")
            .tensor(format!("{}é", "w\u{7}".repeat(200_000)));
        let text = error.to_string();
        assert!(text.starts_with("no \\u001b[2J (a\\u000a\\u009b31m, tensor w\\u0007w"), "{text}");
        assert!(text.ends_with("é)") && text.contains("399802 characters left out"), "{text}");
        assert!(text.len() < 1500 && !text.chars().any(char::is_control), "{text}");
        assert_eq!(printable("model.layers.0.ü\u{202e}", 200), "model.layers.0.ü\\u202e");
        // What came from another rank has been escaped there, and stays as it is.
        assert_eq!(Error::reported(ExitCode::Run, text.clone()).to_string(), text);
    }

    #[test]
    fn a_pasted_command_runs_nothing_that_a_name_says() {
        assert_eq!(quoted("/models/a-7b.v1"), "/models/a-7b.v1");
        for (text, word) in [("a b", "'a b'"), ("-rf", "'-rf'"), ("$(id)", "'$(id)'"), ("it's", r"'it'\''s'")]
        {
            assert_eq!(quoted(text), word);
        }
    }

    #[test]
    fn codes_survive_the_wire() {
        for code in [
            ExitCode::Done,
            ExitCode::Usage,
            ExitCode::Input,
            ExitCode::Plan,
            ExitCode::Run,
            ExitCode::Verify,
        ] {
            assert_eq!(ExitCode::from_number(code as i32), code);
        }
    }
}
