//! The first stage's hidden states: rows of the embedding, gathered in host memory on a thread of its own. The walk
//! receives them as it would receive those of an earlier stage, so a GPU needs memory for these rows and not for the
//! table.

use std::convert::Infallible;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, select};
use rayon::ThreadPool;
use rayon::prelude::*;

use super::transfer::Arrived;
use crate::backend::{Backend, Compute};
use crate::checkpoint::{SourceTensor, narrow, widen};
use crate::error::Result;
use crate::job::Job;
use crate::schedule::{Route, Routes};
use crate::threads;

/// Threads that gather rows. Few are enough, since gathering is faster than computing a layer. They are not those of
/// the common pool, where they would wait for tasks that write to the disk.
const GATHERING: usize = 4;

/// Embeds every micro-batch that enters at the first layer, in the order in which the walk takes them, until the walk
/// has ended; returns the seconds of gathering and copying.
pub fn embed<B: Backend>(
    backend: &B,
    job: &Job,
    routes: &Routes,
    walk: &Sender<Arrived<B::Tensor>>,
    ended: &Receiver<Infallible>,
) -> f64 {
    let mut seconds = 0.0;
    let begins = |route: &Option<Route>| route.as_ref().is_some_and(|route| route.enter == 0 && !route.kept);
    let sweeps = routes.forward.iter().enumerate().chain(routes.own.iter().enumerate());
    let mut entering = sweeps.filter(|(_, route)| begins(route)).map(|(i, _)| i).peekable();
    if entering.peek().is_none() {
        return seconds;
    }
    let mut gather = Gather::new(job);
    for micro_batch in entering {
        let started = Instant::now();
        let rows = match &mut gather {
            Ok(gather) => gather.rows(job.ids_of(micro_batch), backend.compute()),
            Err(error) => Err(error.clone()),
        };
        let embedded = rows.and_then(|rows| backend.arrived(rows, job.model.hidden));
        seconds += started.elapsed().as_secs_f64();
        select! {
            send(walk, embedded.map(|states| (micro_batch, states))) -> sent => if sent.is_err() { break },
            recv(ended) -> _ => break,
        }
    }
    seconds
}

/// The mapped embedding, and a buffer for the rows of a micro-batch.
struct Gather {
    pool: ThreadPool,
    table: SourceTensor,
    rows: Vec<u8>,
}

impl Gather {
    fn new(job: &Job) -> Result<Gather> {
        let pool = threads::pool("gather", rayon::current_num_threads().min(GATHERING))?;
        let table = job.checkpoint.tensor(&job.model.embedding.name)?;
        Ok(Gather { pool, table, rows: vec![] })
    }

    /// The rows of these tokens, `[tokens, hidden]` in the compute dtype. Token ids must be in the vocabulary.
    fn rows(&mut self, ids: &[u32], compute: Compute) -> Result<&[u8]> {
        let (stored, bytes) = (self.table.dtype, self.table.bytes());
        let row = bytes.len() / self.table.shape[0];
        self.rows.resize(ids.len() * row, 0);
        let gathered = self.rows.par_chunks_exact_mut(row).zip(ids).with_min_len(16);
        let copy = |(to, &id): (&mut [u8], &u32)| to.copy_from_slice(&bytes[id as usize * row..][..row]);
        self.pool.install(|| gathered.for_each(copy));
        if stored != compute.dtype() {
            let shape = [ids.len(), self.table.shape[1]];
            let gathered = SourceTensor::from_bytes(&self.table.name, stored, &shape, &self.rows)?;
            self.rows = narrow(compute.dtype(), &widen(&gathered)?);
        }
        Ok(&self.rows)
    }
}
