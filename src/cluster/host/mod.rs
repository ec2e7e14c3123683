//! What this host gives a rank: cores, memory, and the launcher that started it.

pub mod cores;
pub mod launch;
pub mod machine;
