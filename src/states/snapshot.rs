//! Writes hidden states to a file, on a thread of its own.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::file::{failed, path, remove, seeded, temporary};
use crate::error::Result;
use crate::schedule::Kept;
use crate::threads;

/// Micro-batches whose rows may wait in memory for the disk.
const WAITING: usize = 2;

/// Hidden states that a thread writes to a file.
pub struct Snapshot {
    rows: Sender<Vec<u8>>,
    writer: JoinHandle<Result<()>>,
}

impl Snapshot {
    /// Starts the thread that writes the file.
    ///
    /// # Errors
    /// Exit code 5 where the system refuses a thread.
    pub fn begin(writer: Writer) -> Result<Snapshot> {
        let (rows, incoming) = bounded(WAITING);
        let writer = threads::spawn("states", move || writer.run(&incoming))?;
        Ok(Snapshot { rows, writer })
    }

    /// Hands over the rows of the next micro-batch; waits while [`WAITING`] others wait for the disk. Returns false
    /// where the writing thread has ended; [`Snapshot::finish`] then has its error.
    pub fn take(&self, rows: Vec<u8>) -> bool {
        self.rows.send(rows).is_ok()
    }

    /// Waits until the file is complete.
    ///
    /// # Errors
    /// Exit code 5 where the disk refused.
    pub fn finish(self) -> Result<()> {
        drop(self.rows);
        threads::value(self.writer.join())
    }
}

/// The thread behind a [`Snapshot`].
pub struct Writer {
    /// The file.
    pub path: PathBuf,
    /// The directory that it is in.
    pub dir: PathBuf,
    /// Of all rows.
    pub bytes: u64,
    /// The complete files of this run that this rank can read.
    pub files: Arc<Mutex<Vec<Kept>>>,
    /// No file at or before this layer is removed.
    pub protected: usize,
    /// What the file will hold.
    pub kept: Kept,
}

impl Writer {
    fn run(self, rows: &Receiver<Vec<u8>>) -> Result<()> {
        match self.write(rows) {
            Ok(true) => self.supersede(),
            Ok(false) => Ok(()),
            Err(e) => Err(failed("can't keep hidden states", &self.path, e)),
        }
    }

    /// Writes the file; returns whether it is complete. Where rows are missing because the run ended, it is removed.
    fn write(&self, rows: &Receiver<Vec<u8>>) -> std::io::Result<bool> {
        let mut file = temporary(&self.dir)?;
        let (mut digest, mut bytes) = (seeded(&self.path), 0);
        for rows in rows {
            digest.update(&rows);
            file.write_all(&rows)?;
            bytes += rows.len() as u64;
        }
        if bytes != self.bytes {
            return Ok(false);
        }
        file.write_all(digest.finalize().as_bytes())?;
        file.persist(&self.path)?;
        Ok(true)
    }

    /// Adds the new file to the list, and removes older files that neither this process nor a resumed one needs.
    fn supersede(&self) -> Result<()> {
        let mut files = self.files.lock().expect("no holder of this lock panics");
        let older = |kept: &Kept| kept.layer < self.kept.layer && self.kept.covers(&kept.documents);
        let newest = files.iter().filter(|kept| older(kept)).map(|kept| kept.layer).max().unwrap_or(0);
        let superseded = |kept: &Kept| older(kept) && kept.layer < newest && kept.layer > self.protected;
        for kept in files.iter().filter(|kept| superseded(kept)) {
            let path = path(&self.dir, kept);
            remove(&path).map_err(|e| failed("can't remove", &path, e))?;
        }
        files.retain(|kept| !superseded(kept) && *kept != self.kept);
        files.push(self.kept.clone());
        Ok(())
    }
}
