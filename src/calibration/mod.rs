//! Text in, token batches out.

mod batches;
mod chat;
mod documents;
mod reader;
mod row;
mod sampling;
mod select;
mod shuffle;
mod tokenize;
mod tokenizer;
mod windows;

pub use batches::{MicroBatch, micro_batches, pairs};
pub use documents::Source;
pub use sampling::Sampling;
pub use select::{CalibOptions, Calibration, Summary};
pub use windows::Windows;
