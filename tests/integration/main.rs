//! The real binary, alone and under a real mpirun, and the forward pass against Transformers.

mod bad_input;
mod bytes;
mod dense;
mod eval;
mod extremes;
mod families;
mod faults;
mod fp8;
mod hosts;
mod job;
mod machines;
mod methods;
mod model_dirs;
mod mutation;
mod ranks;
mod resume;
mod rooms;
#[path = "../skipped/mod.rs"]
mod skipped;
mod smollm2;
mod support;
