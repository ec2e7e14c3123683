//! How ranks end together: errors, signs of life, signals.

pub mod fail;
pub mod pulse;
pub mod signals;
