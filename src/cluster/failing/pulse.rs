//! Signs of life: how every rank finds out that another one, or the link to it, is gone, whatever the job is doing.
//!
//! Every rank tells rank 0, rank 0 tells every rank, and those that wait for each other tell each other. A rank's
//! main thread does so wherever it is with MPI: in the pump, in collectives, and in [`Cluster::attend`] while
//! something that takes long is done on another thread.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::fail::remedy;
use crate::cluster::{Cluster, Frame, Tag};
use crate::error::{Error, ExitCode, Result};
use crate::{last_words, threads};

/// Signs of life in the time after which a rank counts as silent.
const BEATS: u32 = 6;

/// Whom this rank talks with, and when.
pub(in crate::cluster) struct Pulse {
    /// When each of them was last heard.
    heard: RefCell<BTreeMap<usize, Instant>>,
    /// When this rank last gave signs of life.
    beat: Cell<Instant>,
    /// When this rank last looked.
    looked: Cell<Instant>,
}

impl Pulse {
    /// Of a rank that talks with `peers`.
    pub(in crate::cluster) fn new(peers: impl IntoIterator<Item = usize>) -> Pulse {
        let now = Instant::now();
        let heard = peers.into_iter().map(|peer| (peer, now)).collect();
        Pulse { heard: RefCell::new(heard), beat: Cell::new(now), looked: Cell::new(now) }
    }

    /// A message came from this rank, which counts among those that this one talks with from now on.
    pub(in crate::cluster) fn hear(&self, peer: usize) {
        self.heard.borrow_mut().insert(peer, Instant::now());
    }

    /// A message goes to this rank, which is expected to be heard of from now on.
    pub(in crate::cluster) fn expect(&self, peer: usize) {
        self.heard.borrow_mut().entry(peer).or_insert_with(Instant::now);
    }
}

impl Cluster {
    /// Tells those that this rank talks with that it is there, and finds out who is not and who failed. Called at
    /// every turn of every loop that waits.
    ///
    /// # Errors
    /// Exit code 5 where a rank is silent; on rank 0 also the error of any rank that failed.
    pub(in crate::cluster) fn stay_alive(&self) -> Result<()> {
        let Some(transport) = &self.transport else { return Ok(()) };
        let Pulse { heard, beat, looked } = &self.pulse;
        if let Some(words) = last_words::taken() {
            return Err(Error::run(words));
        }
        while let Some((peer, frame)) = transport.poll(Tag::Pulse) {
            if !frame.body.is_empty() {
                let (code, text): (i32, String) = serde_json::from_slice(&frame.body)
                    .map_err(|e| Error::run(format!("rank {peer} failed and can't say why: {e}")))?;
                return Err(Error::reported(ExitCode::from_number(code), text));
            }
            self.pulse.hear(peer);
        }
        let (now, interval) = (Instant::now(), self.silence / BEATS);
        if now - looked.replace(now) > interval {
            // This rank was held up itself (a disk, a stopped process): what others sent is still to be read.
            heard.borrow_mut().values_mut().for_each(|heard| *heard = now);
        }
        if now - beat.get() < interval {
            return Ok(());
        }
        beat.set(now);
        for (&peer, heard) in heard.borrow().iter() {
            transport.send(peer, Tag::Pulse, Frame::default());
            if now - *heard > self.silence {
                let host = self.names.get(peer).map(|host| format!(" ({host})")).unwrap_or_default();
                let silence = self.silence.as_secs();
                return Err(Error::run(format!("rank {peer}{host} has been silent for {silence} s")).fix(
                    format!(
                        "check that host and the network to it, then {}; --link-timeout sets how long a rank may be \
                         silent",
                        remedy()
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Does something that may take long on a thread of its own, while this one gives signs of life. A rank that turns
    /// out to be silent ends the job.
    pub fn attend<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        if self.transport.is_none() {
            return work();
        }
        std::thread::scope(|scope| {
            let worker = match threads::scoped(scope, "attended", work) {
                Ok(worker) => worker,
                Err(error) => self.end(error),
            };
            self.wait_until(|| worker.is_finished().then_some(()));
            threads::value(worker.join())
        })
    }

    /// Asks again and again, with signs of life in between, until there is an answer.
    pub(in crate::cluster) fn wait_until<T>(&self, mut ask: impl FnMut() -> Option<T>) -> T {
        let mut idle = self.idle();
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            if let Err(error) = self.stay_alive() {
                self.end(error);
            }
            if let Some(transport) = &self.transport {
                transport.progress();
            }
            self.rest(&mut idle);
        }
    }

    /// Reports this rank's failure to rank 0, and gives it time to end the job, so that it is told once.
    pub(in crate::cluster) fn report_to_root(&self, error: &Error) {
        let (Some(transport), false) = (&self.transport, self.is_root()) else { return };
        // Rank 0 ends the job by a signal to this rank, among others.
        super::signals::disregard();
        let body = serde_json::to_vec(&(error.exit as i32, self.place(&error.to_string())));
        transport.send(0, Tag::Pulse, Frame { head: vec![], body: body.expect("plain data") });
        // Where rank 0 itself is gone several ranks say so: the lowest first, which ends the others.
        let patience = Duration::from_secs(3) + Duration::from_millis(500) * self.rank.min(8) as u32;
        let started = Instant::now();
        while started.elapsed() < patience {
            transport.progress();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
