//! The walk of one rank: passes micro-batches through the layers of its slice, and hands complete layers to the
//! finisher.

mod embedding;
#[cfg(test)]
mod fold_tests;
mod hidden;
mod run;
mod stage;
mod statistics;
mod sweeps;
mod transfer;
mod walker;

pub use stage::Stage;
