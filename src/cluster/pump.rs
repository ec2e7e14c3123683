//! The main thread's loop while workers compute: messages out, messages in, and an end that every rank
//! reaches together.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};

use super::{Cluster, Frame, Tag};
use crate::error::{Error, ExitCode, Result};

/// What a worker hands to the main thread.
pub enum Outgoing {
    /// A message to a rank (this one included).
    Message {
        /// The receiver.
        peer: usize,
        /// What it is about.
        tag: Tag,
        /// The message.
        frame: Frame,
    },
    /// The worker failed: the whole job ends.
    Fail(Error),
}

/// Whether a message could be taken.
pub enum Pumped {
    /// It was taken.
    Taken,
    /// Not now: it is offered again. Nothing more with its tag is received until then.
    Later(Frame),
}

/// Bytes on their way at most, before the worker has to wait.
const IN_FLIGHT: usize = 256 << 20;
/// How long a failing rank waits for rank 0 to end the job before it does so itself.
const PATIENCE: Duration = Duration::from_secs(3);

/// First byte of a head on [`Tag::Root`].
const MESSAGE: u8 = 0;
const DONE: u8 = 1;
const FAIL: u8 = 2;
/// A sign of life.
const BEAT: u8 = 3;

/// Signs of life in the time after which a rank counts as silent.
const BEATS: u32 = 6;

impl Cluster {
    /// Sends what `outgoing` yields and hands received messages to `take`, until every rank's channel is
    /// closed and everything that was sent has been taken.
    ///
    /// # Errors
    /// The error of whichever rank failed; rank 0 gets it with the rank named.
    pub(super) fn pump(
        &self,
        outgoing: &Receiver<Outgoing>,
        take: &mut dyn FnMut(Tag, usize, Frame) -> Result<Pumped>,
    ) -> Result<()> {
        let mut state = Pump::new(self, take);
        let mut idle = self.idle();
        loop {
            let mut moved = false;
            state.stay_alive()?;
            let in_flight = self.transport.as_ref().map_or(0, |transport| transport.progress());
            if in_flight < IN_FLIGHT {
                match outgoing.try_recv() {
                    Ok(Outgoing::Message { peer, tag, frame }) => {
                        moved = true;
                        state.send(peer, tag, MESSAGE, frame)?;
                    }
                    Ok(Outgoing::Fail(error)) => return Err(state.fail(error)),
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) if !state.said_done && in_flight == 0 => {
                        moved = true;
                        state.said_done = true;
                        state.send(0, Tag::Root, DONE, Frame::default())?;
                    }
                    Err(TryRecvError::Disconnected) => {}
                }
            }
            moved |= state.receive(Tag::Hidden, 0)?;
            moved |= state.receive(Tag::Root, 1)?;
            if state.finished()? {
                return Ok(());
            }
            if moved { idle.reset() } else { idle.wait() }
        }
    }
}

struct Pump<'a> {
    cluster: &'a Cluster,
    take: &'a mut dyn FnMut(Tag, usize, Frame) -> Result<Pumped>,
    /// A message by tag that could not be taken yet.
    waiting: [Option<(usize, Frame)>; 2],
    /// Ranks that rank 0 has heard the end of.
    done: usize,
    said_done: bool,
    /// When each rank that this one talks with was last heard.
    heard: BTreeMap<usize, Instant>,
    /// When this rank last gave signs of life.
    beat: Instant,
    /// When this rank last looked.
    looked: Instant,
}

