//! Python's values: what operators do with them, and how they become text.

pub mod format;
pub mod json;
pub mod operators;
pub mod print;
pub mod strings;
pub mod value;
