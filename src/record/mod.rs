//! What a run records of the parts that it has finished: for the journal, from which an interrupted run is resumed, and
//! for the report.

mod fingerprint;
mod journal;
mod part;

pub use fingerprint::Fingerprint;
pub use journal::{History, Journal, Line};
pub use part::{Chosen, GroupRecord, Observed, PartId, PartRecord};
