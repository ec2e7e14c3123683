//! The schedule: which layer on which micro-batch when, from a source directory to a published output.
//! Knows ranks, parts and the journal; not how numbers are chosen.

mod crossing;
mod embedding;
mod finish;
#[cfg(test)]
mod fold_tests;
mod health;
mod ignore;
mod inventory;
mod job;
mod keeping;
mod messages;
mod operations;
mod placer;
mod placing;
mod probe;
mod prover;
mod quantize;
mod root;
mod routes;
mod stage;
mod states;
mod statistics;
mod survey;
mod sweeps;
mod visits;
mod walk;

pub use inventory::{Inventory, Part};
pub use quantize::{Options, quantize};
pub use survey::{PlanOptions, Survey, foresee, survey};
