//! distq turns a Hugging Face checkpoint into NVFP4 over any mix of machines.
//!
//! The rooms and what each may know are described in ARCHITECTURE.md. Data flows
//! one way: [`checkpoint`] → [`planner`] → [`pipeline`] (with [`model`],
//! [`backend`], [`methods`] and [`nvfp4`]) → [`checkpoint`] → [`verify`].

pub mod backend;
pub mod calibration;
pub mod checkpoint;
pub mod cluster;
pub mod confined;
pub mod devices;
pub mod error;
pub mod evaluation;
pub mod forward;
pub mod last_words;
pub mod methods;
pub mod model;
pub mod nvfp4;
pub mod pipeline;
pub mod planner;
pub mod progress;
pub mod record;
pub mod report;
mod simd;
mod threads;
pub mod units;
pub mod verify;
