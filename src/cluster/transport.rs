//! Messages over MPI: the only file that calls it. Everything runs on the main thread.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use mpi::environment::Universe;
use mpi::ffi;
use mpi::raw::AsRaw;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, MatchedReceiveVec, Source};

use super::spare;
use crate::error::{Error, Result};

/// What a message is about. Messages with the same tag arrive in the order in which their sender sent them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Tag {
    /// Hidden states, to the next stage.
    Hidden = 1,
    /// Events and tensors, to rank 0.
    Root = 2,
    /// Collective exchanges outside of the pipeline.
    Collective = 3,
    /// The end of the pipeline, from rank 0.
    Stop = 4,
    /// Signs of life; with a body, to rank 0, a failure.
    Pulse = 5,
}

/// A message: a small head and a body of any size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// A few bytes that say what the body is.
    pub head: Vec<u8>,
    /// The payload.
    pub body: Vec<u8>,
}

/// MPI counts elements in an `int`, and large messages hold up small ones: bodies travel in parts.
const PART: usize = 8 << 20;

/// How long something on its way may show no progress and still be looked after all the time: a part takes less on any
/// link that is faster than looking once in a while would be.
const MOVING: Duration = Duration::from_millis(10);

/// An initialised MPI.
pub struct Transport {
    world: SimpleCommunicator,
    thread: ThreadId,
    sending: RefCell<VecDeque<Sending>>,
    /// At most one a tag.
    arriving: RefCell<Vec<Arriving>>,
    /// When the last part began or ended its way.
    moved: Cell<Instant>,
    /// Finalises MPI when dropped.
    _universe: Universe,
}

/// A buffer that MPI is reading.
struct Sending {
    request: ffi::MPI_Request,
    bytes: usize,
    /// Shared by the parts of a message, and never touched until the last has been sent; a Vec's buffer stays where it
    /// is when the Vec moves.
    buffer: Rc<Vec<u8>>,
}

/// A message whose beginning is here, and whose body MPI is writing. Nothing waits for the rest: a link may go down
/// in the middle of it.
struct Arriving {
    peer: usize,
    tag: Tag,
    /// Its body's buffer is not touched until all requests have completed, and stays where it is when it moves.
    frame: Frame,
    requests: Vec<ffi::MPI_Request>,
}

