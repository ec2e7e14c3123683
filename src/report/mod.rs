//! What people see: the plan, progress, the closing table, JSON. The only room that prints results.

mod evaluation;
mod inspect;
mod page;
mod phases;
mod progress;
mod run;
mod timeline;

pub use evaluation::{Evaluation, Scores};
pub use inspect::{Inspection, inspect};
pub use phases::Phases;
pub use progress::Progress;
pub use run::{Health, RankReport, RunReport, Seconds};
pub use timeline::{Bar, Timeline, Work};

use std::fmt::Display;

/// Prints a result on standard output. Rank 0 calls it, once for each thing.
#[allow(clippy::print_stdout)]
pub fn print(what: &impl Display) {
    println!("{what}");
}
