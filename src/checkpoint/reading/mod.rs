//! A checkpoint as it is read: files, headers, mapped tensors.

pub mod directory;
pub mod fingerprint;
pub mod fits;
pub mod fp8;
pub mod guard;
pub mod header;
pub mod sample;
pub mod shards;
pub mod source;
