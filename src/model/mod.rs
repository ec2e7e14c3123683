//! What a decoder is made of, as data: sizes, names and shapes of tensors, blocks, and the sites at which inputs meet
//! weights. `families/` turns config.json into it. Knows nothing of where it runs or of how numbers are chosen.

mod attention;
mod config;
mod description;
mod families;
mod fit;
mod form;
mod layer;
mod mlp;
mod rope;

pub use attention::{Attention, AttentionForm, NormScope, Projections};
pub use config::{Tying, architectures};
pub use description::Model;
pub use families::supported;
pub use fit::is_dispensable;
pub use form::{EmbeddingForm, HeadForm, Temperature};
pub use layer::{Block, Group, Layer, LinearSpec, Mixer, Norm, Producer, Rows, Site, TensorSpec};
pub use mlp::{Function, Mlp, MlpForm, MlpShape};
pub use rope::{Rope, RopeOptions, RopeStyle, RopeTable};
