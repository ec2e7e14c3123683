//! The rules, by what they look at.

pub mod config;
pub mod files;
pub mod folds;
pub mod same_config;
pub mod scales;
pub mod source;
pub mod tensors;
