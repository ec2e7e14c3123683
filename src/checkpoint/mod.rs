//! Checkpoints on disk: reading a Hugging Face directory, planning and writing the quantized one.
//! Knows names, dtypes, shapes and bytes, not how numbers are chosen.

mod convert;
mod declared;
mod layout;
mod reading;
mod writing;

pub use convert::{first_not_finite, narrow, stored, widen};
pub use declared::{Declared, LinearScheme, declared_layout, strings};
pub use layout::{Layout, LinearNames, Scheme, quantization_files};
pub(crate) use reading::directory;
pub use reading::directory::snapshot;
pub use reading::fits::FLOATS;
pub use reading::header::{Header, HeaderTensor, read_header};
pub use reading::shards::some;
pub use reading::source::{Checkpoint, Entry, SourceTensor};
pub use writing::digests::{DIGESTS, digest, write_digests};
pub use writing::output::{Existing, JOURNAL, NEW_JOURNAL, NONCE, OutputDir};
pub use writing::placement::{OutTensor, Placement, Shard, Slot};
pub use writing::sidefiles::{copy_side_files, is_side_file};
pub use writing::writer::OutputFiles;
