//! Decides which hidden states are kept in files, and what happens where the disk refuses.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::directory::States;
use super::snapshot::Snapshot;
use crate::error::Result;
use crate::job::Job;
use crate::schedule::Kept;

/// Hidden states are kept when a resumed run without them would repeat at least `1 / LEAST_REPETITION` of all passes of
/// micro-batches through layers.
const LEAST_REPETITION: usize = 64;

/// Keeping hidden states may delay the walk by `1 / DELAY_SHARE` of its time so far, and by [`DELAY_ALLOWANCE`] more.
const DELAY_SHARE: u32 = 20;
const DELAY_ALLOWANCE: Duration = Duration::from_secs(1);

/// Decides which hidden states a stage keeps.
pub struct Keeper<'a> {
    states: Option<&'a States>,
    job: &'a Job,
    /// Hidden states before this layer and before earlier ones are needed again, so their files stay.
    protected: usize,
    started: Instant,
    delay: Duration,
    /// Whether the disk has refused once.
    given_up: bool,
}

/// Hidden states before one layer that are being kept.
pub struct Keeping {
    layer: usize,
    /// Runs of consecutive micro-batches whose files are not complete, one file each.
    runs: Vec<Range<usize>>,
    /// Whether the run can't go on without them.
    needed: bool,
    file: Option<Snapshot>,
}

impl Keeping {
    /// The layer.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Whether anything is kept.
    pub fn any(&self) -> bool {
        !self.runs.is_empty()
    }
}

impl<'a> Keeper<'a> {
    /// Keeps in `states`, where there is a directory for them.
    pub fn new(states: Option<&'a States>, job: &'a Job) -> Keeper<'a> {
        let (started, delay) = (Instant::now(), Duration::ZERO);
        Keeper { states, job, protected: 0, started, delay, given_up: false }
    }

    /// From now on the files before `layer` and before earlier layers are not removed.
    pub fn protect(&mut self, layer: usize) {
        self.protected = layer;
    }

    /// The directory.
    pub fn states(&self) -> Option<&'a States> {
        self.states
    }

    /// Prepares to keep the hidden states of these micro-batches, in their order, before `layer`. They are kept where
    /// they are `needed`, and where a resumed run would otherwise repeat `passes` of a micro-batch through a layer and
    /// this is more than [`LEAST_REPETITION`] allows.
    pub fn open(&self, layer: usize, micro_batches: &[usize], needed: bool, passes: usize) -> Keeping {
        let all = self.job.model.layers.len() * self.job.micro_batches.len();
        let worthwhile = || {
            let allowed = self.started.elapsed() / DELAY_SHARE + DELAY_ALLOWANCE;
            !self.given_up && passes * LEAST_REPETITION >= all && self.delay <= allowed
        };
        let mut runs: Vec<Range<usize>> = Vec::new();
        if self.states.is_some() && (needed || worthwhile()) {
            for &i in micro_batches {
                match runs.last_mut() {
                    Some(run) if run.end == i => run.end += 1,
                    _ => runs.push(i..i + 1),
                }
            }
        }
        Keeping { layer, runs, needed, file: None }
    }

    /// Keeps a micro-batch's hidden states, where they are among those of `keeping`.
    ///
    /// # Errors
    /// Exit code 5 where the disk refuses and the hidden states are needed. Where they are not, the refusal is a
    /// warning, and nothing more is kept.
    pub fn keep(
        &mut self,
        keeping: &mut Keeping,
        micro_batch: usize,
        download: impl FnOnce(&mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let (Some(states), Some(run)) = (self.states, keeping.runs.first().cloned()) else { return Ok(()) };
        if !run.contains(&micro_batch) {
            return Ok(());
        }
        let started = Instant::now();
        if run.start == micro_batch {
            let documents = |i: usize| &self.job.micro_batches[i].samples;
            let documents = documents(run.start).start..documents(run.end - 1).end;
            keeping.file = Some(states.begin(Kept { layer: keeping.layer, documents }, self.protected)?);
        }
        let file = keeping.file.take().expect("begun with its first micro-batch");
        let mut rows = Vec::new();
        download(&mut rows)?;
        let taken = file.take(rows);
        if taken && run.end > micro_batch + 1 {
            keeping.file = Some(file);
        } else {
            keeping.runs.remove(0);
            // The layer is handed to the finisher only after this. So a finished layer always has the hidden states
            // behind it on the disk, and need not be computed again.
            match file.finish() {
                Err(error) if keeping.needed => return Err(error),
                Err(error) => {
                    tracing::warn!("{error}; the run goes on, but one that resumes it will repeat more");
                    self.given_up = true;
                }
                Ok(()) => {}
            }
        }
        self.delay += started.elapsed();
        Ok(())
    }
}
