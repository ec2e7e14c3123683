//! Ending together: one message, one exit code, no rank left behind.

use std::io::Write;

use super::{Cluster, launch, transport};
use crate::error::{ExitCode, Result};

impl Cluster {
    /// Text prefixed with the rank and the host it comes from, where there is more than one.
    pub(super) fn place(&self, text: &str) -> String {
        if self.size > 1 { format!("rank {} ({}): {text}", self.rank, self.host) } else { text.to_string() }
    }

    /// Turns the result of a run into the process's exit code. A failure that every rank knows of is
    /// printed by rank 0 and all leave in order; any other is printed here and takes the other ranks down.
    pub fn conclude(self, result: Result<()>) -> i32 {
        let Err(error) = result else { return ExitCode::Done as i32 };
        let code = error.exit as i32;
        if self.size == 1 {
            say(&error.to_string());
            return code;
        }
        if !self.agreed.get() {
            // Rank 0 passes on what others reported to it; its text already names them.
            say(&if error.is_reported() { error.to_string() } else { self.place(&error.to_string()) });
            abort(code);
        }
        if self.is_root() {
            say(&error.to_string());
        }
        super::signals::disregard();
        // A launcher kills the other ranks when the first one leaves with a failure: let rank 0 speak first.
        let _ = self.barrier();
        code
    }
}

/// Ends every rank of the job at once with this exit code.
pub fn abort(code: i32) -> ! {
    if launch().is_some() { transport::abort(code) } else { std::process::exit(code) }
}

/// A rank that panics would otherwise wait for ever in MPI's finalisation, and the others for it.
pub(super) fn install_panic_hook(cluster: &Cluster) {
    let who = cluster.place("");
    std::panic::set_hook(Box::new(move |info| {
        say(&format!("{who}internal error: {info}; please report it with the command that led here"));
        abort(ExitCode::Run as i32);
    }));
}

pub(super) fn say(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "distq: {text}");
    let _ = stderr.flush();
}
