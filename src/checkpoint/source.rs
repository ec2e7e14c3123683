//! Reading a Hugging Face directory: which tensors it has, where, and their bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;

use crate::error::Result;

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte in the file (header included).
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A checkpoint directory whose headers have been read and checked; no tensor data has been touched.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// config.json as it stands, field order kept.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// The safetensors files, by name.
    pub files: Vec<PathBuf>,
    /// Every tensor by name.
    pub tensors: BTreeMap<String, Entry>,
}

/// The bytes of one stored tensor, mapped from its file; unmapped when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// Full name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    map: Arc<memmap2::Mmap>,
}
