//! How fast a checkpoint can be read, from a small sample of it.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime};

use super::Checkpoint;
use crate::error::{Error, Result};

/// Blocks that are read at most, and bytes of each.
const BLOCKS: u64 = 32;
const BLOCK: u64 = 4 << 20;

/// How long it may take.
const LONG_ENOUGH: Duration = Duration::from_millis(250);

impl Checkpoint {
    /// Bytes/s at which this host reads the files: up to 128 MiB in blocks that lie spread over them, for at most
    /// a quarter of a second and a block. Blocks lie elsewhere each time, so that what an earlier sample left in
    /// the page cache is hardly met. They are read, not mapped, and don't count as [`Checkpoint::bytes_mapped`].
    ///
    /// # Errors
    /// Exit code 5, naming the file, where one can't be read.
    pub fn read_rate(&self) -> Result<f64> {
        let total: u64 = self.lengths.iter().sum();
        let share = (total / BLOCKS).max(1);
        let mut buffer = vec![0; share.min(BLOCK) as usize];
        let elsewhere =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
        let started = Instant::now();
        let mut read = 0;
        for block in 0..BLOCKS {
            let spare = share - buffer.len() as u64;
            let at = block * share + u64::from(elsewhere).wrapping_mul(2 * block + 1) % (spare + 1);
            read += self.read_at(at.min(total - 1), &mut buffer)?;
            if started.elapsed() > LONG_ENOUGH {
                break;
            }
        }
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
