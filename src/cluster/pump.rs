//! The main thread's loop while workers compute: messages out, messages in, and an end that every rank
//! reaches together.

use crossbeam_channel::{Receiver, TryRecvError};

use super::{Cluster, Frame, Tag};
use crate::error::{Error, Result};

/// A message that a worker hands to the main thread.
pub(super) struct Outgoing {
    /// The receiver, which may be this rank.
    pub(super) peer: usize,
    /// What it is about.
    pub(super) tag: Tag,
    /// The message.
    pub(super) frame: Frame,
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

/// First byte of a head: a worker's message, or the end of all that its sender has to say.
const MESSAGE: u8 = 0;
const DONE: u8 = 1;

impl Cluster {
    /// Sends what `outgoing` yields and hands received messages to `take`, until every rank's channel is
    /// closed and everything that was sent has been taken.
    ///
    /// # Errors
    /// The first that comes from `failed`, or that of a rank that failed or is silent, which names it.
    pub(super) fn pump(
        &self,
        outgoing: &Receiver<Outgoing>,
        failed: &Receiver<Error>,
        take: &mut dyn FnMut(Tag, usize, Frame) -> Result<Pumped>,
    ) -> Result<()> {
        let mut state = Pump::new(self, take);
        let mut idle = self.idle();
        loop {
            let mut moved = false;
            self.stay_alive()?;
            failed.try_recv().map_or(Ok(()), Err)?;
            let in_flight = self.transport.as_ref().map_or(0, |transport| transport.progress());
            if in_flight < IN_FLIGHT {
                match outgoing.try_recv() {
                    Ok(Outgoing { peer, tag, frame }) => {
                        moved = true;
                        state.send(peer, tag, MESSAGE, frame)?;
                    }
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) if !state.said_done && in_flight == 0 => {
                        // A worker that failed has said so before it closed its channel.
                        failed.try_recv().map_or(Ok(()), Err)?;
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
            if moved { idle.reset() } else { self.rest(&mut idle) }
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
}

impl<'a> Pump<'a> {
    fn new(cluster: &'a Cluster, take: &'a mut dyn FnMut(Tag, usize, Frame) -> Result<Pumped>) -> Pump<'a> {
        Pump { cluster, take, waiting: [None, None], done: 0, said_done: false }
    }

    fn send(&mut self, peer: usize, tag: Tag, kind: u8, mut frame: Frame) -> Result<()> {
        frame.head.insert(0, kind);
        match &self.cluster.transport {
            Some(transport) if peer != self.cluster.rank => {
                self.cluster.pulse.expect(peer);
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
            self.cluster.pulse.hear(peer);
        }
        if frame.head.remove(0) == MESSAGE {
            return self.offer(tag, peer, frame, slot);
        }
        self.done += 1;
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
            cluster.wait_until(|| (transport.progress() == 0).then_some(()));
        }
        Ok(true)
    }
}
