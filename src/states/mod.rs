//! Hidden states in files under `--work-dir`: what a run keeps so that another can begin in the middle, and what
//! has no room in memory.
//!
//! A file holds the hidden states of consecutive documents before a decoder layer: rows `[tokens, hidden]` in the
//! compute dtype, then the blake3 of its name and its rows. The name contains the run, the layer and the documents, so
//! a file of another run, another place or a torn write is never taken. Files are written under another name and
//! renamed.
//!
//! They hold what the calibration data says, and `--work-dir` may be open to others: a run's files are in a directory
//! of its own that only its user may enter, under names that can't be guessed until they are complete.

mod directory;
mod file;
mod keeping;
mod snapshot;

pub use directory::{States, check};
pub use keeping::{Keeper, Keeping};
