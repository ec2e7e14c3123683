//! What a decoder is made of: its sizes, its tensors' names and shapes, which linears are fused, and its
//! forward pass, written once over [`crate::backend::Backend`]. Knows nothing of where it runs.

mod config;
mod families;
mod fit;
mod forward;
mod rope;
mod tensors;

pub use config::{ModelConfig, architectures};
pub use families::{Family, supported};
pub use fit::is_dispensable;
pub use forward::{Batch, Decoder, LayerWeights, Linear, Observe, Workspace};
pub use rope::{Rope, RopeTable};
pub use tensors::{Group, LinearSpec, Site, TensorSpec};
