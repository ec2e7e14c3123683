//! An output as it is written: places, files, digests, and its way from `OUT.partial/` to OUT.

pub mod digests;
pub mod lock;
pub mod output;
pub mod placement;
pub mod sidefiles;
pub mod writer;
