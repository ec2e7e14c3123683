//! From a layer's weights and statistics to its tensors in the output: quantizing, writing or sending, and reading back.

mod finisher;
mod health;
mod messages;
mod placer;
mod prover;
mod root;

#[cfg(test)]
pub use finisher::rewritten;
pub use finisher::{Finished, Inputs, Lent, finish};
pub use messages::{Event, Hidden, Outbox};
pub use prover::Prover;
pub use root::Root;
