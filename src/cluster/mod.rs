//! Ranks, hosts and messages: the only room that calls MPI. Knows neither models nor formats.
//!
//! A process that no launcher started is a job of one rank and never initialises MPI. All messages are
//! sent and received on the main thread: over TCP, MPI moves a large message only while it is being
//! called, so the main thread stays with it ([`Cluster::work`]) and workers compute.

mod collective;
mod fail;
mod launch;
mod link;
mod machine;
mod pump;
mod signals;
mod transport;
mod worker;

use std::cell::Cell;
use std::time::Duration;

pub use fail::abort;
pub use launch::{Launch, launch};
pub use machine::{Machine, MemoryKind};
pub use pump::Outgoing;
pub use transport::{Frame, Tag};

use crate::error::{Error, Result};
use transport::Transport;

/// This rank's view of the job.
pub struct Cluster {
    transport: Option<Transport>,
    rank: usize,
    size: usize,
    host: String,
    /// Every rank's host.
    hosts: Vec<String>,
    /// How long a rank may be silent.
    silence: Duration,
    local_rank: Cell<usize>,
    local_size: Cell<usize>,
    /// Whether every rank knows of the failure that ends the job.
    agreed: Cell<bool>,
}

impl Cluster {
    /// Joins the job that the launcher described, or starts one alone. While ranks work together, one that is not
    /// heard of for as long as `silence` ends the job. So do SIGINT and SIGTERM.
    ///
    /// # Errors
    /// Exit code 5 where the launcher and the MPI library do not belong together.
    pub fn start(silence: Duration) -> Result<Cluster> {
        let host = machine::host_name();
        let Some(launch) = launch() else {
            let cluster = Cluster::new(None, 0, 1, host, silence);
            fail::install_panic_hook(&cluster);
            signals::watch(&cluster)?;
            return Ok(cluster);
        };
        let transport = Transport::start()?;
        let (rank, size) = (transport.rank(), transport.size());
        if size == 1 && launch.size.is_some_and(|expected| expected > 1) {
            return Err(Error::run(format!(
                "the launcher started {} ranks, but this binary's MPI ({}) sees only itself",
                launch.size.unwrap_or_default(),
                Transport::library(),
            ))
            .fix("start it with the mpirun of the MPI it was built with, or build it again with this one's mpicc"));
        }
        let mut cluster = Cluster::new(Some(transport), rank, size, host, silence);
        fail::install_panic_hook(&cluster);
        let hosts: Vec<String> = cluster.all_gather(&cluster.host)?;
        let same = |ranks: &[String]| ranks.iter().filter(|host| **host == cluster.host).count();
        cluster.local_rank.set(same(&hosts[..rank]));
        cluster.local_size.set(same(&hosts));
        cluster.hosts = hosts;
        signals::watch(&cluster)?;
        Ok(cluster)
    }

    fn new(
        transport: Option<Transport>,
        rank: usize,
        size: usize,
        host: String,
        silence: Duration,
    ) -> Cluster {
        Cluster {
            transport,
            rank,
            size,
            hosts: vec![host.clone()],
            host,
            silence,
            local_rank: Cell::new(0),
            local_size: Cell::new(1),
            agreed: Cell::new(false),
        }
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the job.
    pub fn size(&self) -> usize {
        self.size
    }

    /// This host's name.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// This rank among those on the same host, from 0.
    pub fn local_rank(&self) -> usize {
        self.local_rank.get()
    }

    /// Ranks on this host.
    pub fn local_size(&self) -> usize {
        self.local_size.get()
    }

    /// Whether this is rank 0, which plans, writes and prints.
    pub fn is_root(&self) -> bool {
        self.rank == 0
    }

    /// The MPI library in use, if any.
    pub fn library(&self) -> Option<String> {
        self.transport.as_ref().map(|_| Transport::library())
    }
}

/// Waits without burning a core: ranks on one host share its cores with those that compute.
struct Idle {
    pause: Duration,
    longest: Duration,
}

/// The shortest pause.
const PAUSE: Duration = Duration::from_micros(10);

/// Ranks on one host that may look for messages every millisecond without the host having much to do: with more,
/// each looks less often.
const LOOKING: u32 = 16;

impl Cluster {
    fn idle(&self) -> Idle {
        let ranks = self.local_size.get() as u32;
        Idle { pause: PAUSE, longest: Duration::from_millis(1) * ranks.div_ceil(LOOKING) }
    }
}

impl Idle {
    fn wait(&mut self) {
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(self.longest);
    }

    fn reset(&mut self) {
        self.pause = PAUSE;
    }
}
