//! Ranks, hosts and messages: the only room that calls MPI. Knows neither models nor formats.
//!
//! A process that no launcher started is a job of one rank and never initialises MPI. All messages are
//! sent and received on the main thread: over TCP, MPI moves a large message only while it is being
//! called, so the main thread stays with it ([`Cluster::work`]) and workers compute.

mod collective;
mod failing;
mod greeting;
mod host;
mod link;
mod pump;
pub mod spare;
mod transport;
mod worker;

use std::cell::Cell;
use std::time::Duration;

pub use failing::fail::abort;
pub use host::launch::{Launch, launch};
pub use host::machine::{Machine, MemoryKind, own_memory};
pub use transport::{Frame, Tag};
pub use worker::ToMain;

use crate::error::{Error, ExitCode, Result};
use crate::{last_words, threads};
use failing::pulse::Pulse;
use greeting::Greeting;
use host::cores::{Cores, Share, shares};
use transport::Transport;

/// Launchers start ranks one after another: MPI gets this long to bring them together, however short the time after
/// which a rank counts as silent, and as long again for every so many ranks.
const BEGINNING: Duration = Duration::from_secs(60);
const RANKS_TO_BEGIN: u32 = 64;
/// All ranks find out at once that MPI does not start, and can't tell each other: rank 0 says it, and the others only
/// where it is not there to.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// This rank's view of the job.
pub struct Cluster {
    transport: Option<Transport>,
    rank: usize,
    size: usize,
    host: String,
    /// The names of every rank's host, once they have greeted each other: for messages alone, since two hosts may have
    /// the same one.
    names: Vec<String>,
    /// Every rank's host, as the number of the first rank on it.
    hosts: Vec<usize>,
    /// How long a rank may be silent.
    silence: Duration,
    pulse: Pulse,
    local_ranks: Vec<usize>,
    /// What this rank gets of its host's cores.
    share: Share,
    /// Whether every rank knows of the failure that ends the job.
    agreed: Cell<bool>,
}

impl Cluster {
    /// Joins the job that the launcher described, or starts one alone. A rank that is not heard of for as long as
    /// `silence` ends the job. So do SIGINT and SIGTERM.
    ///
    /// # Errors
    /// Exit code 5, on every rank, where the launcher and the MPI library do not belong together. Ranks whose programs
    /// or libraries do not belong together end here.
    pub fn start(silence: Duration) -> Result<Cluster> {
        let cores = Cores::here();
        let host = host::machine::host_name();
        let mut cluster = match launch() {
            None => Cluster::new(None, 0, 1, host, silence),
            Some(launch) => {
                let late = "MPI did not start: the ranks don't find each other; see TROUBLESHOOTING.md";
                let late = format!("rank {} ({host}): {late}", launch.rank);
                let beginning = BEGINNING * (1 + launch.size.unwrap_or(1) as u32 / RANKS_TO_BEGIN);
                let others = if launch.rank == 0 { Duration::ZERO } else { FIRST_WORD };
                let _in_time =
                    failing::fail::within(silence.max(beginning) + others, late, ExitCode::Run as i32);
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
                Cluster::new(Some(transport), rank, size, host, silence)
            }
        };
        last_words::speak_for(cluster.place(""));
        failing::fail::install_panic_hook(&cluster);
        let greetings = cluster.all_gather(&Greeting::of(&cluster, cores))?;
        cluster.hosts = greeting::hosts(&greetings);
        let host = cluster.hosts[cluster.rank];
        cluster.local_ranks = (0..cluster.size).filter(|&rank| cluster.hosts[rank] == host).collect();
        let cores: Vec<&Cores> = cluster.local_ranks.iter().map(|&rank| &greetings[rank].cores).collect();
        cluster.share = shares(&cores)[cluster.local_rank()];
        let ready = greetings[cluster.rank]
            .fits(&greetings[0])
            .and_then(|()| threads::start_common(cluster.share.threads))
            .and_then(|()| failing::signals::watch(&cluster));
        cluster.names = greetings.into_iter().map(|greeting| greeting.host).collect();
        if let Err(error) = cluster.agree(ready) {
            // The caller has no cluster yet to end with.
            std::process::exit(cluster.conclude(Err(error)));
        }
        Ok(cluster)
    }

    fn new(
        transport: Option<Transport>,
        rank: usize,
        size: usize,
        host: String,
        silence: Duration,
    ) -> Cluster {
        let mut cluster = Cluster {
            transport,
            rank,
            size,
            names: vec![],
            hosts: vec![],
            host,
            silence,
            pulse: Pulse::new([]),
            local_ranks: vec![rank],
            share: Share { threads: 1, crowding: 1.0 },
            agreed: Cell::new(false),
        };
        cluster.pulse = Pulse::new(cluster.company());
        cluster
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

    /// This host's number, which no other host has: the first rank on it.
    pub fn host_id(&self) -> usize {
        self.local_ranks[0]
    }

    /// This rank among those on the same host, from 0.
    pub fn local_rank(&self) -> usize {
        self.local_ranks.iter().take_while(|&&rank| rank < self.rank).count()
    }

    /// The ranks on this host, this one among them.
    pub fn local_ranks(&self) -> &[usize] {
        &self.local_ranks
    }

    /// How many ranks are on this host.
    pub fn local_size(&self) -> usize {
        self.local_ranks.len()
    }

    /// What this rank may use of its host. `memory` replaces the bytes that are found.
    pub fn machine(&self, memory: Option<u64>) -> Machine {
        Machine::here(&self.host, self.local_size(), self.share, memory)
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
        let ranks = self.local_size() as u32;
        Idle { pause: PAUSE, longest: Duration::from_millis(1) * ranks.div_ceil(LOOKING) }
    }

    /// Pauses before looking again; only for others to get to work while something large is on its way, because MPI
    /// moves it while it is being asked. What is small has passed with the next look, and looking costs those that
    /// compute on the same cores.
    fn rest(&self, idle: &mut Idle) {
        match &self.transport {
            Some(transport) if transport.is_moving() => std::thread::yield_now(),
            _ => idle.wait(),
        }
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
