//! Which device a rank computes on.

use super::{Compute, Solver, cpu::Cpu, cuda, cuda::Cuda};
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
    /// Opens the device for the rank that is `local_rank` on its host.
    ///
    /// # Errors
    /// Exit code 5 where a GPU was asked for, or is there, and can't be used.
    pub fn open(choice: DeviceChoice, compute: Compute, local_rank: usize, threads: usize) -> Result<Device> {
        let has_own_gpu = || local_rank < cuda::available();
        if choice == DeviceChoice::Cuda || (choice == DeviceChoice::Auto && has_own_gpu()) {
            return Ok(Device::Cuda(Box::new(Cuda::new(compute, local_rank)?)));
        }
        Ok(Device::Cpu(Cpu::new(compute, threads)?))
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