impl Transport {
    /// Initialises MPI.
    ///
    /// # Errors
    /// Exit code 5 where MPI refuses.
    pub fn start() -> Result<Transport> {
        let started = mpi::initialize_with_threading(mpi::Threading::Funneled);
        let (universe, _) = started.ok_or_else(|| Error::run("MPI was initialised twice"))?;
        Ok(Transport {
            world: universe.world(),
            thread: std::thread::current().id(),
            sending: RefCell::default(),
            arriving: RefCell::default(),
            moved: Cell::new(Instant::now()),
            _universe: universe,
        })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    /// Ranks in the job.
    pub fn size(&self) -> usize {
        self.world.size() as usize
    }

    /// The MPI library's name and version.
    pub fn library() -> String {
        let version = mpi::environment::library_version().unwrap_or_default();
        // Open MPI goes on behind a comma, MPICH on further lines.
        let first = version.split([',', '\n']).next().unwrap_or_default();
        first.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Starts sending; returns at once.
    pub fn send(&self, peer: usize, tag: Tag, frame: Frame) {
        let Frame { head, body } = frame;
        let length = body.len();
        let first = [&(length as u64).to_le_bytes()[..], &head].concat();
        let whole = 0..first.len();
        self.start_send(peer, tag, &Rc::new(first), whole);
        let body = Rc::new(body);
        (0..length).step_by(PART).for_each(|at| self.start_send(peer, tag, &body, at..length.min(at + PART)));
    }

    /// Starts sending a range of `buffer`.
    fn start_send(&self, peer: usize, tag: Tag, buffer: &Rc<Vec<u8>>, range: Range<usize>) {
        self.on_main_thread();
        self.moved.set(Instant::now());
        let part = &buffer[range];
        // SAFETY: the buffer is owned by the list below and neither changed nor freed before MPI_Test has reported the
        // request complete, or never, as `drop` sees to. Lengths are at most PART, so they fit a C int.
        let request = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            ffi::MPI_Isend(
                part.as_ptr().cast(),
                part.len() as i32,
                ffi::RSMPI_UINT8_T,
                peer as i32,
                tag as i32,
                self.world.as_raw(),
                &mut request,
            );
            request
        };
        let bytes = part.len();
        self.sending.borrow_mut().push_back(Sending { request, bytes, buffer: buffer.clone() });
    }

    /// Lets MPI make progress and frees buffers that have been sent; returns the bytes still on their way.
    pub fn progress(&self) -> usize {
        self.on_main_thread();
        let mut sending = self.sending.borrow_mut();
        let before = sending.len();
        sending.retain_mut(|send| {
            let mut done = 0;
            // SAFETY: the request belongs to an MPI_Isend that was not yet reported complete.
            unsafe { ffi::MPI_Test(&mut send.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            if done != 0 {
                // With its last part the whole message has been sent.
                if let Ok(buffer) = Rc::try_unwrap(std::mem::take(&mut send.buffer)) {
                    spare::give(buffer);
                }
            }
            done == 0
        });
        if sending.len() < before {
            self.moved.set(Instant::now());
        }
        // An empty message on its way counts as well.
        sending.iter().map(|send| send.bytes.max(1)).sum()
    }

    /// Whether something large is on its way and gets on.
    pub fn is_moving(&self) -> bool {
        let leaving = self.sending.borrow().iter().any(|send| send.buffer.len() > PART);
        let arriving = self.arriving.borrow().iter().any(|message| message.frame.body.len() > PART);
        (leaving || arriving) && self.moved.get().elapsed() < MOVING
    }

    /// The next message with this tag, if one has arrived, and its sender.
    pub fn poll(&self, tag: Tag) -> Option<(usize, Frame)> {
        self.next(tag, None)
    }

    /// The next message from `peer` with this tag, if one has arrived. A tag is polled either so or with
    /// [`Transport::poll`].
    pub fn poll_from(&self, peer: usize, tag: Tag) -> Option<Frame> {
        self.next(tag, Some(peer)).map(|(_, frame)| frame)
    }

    fn next(&self, tag: Tag, from: Option<usize>) -> Option<(usize, Frame)> {
        self.on_main_thread();
        let mut arriving = self.arriving.borrow_mut();
        let begun = match arriving.iter().position(|message| message.tag == tag) {
            Some(begun) => begun,
            None => {
                arriving.push(self.begin(tag, from)?);
                self.moved.set(Instant::now());
                arriving.len() - 1
            }
        };
        let before = arriving[begun].requests.len();
        arriving[begun].requests.retain_mut(|request| {
            let mut done = 0;
            // SAFETY: the request belongs to an MPI_Irecv that was not yet reported complete.
            unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            done == 0
        });
        if arriving[begun].requests.len() < before {
            self.moved.set(Instant::now());
        }
        if !arriving[begun].requests.is_empty() {
            return None;
        }
        let Arriving { peer, frame, .. } = arriving.swap_remove(begun);
        Some((peer, frame))
    }

    /// Takes the first part of a message, which is small, and has MPI write the others into the body as they come:
    /// they are the next ones from this sender with this tag.
    fn begin(&self, tag: Tag, from: Option<usize>) -> Option<Arriving> {
        let arrived = match from {
            Some(peer) => {
                self.world.process_at_rank(peer as i32).immediate_matched_probe_with_tag(tag as i32)
            }
            None => self.world.any_process().immediate_matched_probe_with_tag(tag as i32),
        };
        let (first, status) = arrived?.matched_receive_vec::<u8>();
        let peer = status.source_rank();
        let (length, head) = first.split_first_chunk().expect("a message starts with its length");
        let mut frame =
            Frame { head: head.to_vec(), body: spare::take(u64::from_le_bytes(*length) as usize) };
        let receive = |part: &mut [u8]| {
            // SAFETY: the part lies in the frame's body, whose heap buffer the caller keeps, neither read nor moved,
            // until MPI_Test has reported the request complete, or for ever, as `drop` sees to. Lengths are at most PART,
            // so they fit a C int.
            unsafe {
                let mut request = ffi::RSMPI_REQUEST_NULL;
                ffi::MPI_Irecv(
                    part.as_mut_ptr().cast(),
                    part.len() as i32,
                    ffi::RSMPI_UINT8_T,
                    peer,
                    tag as i32,
                    self.world.as_raw(),
                    &mut request,
                );
                request
            }
        };
        let requests = frame.body.chunks_mut(PART).map(receive).collect();
        Some(Arriving { peer: peer as usize, tag, frame, requests })
    }

    fn on_main_thread(&self) {
        assert_eq!(std::thread::current().id(), self.thread, "MPI is called from the main thread only");
    }
}

impl Drop for Transport {
    /// MPI ends when the fields are dropped, and may be using the buffers of what is still on its way until then: a sign
    /// of life that nobody has taken. They are given to it for good.
    fn drop(&mut self) {
        std::mem::forget(self.sending.take());
        std::mem::forget(self.arriving.take());
    }
}

/// Ends every rank of the job at once. Callable from any thread, at any time after MPI was initialised.
pub fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}
