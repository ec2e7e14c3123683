//! One error type for the whole program: what is wrong, where, and what to do.
//!
//! An [`Error`] carries the [`ExitCode`] that the process ends with. Its text is
//! written for the person who reads it on a terminal: the fault first, then the
//! place (file, tensor), then the remedy. The rank and the host are added by
//! whoever prints it, because only that layer knows them.

use std::fmt;
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
        write!(f, "{}", self.what)?;
        match (&self.file, &self.tensor) {
            (Some(file), Some(tensor)) => write!(f, " ({}, tensor {tensor})", file.display())?,
            (Some(file), None) => write!(f, " ({})", file.display())?,
            (None, Some(tensor)) => write!(f, " (tensor {tensor})")?,
            (None, None) => {}
        }
        match &self.fix {
            Some(fix) => write!(f, "; {fix}"),
            None => Ok(()),
        }
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
