//! The number format held to what other programs wrote, and to its own properties.

pub mod golden;
pub mod properties;
