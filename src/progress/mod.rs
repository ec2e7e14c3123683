//! What is observed of a run while it works: the progress bar, each rank's timeline, and where its time goes.

mod bar;
mod phases;
mod timeline;

pub use bar::{Progress, Steps};
pub use phases::Phases;
pub use timeline::{Bar, Timeline, Work};
