//! What people see: the plan, progress, the closing table, JSON. The only room that prints results.

mod evaluation;
mod html;
mod inspect;
mod page;
mod place;
mod run;
mod timeline;
mod write;

pub use inspect::{Inspection, inspect};
pub use place::try_place;
pub use run::{Health, RankReport, RunReport, Seconds};

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use crate::error::{Error, Result, printable};

/// Characters of a printed line at most: names in tables come from checkpoints.
const LONGEST_LINE: usize = 1000;

/// Prints a result for people on standard output. Rank 0 calls it, once for each thing.
///
/// # Errors
/// Exit code 5 where standard output can't be written to, as a file on a full disk. A reader that has left, as `head`
/// does, is no error.
pub fn print(what: &impl Display) -> Result<()> {
    let lines = what.to_string();
    written(lines.lines().map(|line| printable(line, LONGEST_LINE) + "\n").collect())
}

/// Prints a result for programs on standard output, as JSON.
///
/// # Errors
/// As [`print()`].
pub fn print_json(what: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(what).expect("reports are plain data");
    // Control characters only stand in strings, where JSON knows the same escapes.
    written(text.lines().map(|line| printable(line, usize::MAX) + "\n").collect())
}

fn written(text: String) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::run(format!("can't write to standard output: {e}"))
                .fix("send the output to a place that can take it"))
        }
        _ => Ok(()),
    }
}
