//! One rank's walk: micro-batches through the layers of its slice, layers to the finisher.

mod crossing;
mod embedding;
#[cfg(test)]
mod fold_tests;
mod run;
mod stage;
mod statistics;
mod sweeps;
mod walker;

pub use stage::Stage;
