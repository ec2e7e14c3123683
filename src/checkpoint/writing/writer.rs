//! Writing tensors at their planned places.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use rayon::prelude::*;

use super::placement::{Placement, Slot};
use crate::error::{Error, Result, remedy};
use crate::threads;
use crate::units::binary;

/// Bytes that one thread writes at a time.
const PART: usize = 16 << 20;

/// The open files of an output directory.
#[derive(Debug)]
pub struct OutputFiles {
    placement: Placement,
    files: Vec<(PathBuf, Arc<File>)>,
    /// To the thread that sets the disk to work; it ends with the last sender.
    written: Sender<(Arc<File>, Slot)>,
}

impl OutputFiles {
    /// Creates the files at their final length, so that a disk that is too small is found before anything
    /// is computed, and writes their headers.
    ///
    /// # Errors
    /// Exit code 5: no space, no permission.
    pub fn create(dir: &Path, placement: &Placement) -> Result<OutputFiles> {
        let output = Self::opened(dir, placement, OpenOptions::new().read(true).write(true).create(true))?;
        enough_space(dir, placement, &output.files)?;
        for ((path, file), shard) in output.files.iter().zip(&placement.shards) {
            reserve(file, shard.bytes).map_err(|e| {
                let what =
                    format!("can't reserve {} of {}", binary(shard.bytes), binary(placement.total_bytes()));
                failed(&what, path, e)
            })?;
            file.write_all_at(&shard.header, 0).map_err(|e| failed("can't write", path, e))?;
        }
        Ok(output)
    }

    /// Opens files that another rank or an earlier run created.
    pub fn open(dir: &Path, placement: &Placement) -> Result<OutputFiles> {
        Self::opened(dir, placement, OpenOptions::new().read(true).write(true))
    }

    fn opened(dir: &Path, placement: &Placement, options: &OpenOptions) -> Result<OutputFiles> {
        let open = |name: &str| {
            let path = dir.join(name);
            // A link in its place would lead to somebody else's file.
            let mut options = options.clone();
            let file = options.custom_flags(libc::O_NOFOLLOW).open(&path);
            let file = file.map_err(|e| failed("can't open for writing", &path, e))?;
            Ok((path, Arc::new(file)))
        };
        let files = placement.shards.iter().map(|shard| open(&shard.file_name)).collect::<Result<_>>()?;
        let (written, ranges) = unbounded::<(Arc<File>, Slot)>();
        let write_back = move || ranges.iter().for_each(|(file, slot)| start_writing_back(&file, slot));
        threads::spawn("write-back", write_back)?;
        Ok(OutputFiles { placement: placement.clone(), files, written })
    }

    fn place(&self, name: &str) -> Result<(&Path, &Arc<File>, Slot)> {
        let slot = self
            .placement
            .slot(name)
            .ok_or_else(|| Error::run("the tensor has no place in the output").tensor(name))?;
        let (path, file) = &self.files[slot.shard];
        Ok((path, file, slot))
    }

    /// Writes a whole tensor at its place.
    ///
    /// # Errors
    /// Exit code 5: an unknown tensor, a wrong length, a disk that fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, file, slot) = self.place(name)?;
        if bytes.len() as u64 != slot.bytes {
            let what = format!("{} bytes for a place of {}", bytes.len(), slot.bytes);
            return Err(Error::run(what).file(path).tensor(name));
        }
        // Several threads: one alone copies into the page cache at a fraction of a fast disk's rate.
        let parts = bytes.par_chunks(PART).enumerate();
        parts
            .try_for_each(|(i, part)| file.write_all_at(part, slot.offset + (i * PART) as u64))
            .map_err(|e| failed("can't write", path, e).tensor(name))?;
        // Where that thread is gone, the sync at the end does it all.
        let _ = self.written.send((file.clone(), slot));
        Ok(())
    }

    /// Reads a tensor back.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let (path, file, slot) = self.place(name)?;
        let mut bytes = vec![0; slot.bytes as usize];
        file.read_exact_at(&mut bytes, slot.offset)
            .map_err(|e| failed("can't read", path, e).tensor(name))?;
        Ok(bytes)
    }

    /// Waits until everything written so far is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.files
            .iter()
            .try_for_each(|(path, file)| file.sync_all().map_err(|e| failed("can't write", path, e)))
    }
}

