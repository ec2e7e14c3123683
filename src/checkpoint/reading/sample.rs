//! How fast a checkpoint can be read, from a small sample of it.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime};

use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// Blocks that are read at most, and bytes of each.
const BLOCKS: u64 = 32;
const BLOCK: u64 = 4 << 20;

/// How long it may take.
const LONG_ENOUGH: Duration = Duration::from_millis(250);

impl Checkpoint {
    /// Bytes/s at which this host reads the files: up to 128 MiB in blocks that lie spread over them, as many at once
    /// as weights are loaded with, for at most a quarter of a second and a block. Blocks lie elsewhere each time, so
    /// that what an earlier sample left in the page cache is hardly met. They are read, not mapped, and don't count as
    /// [`Checkpoint::bytes_mapped`].
    ///
    /// # Errors
    /// Exit code 5, naming the file, where one can't be read.
    pub fn read_rate(&self) -> Result<f64> {
        let total: u64 = self.lengths.iter().sum();
        let share = (total / BLOCKS).max(1);
        let bytes = share.min(BLOCK);
        let elsewhere =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
        let started = Instant::now();
        let read = |block: u64| {
            if started.elapsed() > LONG_ENOUGH {
                return Ok(0);
            }
            let at = block * share + u64::from(elsewhere).wrapping_mul(2 * block + 1) % (share - bytes + 1);
            self.read_at(at.min(total - 1), &mut vec![0; bytes as usize])
        };
        let read: usize = (0..BLOCKS).into_par_iter().map(read).sum::<Result<usize>>()?;
        Ok(read as f64 / started.elapsed().as_secs_f64())
    }

    /// Reads from byte `at`, counted over all files, at most to the end of a file.
    fn read_at(&self, mut at: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut file = 0;
        while at >= self.lengths[file] {
            at -= self.lengths[file];
            file += 1;
        }
        let read = self.handles[file].read_at(buffer, at);
        read.map_err(|e| {
            Error::run(format!("can't read the source: {e}"))
                .file(&self.files[file])
                .fix("check the disk or the network it is on")
        })
    }
}
