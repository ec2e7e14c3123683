//! What is known before the first layer: the options, the model, the machines and the plan, the tensors of the output
//! and their places.

mod common;
mod ignore;
mod inventory;
mod operations;
mod options;
mod placing;
mod probe;
mod survey;

pub use common::Job;
pub use inventory::{Inventory, Part};
pub use options::{Options, PlanOptions};
pub use placing::{Placed, RootOutput, place};
pub use survey::{Survey, foresee, survey};
