//! Checkpoints on disk: reading a Hugging Face directory, planning and writing the quantized one.

mod source;

pub use source::{Checkpoint, Entry, SourceTensor};