/// Asks the system to begin with the disk's work now, while layers are being computed; the sync at the end then
/// finds little left. It waits where the disk has enough to do, so it has a thread of its own. Only advice: where it
/// fails, the sync does it all.
fn start_writing_back(file: &File, slot: Slot) {
    // SAFETY: the call reads nothing but its arguments, and the descriptor is open.
    unsafe {
        let (at, bytes) = (slot.offset as i64, slot.bytes as i64);
        libc::sync_file_range(file.as_raw_fd(), at, bytes, libc::SYNC_FILE_RANGE_WRITE);
    }
}

/// Compares what is still to be written with what is free: reserving would fill the disk before it fails.
fn enough_space(dir: &Path, placement: &Placement, files: &[(PathBuf, Arc<File>)]) -> Result<()> {
    let reserved: u64 = files.iter().filter_map(|(_, file)| Some(file.metadata().ok()?.blocks() * 512)).sum();
    let needed = placement.total_bytes().saturating_sub(reserved);
    shortage(dir, needed, free_space(&files[0].1))
}

fn shortage(dir: &Path, needed: u64, free: Option<u64>) -> Result<()> {
    match free {
        Some(free) if free < needed => Err(Error::run(format!(
            "not enough space: the output needs {} more, the disk has {}",
            binary(needed),
            binary(free)
        ))
        .file(dir)
        .fix("free some space, or choose another disk")),
        _ => Ok(()),
    }
}

/// Bytes that an ordinary user may still write to the file's disk; none where the file system does not say, which some
/// do with a size of zero blocks.
fn free_space(file: &File) -> Option<u64> {
    // SAFETY: a statvfs is plain data, valid when zeroed; the call fills it.
    let stat = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::fstatvfs(file.as_raw_fd(), &mut stat) == 0).then_some(stat)
    }?;
    (stat.f_blocks > 0).then_some(stat.f_bavail as u64 * stat.f_frsize as u64)
}

/// Allocates blocks where the file system can, else only sets the length. The system call itself is asked:
/// where it is unsupported, `posix_fallocate` would write into every block of the file.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)?;
    // SAFETY: a plain system call on an open descriptor; no memory is involved.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
}

/// An output error with the remedy that fits it.
pub(in crate::checkpoint) fn failed(what: &str, path: &Path, error: io::Error) -> Error {
    let fix = remedy(&error).unwrap_or(match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space, then use --resume if the run had begun; or choose another disk"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "choose a directory that you may write to"
        }
        _ => "check the disk, then use --resume",
    });
    Error::run(format!("{what}: {error}")).file(path).fix(fix)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use serde_json::Map;

    use super::super::placement::OutTensor;
    use super::*;

    fn placement() -> Placement {
        let tensors = [OutTensor::new("a", Dtype::U8, &[3]), OutTensor::new("b", Dtype::F32, &[2])];
        Placement::new(&tensors, 4, &Map::new())
    }

    #[test]
    fn tensors_come_back_in_any_order_and_from_another_opening() {
        let dir = tempfile::tempdir().unwrap();
        let first = OutputFiles::create(dir.path(), &placement()).unwrap();
        let second = OutputFiles::open(dir.path(), &placement()).unwrap();
        second.write("b", &[1; 8]).unwrap();
        first.write("a", &[2; 3]).unwrap();
        first.sync().unwrap();
        assert_eq!((first.read("b").unwrap(), second.read("a").unwrap()), (vec![1; 8], vec![2; 3]));
    }

    #[test]
    fn creating_again_keeps_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        OutputFiles::create(dir.path(), &placement()).unwrap().write("a", &[7; 3]).unwrap();
        assert_eq!(OutputFiles::create(dir.path(), &placement()).unwrap().read("a").unwrap(), [7; 3]);
    }

    #[test]
    fn wrong_lengths_and_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let output = OutputFiles::create(dir.path(), &placement()).unwrap();
        assert!(output.write("a", &[1; 4]).unwrap_err().to_string().contains("4 bytes for a place of 3"));
        assert!(output.write("c", &[]).unwrap_err().to_string().contains("no place"));
    }

    #[test]
    fn a_full_disk_is_found_before_anything_is_reserved() {
        let dir = Path::new("/out");
        let error = shortage(dir, 1 << 43, Some((1 << 43) - 1)).unwrap_err();
        assert_eq!(error.exit, crate::error::ExitCode::Run);
        assert!(error.to_string().contains("not enough space: the output needs 8.00 TiB"), "{error}");
        assert!(error.to_string().contains("/out"), "{error}");
        assert!(shortage(dir, 1 << 43, Some(1 << 43)).is_ok());
        assert!(shortage(dir, 1 << 43, None).is_ok(), "the reservation itself finds it then");
    }
}
