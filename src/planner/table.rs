//! The plan as people read it.

use std::fmt;

use super::{Mode, Plan};
use crate::units::{binary, duration};

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Mode::Resident => "resident",
            Mode::Streamed => "streamed",
            Mode::Spilled => "spilled",
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>4}  {:<16} {:>9}  {:<8} {:>6} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}",
            "rank", "host", "layers", "mode", "group", "reads", "writes", "peak", "may use", "busy", "waits"
        )?;
        for stage in &self.stages {
            writeln!(
                f,
                "{:>4}  {:<16} {:>9}  {:<8} {:>6} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}",
                stage.rank,
                stage.host,
                format!("{}..{}", stage.layers.start, stage.layers.end),
                stage.mode,
                stage.group,
                binary(stage.bytes_read),
                binary(stage.bytes_written),
                binary(stage.peak_memory),
                binary(stage.memory),
                duration(stage.seconds),
                duration(stage.wait),
            )?;
        }
        write!(f, "expected time: {}", duration(self.seconds))
    }
}