impl<'a> Pump<'a> {
    fn new(cluster: &'a Cluster, take: &'a mut dyn FnMut(Tag, usize, Frame) -> Result<Pumped>) -> Pump<'a> {
        let now = Instant::now();
        let peers = if cluster.is_root() { 1..cluster.size } else { 0..1 };
        let heard = peers.map(|peer| (peer, now)).collect();
        let (waiting, done, said_done) = ([None, None], 0, false);
        Pump { cluster, take, waiting, done, said_done, heard, beat: now, looked: now }
    }

    /// Tells those that this rank talks with that it is there, and finds out who is not. Every rank's main thread
    /// is here all the time, however long its worker computes, so silence means a host or a link that is gone.
    fn stay_alive(&mut self) -> Result<()> {
        let Some(transport) = &self.cluster.transport else { return Ok(()) };
        let (now, silence) = (Instant::now(), self.cluster.silence);
        if now - self.looked > silence / BEATS {
            // This rank was held up itself (a disk, a stopped process): what others sent is still to be read.
            self.heard.values_mut().for_each(|heard| *heard = now);
        }
        self.looked = now;
        if now - self.beat < silence / BEATS {
            return Ok(());
        }
        self.beat = now;
        for (&peer, heard) in &self.heard {
            transport.send(peer, Tag::Root, Frame { head: vec![BEAT], body: vec![] });
            if now - *heard > silence {
                let host = &self.cluster.hosts[peer];
                let error = Error::run(format!(
                    "rank {peer} ({host}) has been silent for {} s",
                    silence.as_secs()
                ))
                .fix(
                    "check that host and the network to it, then use --resume; --link-timeout sets the time",
                );
                return Err(self.fail(error));
            }
        }
        Ok(())
    }

    fn send(&mut self, peer: usize, tag: Tag, kind: u8, mut frame: Frame) -> Result<()> {
        frame.head.insert(0, kind);
        match &self.cluster.transport {
            Some(transport) if peer != self.cluster.rank => {
                self.heard.entry(peer).or_insert_with(Instant::now);
                transport.send(peer, tag, frame);
                Ok(())
            }
            _ => self.accept(tag, peer, frame, usize::from(tag == Tag::Root)).map(|_| ()),
        }
    }

    /// Receives at most one message; whether anything happened.
    fn receive(&mut self, tag: Tag, slot: usize) -> Result<bool> {
        if let Some((peer, frame)) = self.waiting[slot].take() {
            return self.offer(tag, peer, frame, slot);
        }
        match self.cluster.transport.as_ref().and_then(|transport| transport.poll(tag)) {
            Some((peer, frame)) => self.accept(tag, peer, frame, slot),
            None => Ok(false),
        }
    }

    fn accept(&mut self, tag: Tag, peer: usize, mut frame: Frame, slot: usize) -> Result<bool> {
        if peer != self.cluster.rank {
            self.heard.insert(peer, Instant::now());
        }
        match frame.head.remove(0) {
            BEAT => {}
            DONE => self.done += 1,
            FAIL => {
                let (code, text): (i32, String) = serde_json::from_slice(&frame.body)
                    .map_err(|e| Error::run(format!("rank {peer} failed and can't say why: {e}")))?;
                return Err(Error::reported(ExitCode::from_number(code), text));
            }
            _ => return self.offer(tag, peer, frame, slot),
        }
        Ok(true)
    }

    fn offer(&mut self, tag: Tag, peer: usize, frame: Frame, slot: usize) -> Result<bool> {
        match (self.take)(tag, peer, frame)? {
            Pumped::Taken => Ok(true),
            Pumped::Later(frame) => {
                self.waiting[slot] = Some((peer, frame));
                Ok(false)
            }
        }
    }

    /// Whether every rank has reached the end. Rank 0 hears it from all, then tells all.
    fn finished(&mut self) -> Result<bool> {
        let cluster = self.cluster;
        if !cluster.is_root() {
            return Ok(cluster.transport.as_ref().is_some_and(|t| t.poll(Tag::Stop).is_some()));
        }
        if self.done < cluster.size || self.waiting.iter().any(Option::is_some) {
            return Ok(false);
        }
        if let Some(transport) = &cluster.transport {
            (1..cluster.size).for_each(|peer| transport.send(peer, Tag::Stop, Frame::default()));
            while transport.progress() > 0 {
                std::thread::yield_now();
            }
        }
        Ok(true)
    }

    /// Reports this rank's failure to rank 0 and gives it time to end the job, so that it is told once.
    fn fail(&mut self, error: Error) -> Error {
        if let (Some(transport), false) = (&self.cluster.transport, self.cluster.is_root()) {
            // Rank 0 ends the job by a signal to this rank, among others.
            super::signals::disregard();
            let text = self.cluster.place(&error.to_string());
            let body = serde_json::to_vec(&(error.exit as i32, text)).expect("plain data");
            transport.send(0, Tag::Root, Frame { head: vec![FAIL], body });
            let started = Instant::now();
            while started.elapsed() < PATIENCE {
                transport.progress();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        error
    }
}
