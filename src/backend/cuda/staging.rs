//! Copies between ordinary host memory and the card, through page-locked memory.
//!
//! The driver copies ordinary memory with one thread and through small buffers, at a few GB/s; a mapped file's
//! page faults come on top. Several threads filling page-locked memory keep the bus at its rate.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaStream, DriverError, PinnedHostSlice, result};
use rayon::prelude::*;

/// Page-locked memory for one direction.
pub struct Staging {
    buffer: Mutex<PinnedHostSlice<u8>>,
}

/// Bytes that travel at a time: a millisecond or two of copying and of the bus. Locking pages takes long.
const PART: usize = 32 << 20;
/// Bytes that one thread copies.
const SHARE: usize = 1 << 20;

impl Staging {
    /// Locks the memory.
    pub fn new(context: &Arc<CudaContext>) -> Result<Staging, DriverError> {
        // SAFETY: the memory is written before it is read, below.
        let buffer = unsafe { context.alloc_pinned_with_flags(PART, 0)? };
        Ok(Staging { buffer: Mutex::new(buffer) })
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
        stream: &CudaStream,
    ) -> Result<crate::error::Result<()>, DriverError> {
        let mut buffer = self.buffer.lock().expect("no holder of this lock panics");
        stream.context().bind_to_thread()?;
        for first in (0..bytes).step_by(PART) {
            let staged = &mut buffer.as_mut_slice()?[..PART.min(bytes - first)];
            let shares = staged.par_chunks_mut(SHARE).enumerate();
            let filled =
                shares.map(|(i, share)| read(first + i * SHARE, share)).collect::<crate::error::Result<()>>();
            if let Err(error) = filled {
                return Ok(Err(error));
            }
            // SAFETY: in bounds by the caller's promise; the buffer is not touched before the copy is done.
            unsafe { result::memcpy_htod_async(to + first as u64, staged, stream.cu_stream())? };
            stream.synchronize()?;
        }
        Ok(Ok(()))
    }

    /// Copies from the card at `from`, after what the stream was given before.
    ///
    /// # Safety
    /// `from` is the address of at least as many bytes that belong to the caller.
    pub unsafe fn download(&self, from: u64, to: &mut [u8], stream: &CudaStream) -> Result<(), DriverError> {
        let mut buffer = self.buffer.lock().expect("no holder of this lock panics");
        stream.context().bind_to_thread()?;
        for (i, part) in to.chunks_mut(PART).enumerate() {
            let staged = &mut buffer.as_mut_slice()?[..part.len()];
            // SAFETY: as above.
            unsafe { result::memcpy_dtoh_async(staged, from + (i * PART) as u64, stream.cu_stream())? };
            stream.synchronize()?;
            part.par_chunks_mut(SHARE)
                .zip(staged.par_chunks(SHARE))
                .for_each(|(to, from)| to.copy_from_slice(from));
        }
        Ok(())
    }
}
