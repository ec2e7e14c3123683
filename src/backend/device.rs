//! Which device a rank computes on.

use super::{Compute, Solver, cpu::Cpu, cuda::Cuda};
use crate::error::Result;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// A GPU for each rank that finds one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU; a rank that finds none ends the job.
    Cuda,
}

/// A rank's device.
pub enum Device {
    /// The CPU.
    Cpu(Cpu),
    /// A GPU.
    Cuda(Box<Cuda>),
}

impl Device {
    /// Opens the device of a rank: `gpu` is the one that it has for itself, among those that it sees.
    ///
    /// # Errors
    /// Exit code 5 where a GPU was asked for, or is there, and can't be used.
    pub fn open(
        choice: DeviceChoice,
        compute: Compute,
        gpu: Option<usize>,
        threads: usize,
    ) -> Result<Device> {
        match (choice, gpu) {
            (DeviceChoice::Auto | DeviceChoice::Cuda, Some(gpu)) => {
                Ok(Device::Cuda(Box::new(Cuda::new(compute, gpu)?)))
            }
            (DeviceChoice::Cuda, None) => Ok(Device::Cuda(Box::new(Cuda::new(compute, 0)?))),
            (DeviceChoice::Auto, None) | (DeviceChoice::Cpu, _) => {
                Ok(Device::Cpu(Cpu::new(compute, threads)?))
            }
        }
    }

    /// What runs the matrix products, for the report.
    pub fn name(&self) -> &str {
        match self {
            Device::Cpu(cpu) => cpu.kernel(),
            Device::Cuda(cuda) => cuda.name(),
        }
    }

    /// What is free for a GPU by its driver, and whether that is the host's memory too; none on a CPU.
    pub fn memory(&self) -> Option<(u64, bool)> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some((cuda.free_memory(), cuda.is_integrated())),
        }
    }

    /// The most bytes of a card's memory that were in use at a time; none on a CPU.
    pub fn peak_memory(&self) -> Option<u64> {
        match self {
            Device::Cpu(_) => None,
            Device::Cuda(cuda) => Some(cuda.peak_memory()),
        }
    }

    /// Tokens of a micro-batch: as many as keep the device's matrix products at their full rate.
    pub fn micro_batch_tokens(&self) -> usize {
        match self {
            Device::Cpu(_) => 1024,
            Device::Cuda(_) => 8192,
        }
    }

    /// Runs `job` with the backend behind this device.
    pub fn run<J: OnBackend>(&self, job: J) -> J::Output {
        match self {
            Device::Cpu(cpu) => job.run(cpu),
            Device::Cuda(cuda) => job.run(cuda.as_ref()),
        }
    }
}

/// Work that is written once for every backend.
pub trait OnBackend {
    /// What it yields.
    type Output;
    /// Does it.
    fn run<B: Solver>(self, backend: &B) -> Self::Output;
}
