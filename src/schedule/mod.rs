//! Which micro-batches pass which layers of which stage, and in which order. Pure arithmetic.

mod kept;
mod routes;
mod visits;

pub use kept::Kept;
pub use routes::{Route, Routes, StageFiles, routes};
pub use visits::{Visit, visits};
