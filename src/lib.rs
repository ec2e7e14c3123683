//! distq turns a Hugging Face checkpoint into NVFP4 over any mix of machines.
//!
//! The rooms and what each may know are described in ARCHITECTURE.md. Data flows
//! one way: [`checkpoint`] → [`planner`] → `walk` (with [`model`], [`forward`],
//! [`backend`]) → `finish` (with [`methods`] and [`nvfp4`]) → [`checkpoint`] → [`verify`];
//! [`quantize`] is the whole way.

pub mod backend;
pub mod calibration;
pub mod checkpoint;
pub mod cluster;
pub mod confined;
pub mod devices;
pub mod error;
pub mod evaluation;
mod finish;
pub mod forward;
pub mod job;
pub mod last_words;
pub mod methods;
pub mod model;
pub mod nvfp4;
pub mod planner;
pub mod progress;
pub mod quantize;
pub mod record;
pub mod report;
mod schedule;
mod simd;
mod states;
mod threads;
pub mod units;
pub mod verify;
mod walk;
