//! Copies between ordinary host memory and the card, through page-locked memory.
//!
//! The driver copies ordinary memory with one thread and through small buffers, at a few GB/s; a mapped file's
//! page faults come on top. Several threads on one half of page-locked memory, while the other half is on the bus,
//! keep both at their rates.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice, result};
use rayon::ThreadPool;
use rayon::prelude::*;

/// One kind of tensors' way to the card or from it: on the card, none waits for those of another kind.
pub struct Lane {
    /// Where the bus is given its copies.
    pub stream: Arc<CudaStream>,
    halves: Mutex<[Half; 2]>,
    /// Who copies: in the common pool a copy would wait until others have written to their disks.
    copiers: Arc<ThreadPool>,
}

struct Half {
    buffer: PinnedHostSlice<u8>,
    /// Has passed when the bus has done with the buffer.
    passed: CudaEvent,
}

/// Bytes that travel at a time, a half: a millisecond of copying, less of the bus. Locking pages takes long.
const PART: usize = 16 << 20;
/// Bytes that one thread copies.
const SHARE: usize = 512 << 10;

impl Lane {
    /// Locks the memory.
    pub fn new(stream: Arc<CudaStream>, copiers: &Arc<ThreadPool>) -> Result<Lane, DriverError> {
        let half = || {
            // SAFETY: the memory is written before it is read, below.
            let buffer = unsafe { stream.context().alloc_pinned_with_flags(PART, 0)? };
            Ok(Half { buffer, passed: stream.context().new_event(None)? })
        };
        Ok(Lane { halves: Mutex::new([half()?, half()?]), copiers: copiers.clone(), stream })
    }

    /// Copies `bytes` bytes to the card at `to`; they are there when this returns. `read` fills a part from the
    /// given byte on, from several threads.
    ///
    /// # Safety
    /// `to` is the address of at least as many bytes that belong to the caller.
    pub unsafe fn upload(
        &self,
        bytes: usize,
        read: &(dyn Fn(usize, &mut [u8]) -> crate::error::Result<()> + Sync),
        to: u64,
    ) -> Result<crate::error::Result<()>, DriverError> {
        let stream = &self.stream;
        let mut halves = self.halves.lock().expect("no holder of this lock panics");
        stream.context().bind_to_thread()?;
        for (i, first) in (0..bytes).step_by(PART).enumerate() {
            let half = &mut halves[i % 2];
            half.passed.synchronize()?;
            let staged = &mut half.buffer.as_mut_slice()?[..PART.min(bytes - first)];
            let shares = staged.par_chunks_mut(SHARE).enumerate();
            let fill = shares.map(|(i, share)| read(first + i * SHARE, share));
            if let Err(error) = self.copiers.install(|| fill.collect::<crate::error::Result<()>>()) {
                stream.synchronize()?;
                return Ok(Err(error));
            }
            // SAFETY: in bounds by the caller's promise; the half is not touched before its event has passed.
            unsafe { result::memcpy_htod_async(to + first as u64, staged, stream.cu_stream())? };
            half.passed.record(stream)?;
        }
        stream.synchronize()?;
        Ok(Ok(()))
    }

    /// Copies from the card at `from`, after what the stream was given before.
    ///
    /// # Safety
    /// `from` is the address of at least as many bytes that belong to the caller.
    pub unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), DriverError> {
        let stream = &self.stream;
        let mut halves = self.halves.lock().expect("no holder of this lock panics");
        stream.context().bind_to_thread()?;
        let bytes = to.len();
        let start = |halves: &mut [Half; 2], i: usize| {
            let (first, half) = (i * PART, &mut halves[i % 2]);
            if first >= bytes {
                return Ok(());
            }
            let staged = &mut half.buffer.as_mut_slice()?[..PART.min(bytes - first)];
            // SAFETY: in bounds by the caller's promise; the half is not touched before its event has passed.
            unsafe { result::memcpy_dtoh_async(staged, from + first as u64, stream.cu_stream())? };
            half.passed.record(stream)
        };
        start(&mut halves, 0)?;
        for (i, part) in to.chunks_mut(PART).enumerate() {
            start(&mut halves, i + 1)?;
            let half = &mut halves[i % 2];
            half.passed.synchronize()?;
            let staged = &half.buffer.as_slice()?[..part.len()];
            let shares = part.par_chunks_mut(SHARE).zip(staged.par_chunks(SHARE));
            self.copiers.install(|| shares.for_each(|(to, from)| to.copy_from_slice(from)));
        }
        Ok(())
    }
}
