//! Short lists on their way to the card. They are copied into page-locked memory first: from ordinary memory the driver
//! would copy under a lock, until everything before the copy is done.

use std::sync::{Arc, Mutex};

use bytemuck::NoUninit;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, PinnedHostSlice, result};

/// Page-locked memory that lists take in turn; when it is full, the stream is waited for.
pub struct Staging {
    stream: Arc<CudaStream>,
    taken: Mutex<(PinnedHostSlice<u8>, usize)>,
}

/// Bytes of it.
const ROOM: usize = 4 << 20;

impl Staging {
    /// For lists that are used on `stream`.
    pub fn new(stream: Arc<CudaStream>) -> Result<Staging, DriverError> {
        // SAFETY: every part is written before the card reads it, below.
        let room = unsafe { stream.context().alloc_pinned_with_flags(ROOM, 0)? };
        Ok(Staging { taken: Mutex::new((room, 0)), stream })
    }

    /// Copies `values` to the card, behind what the stream was given before.
    pub fn upload<T: DeviceRepr + NoUninit>(&self, values: &[T]) -> Result<CudaSlice<T>, DriverError> {
        // SAFETY: the copies below write all of it.
        let list = unsafe { self.stream.alloc::<T>(values.len())? };
        let to = list.device_ptr(&self.stream).0;
        let mut taken = self.taken.lock().expect("no holder of this lock panics");
        let (room, used) = &mut *taken;
        for (i, part) in bytemuck::cast_slice::<T, u8>(values).chunks(ROOM).enumerate() {
            if *used + part.len() > ROOM {
                self.stream.synchronize()?;
                *used = 0;
            }
            let staged = &mut room.as_mut_slice()?[*used..*used + part.len()];
            staged.copy_from_slice(part);
            // SAFETY: the part lies inside the list; what is staged is not written again before the stream has passed.
            unsafe { result::memcpy_htod_async(to + (i * ROOM) as u64, staged, self.stream.cu_stream())? };
            *used = (*used + part.len()).next_multiple_of(16);
        }
        Ok(list)
    }
}
