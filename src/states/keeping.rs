//! When hidden states are worth keeping, and what happens where they can't be.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::directory::States;
use super::snapshot::Snapshot;
use crate::error::Result;
use crate::job::Job;
use crate::schedule::Kept;

/// States are kept when losing them would repeat this share of all passes of micro-batches through layers.
const WORTH: usize = 64;

/// Keeping may hold up the walk for this share of its time, and for [`GRACE`] besides.
const SHARE: u32 = 20;
const GRACE: Duration = Duration::from_secs(1);

/// Decides what a stage keeps.
pub struct Keeper<'a> {
    states: Option<&'a States>,
    job: &'a Job,
    /// States before this layer and earlier ones are needed again.
    protected: usize,
    started: Instant,
    held_up: Duration,
    /// The disk has refused once.
    given_up: bool,
}

/// Hidden states before one layer, being kept.
pub struct Keeping {
    layer: usize,
    /// Consecutive micro-batches that are still to come, a file each.
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
        let (started, held_up) = (Instant::now(), Duration::ZERO);
        Keeper { states, job, protected: 0, started, held_up, given_up: false }
    }

    /// From now on states before `layer` and earlier ones stay.
    pub fn protect(&mut self, layer: usize) {
        self.protected = layer;
    }

    /// The directory.
    pub fn states(&self) -> Option<&'a States> {
        self.states
    }

    /// Prepares to keep these micro-batches, in their order, before `layer`: where they are `needed`, or where losing
    /// them would repeat `passes` through a layer and that is worth it.
    pub fn open(&self, layer: usize, micro_batches: &[usize], needed: bool, passes: usize) -> Keeping {
        let all = self.job.model.layers.len() * self.job.micro_batches.len();
        let worth = || {
            let allowed = self.started.elapsed() / SHARE + GRACE;
            !self.given_up && passes * WORTH >= all && self.held_up <= allowed
        };
        let mut runs: Vec<Range<usize>> = Vec::new();
        if self.states.is_some() && (needed || worth()) {
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
    /// Exit code 5 where the disk refuses what is needed; otherwise that is a warning, and nothing is kept any more.
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
            // A layer counts as finished only after this, so what is finished need not be forwarded again.
            match file.finish() {
                Err(error) if keeping.needed => return Err(error),
                Err(error) => {
                    tracing::warn!("{error}; the run goes on, but one that resumes it will repeat more");
                    self.given_up = true;
                }
                Ok(()) => {}
            }
        }
        self.held_up += started.elapsed();
        Ok(())
    }
}
