//! Messages over MPI: the only file that calls it. Everything runs on the main thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::thread::ThreadId;

use mpi::environment::Universe;
use mpi::ffi;
use mpi::raw::AsRaw;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, MatchedReceiveVec, Source};

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
const PART: usize = 64 << 20;

/// An initialised MPI.
pub struct Transport {
    world: SimpleCommunicator,
    thread: ThreadId,
    sending: RefCell<VecDeque<Sending>>,
    /// At most one a tag.
    arriving: RefCell<Vec<Arriving>>,
    /// Finalises MPI when dropped.
    _universe: Universe,
}

/// A buffer that MPI is reading.
struct Sending {
    request: ffi::MPI_Request,
    bytes: usize,
    /// Never touched until the request has completed; a Vec's buffer stays where it is when the Vec moves.
    _buffer: Vec<u8>,
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
        version.split(',').next().unwrap_or_default().trim().to_string()
    }

    /// Starts sending; returns at once.
    pub fn send(&self, peer: usize, tag: Tag, frame: Frame) {
        let mut first = (frame.body.len() as u64).to_le_bytes().to_vec();
        first.extend(frame.head);
        self.start_send(peer, tag, first);
        if frame.body.len() <= PART {
            if !frame.body.is_empty() {
                self.start_send(peer, tag, frame.body);
            }
        } else {
            frame.body.chunks(PART).for_each(|part| self.start_send(peer, tag, part.to_vec()));
        }
    }

    fn start_send(&self, peer: usize, tag: Tag, buffer: Vec<u8>) {
        self.on_main_thread();
        // SAFETY: the buffer is owned by the list below and neither changed nor freed before MPI_Test has
        // reported the request complete (or the process ends). Lengths are at most PART, so they fit a C int.
        let request = unsafe {
            let mut request = ffi::RSMPI_REQUEST_NULL;
            ffi::MPI_Isend(
                buffer.as_ptr().cast(),
                buffer.len() as i32,
                ffi::RSMPI_UINT8_T,
                peer as i32,
                tag as i32,
                self.world.as_raw(),
                &mut request,
            );
            request
        };
        self.sending.borrow_mut().push_back(Sending { request, bytes: buffer.len(), _buffer: buffer });
    }

    /// Lets MPI make progress and frees buffers that have been sent; returns the bytes still on their way.
    pub fn progress(&self) -> usize {
        self.on_main_thread();
        let mut sending = self.sending.borrow_mut();
        sending.retain_mut(|send| {
            let mut done = 0;
            // SAFETY: the request belongs to an MPI_Isend that was not yet reported complete.
            unsafe { ffi::MPI_Test(&mut send.request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            done == 0
        });
        // An empty message on its way counts as well.
        sending.iter().map(|send| send.bytes.max(1)).sum()
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
                arriving.len() - 1
            }
        };
        arriving[begun].requests.retain_mut(|request| {
            let mut done = 0;
            // SAFETY: the request belongs to an MPI_Irecv that was not yet reported complete.
            unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            done == 0
        });
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
        let mut frame = Frame { head: head.to_vec(), body: vec![0; u64::from_le_bytes(*length) as usize] };
        let receive = |part: &mut [u8]| {
            // SAFETY: the part lies in the frame's body, whose heap buffer the caller keeps, neither read nor moved,
            // until MPI_Test has reported the request complete (or the process ends). Lengths are at most PART, so they
            // fit a C int.
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

/// Ends every rank of the job at once. Callable from any thread, at any time after MPI was initialised.
pub fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}
