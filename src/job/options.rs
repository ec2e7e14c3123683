//! What the user asked for.

use std::path::PathBuf;

use crate::backend::DeviceChoice;
use crate::calibration::CalibOptions;
use crate::checkpoint::{Existing, Layout, Scheme};
use crate::methods::Method;

/// What `distq quantize` was asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Model, layout, scheme, split.
    pub plan: PlanOptions,
    /// The output directory.
    pub out: PathBuf,
    /// Calibration data.
    pub calib: CalibOptions,
    /// Largest shard in bytes.
    pub max_shard: u64,
    /// What to do with the files of an earlier run.
    pub existing: Existing,
    /// Send every tensor through rank 0.
    pub gather: bool,
    /// Where the report goes.
    pub reports: Vec<PathBuf>,
    /// Show no progress.
    pub quiet: bool,
}

/// The options from which the plan is made.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// The source directory.
    pub model: PathBuf,
    /// How the output is written.
    pub layout: Layout,
    /// What is quantized.
    pub scheme: Scheme,
    /// How codes and scales are chosen.
    pub method: Method,
    /// Patterns of modules that are not quantized.
    pub ignore: Vec<String>,
    /// Layers by rank, where the user chose them.
    pub layers_per_rank: Option<Vec<usize>>,
    /// Bytes by rank that it may use, where the user chose them; one value is for all ranks.
    pub memory_per_rank: Vec<u64>,
    /// Where to compute.
    pub device: DeviceChoice,
    /// A directory on each host for hidden states.
    pub work_dir: Option<PathBuf>,
}

impl PlanOptions {
    /// Whether the forward pass is needed at all.
    pub fn calibrates(&self) -> bool {
        self.scheme.quantizes_activations() || self.method.needs_statistics()
    }
}
