//! Checkpoints on disk: reading a Hugging Face directory, planning and writing the quantized one.
//! Knows names, dtypes, shapes and bytes, not how numbers are chosen.

mod convert;
mod declared;
mod digests;
pub(crate) mod directory;
mod fingerprint;
mod fits;
mod fp8;
mod guard;
mod header;
mod layout;
mod lock;
mod output;
mod placement;
mod sample;
mod shards;
mod sidefiles;
mod source;
mod writer;

pub use convert::{first_not_finite, narrow, stored, widen};
pub use declared::{Declared, LinearScheme, declared_layout, strings};
pub use digests::{DIGESTS, digest, write_digests};
pub use directory::snapshot;
pub use fits::FLOATS;
pub use header::{Header, HeaderTensor, read_header};
pub use layout::{Layout, LinearNames, Scheme, quantization_files};
pub use output::{Existing, JOURNAL, NEW_JOURNAL, NONCE, OutputDir};
pub use placement::{OutTensor, Placement, Shard, Slot};
pub use shards::some;
pub use sidefiles::{copy_side_files, is_side_file};
pub use source::{Checkpoint, Entry, SourceTensor};
pub use writer::OutputFiles;
