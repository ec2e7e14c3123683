//! Machines that are not there: `distq plan --nodes 128GiB:uma,24GiB:gpu:64GiB`.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;

use super::Node;
use crate::error::{Error, Result};
use crate::units::{parse_bytes, write_name};

/// The rate at which a disk is taken to be read, in bytes/s.
const READ_RATE: f64 = 1e9;

/// The link that is assumed where none is given: 10 Gbit/s, in bytes/s.
pub const ASSUMED_LINK: f64 = 1.25e9;

/// What kind of machine is assumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MachineKind {
    /// A GPU that shares the host's memory: 100 TFLOP/s.
    Uma,
    /// A GPU with its own memory: 60 TFLOP/s.
    Gpu,
    /// A host without a GPU: 1 TFLOP/s.
    Cpu,
}

/// A machine as the command line describes it: `SIZE:KIND`, for a GPU with its own memory also
/// `SIZE:gpu:HOST`, where `HOST` is host memory for files and hidden states.
#[derive(Clone, Debug, PartialEq)]
pub struct AssumedMachine {
    /// Bytes of memory where it computes.
    pub memory: u64,
    /// Its kind.
    pub kind: MachineKind,
    /// Bytes of host memory beside it: as much as a card's own where nothing is said of it.
    pub host: u64,
}

impl AssumedMachine {
    /// Tokens of a micro-batch that suit it.
    pub fn micro_batch_tokens(&self) -> usize {
        match self.kind {
            MachineKind::Uma | MachineKind::Gpu => 8192,
            MachineKind::Cpu => 1024,
        }
    }

    /// As the planner takes it, on a link of `link` bytes/s. A tenth of memory stays with the system, unless
    /// `memory` says what is usable. Statistics are taken to run at half the rate of the forward pass, and
    /// choosing codes at a twentieth, which is what they do on an H100 at the shape of a 123B model.
    pub fn node(&self, rank: usize, memory: Option<u64>, link: f64) -> Node {
        let usable = |bytes: u64| bytes / 10 * 9;
        let flops = match self.kind {
            MachineKind::Uma => 100e12,
            MachineKind::Gpu => 60e12,
            MachineKind::Cpu => 1e12,
        };
        Node {
            rank,
            host: self.to_string(),
            host_id: rank,
            memory: memory.unwrap_or(usable(self.memory)),
            host_memory: usable(self.host),
            flops,
            statistics_flops: flops / 2.0,
            solving_flops: flops / 20.0,
            read_rate: READ_RATE,
            link,
            company: 1,
            crowding: 1.0,
        }
    }
}

impl fmt::Display for AssumedMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} GiB ", self.memory as f64 / (1u64 << 30) as f64)?;
        write_name(&self.kind, f)
    }
}

impl FromStr for AssumedMachine {
    type Err = Error;

    fn from_str(text: &str) -> Result<AssumedMachine> {
        let wrong = || {
            Error::usage(format!("{text:?} is not a machine"))
                .fix("write it like 128GiB:uma, 24GiB:gpu, 24GiB:gpu:64GiB (with host memory) or 64GiB:cpu")
        };
        let (memory, rest) = text.split_once(':').ok_or_else(wrong)?;
        let (kind, host) = match rest.split_once(':') {
            None => (rest, None),
            Some(("gpu", host)) => ("gpu", Some(parse_bytes(host)?)),
            Some(_) => return Err(wrong()),
        };
        let kind = MachineKind::from_str(kind, false).map_err(|_| wrong())?;
        let memory = parse_bytes(memory)?;
        let host = match (kind, host) {
            (MachineKind::Gpu, None) => memory,
            (_, host) => host.unwrap_or(0),
        };
        Ok(AssumedMachine { memory, kind, host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_read_as_they_are_written() {
        let read = |text: &str| text.parse::<AssumedMachine>();
        let card = AssumedMachine { memory: 24 << 30, kind: MachineKind::Gpu, host: 64 << 30 };
        assert_eq!(read("24GiB:gpu:64GiB").unwrap(), card);
        assert_eq!(read("24GiB:gpu").unwrap(), AssumedMachine { host: 24 << 30, ..card });
        assert_eq!(read("128GiB:uma").unwrap().to_string(), "128 GiB uma");
        for text in ["24GiB", "24GiB:tpu", "128GiB:uma:64GiB", "x:cpu", "24GiB:gpu:"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn given_memory_is_all_usable() {
        let card: AssumedMachine = "20GiB:gpu".parse().unwrap();
        assert_eq!(card.node(0, None, ASSUMED_LINK).memory, 18 << 30);
        assert_eq!(card.node(0, Some(5), ASSUMED_LINK).memory, 5);
    }
}
