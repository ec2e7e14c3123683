//! From a layer's weights and statistics to its tensors in the output: quantizing, writing or sending, and reading
//! back.

mod finisher;
mod folding;
mod health;
mod messages;
mod placer;
mod prover;
mod root;

pub use finisher::{FinisherWeights, InputMaxima, ToFinish, finish};
#[cfg(test)]
pub use folding::rewritten;
pub use messages::{Event, Hidden, Outbox};
pub use prover::Prover;
pub use root::RootInbox;
