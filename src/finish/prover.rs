//! Verifies finished layers on rank 0 while other layers are still being computed. Only used where a GPU computes,
//! since the CPU's cores are idle then.

use std::collections::HashSet;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::error::Result;
use crate::record::PartId;
use crate::threads;
use crate::verify::Proof;

/// A thread that reads finished layers back and verifies them.
pub struct Prover {
    layers: Sender<usize>,
    proof: JoinHandle<Proof>,
    /// Ranks whose tensors are written by this host. What other hosts wrote may not be visible here before it is synced
    /// to a network file system.
    written_here: HashSet<usize>,
}

impl Prover {
    /// Starts the thread. `written_here` are the ranks whose tensors this host writes; layers of other ranks are left
    /// to [`Proof::finish`].
    ///
    /// # Errors
    /// Exit code 5 where the system refuses a thread.
    pub fn start(mut proof: Proof, written_here: HashSet<usize>) -> Result<Prover> {
        let (layers, finished) = unbounded();
        // Threads of its own: in the common pool, copies to the GPU would wait until a whole linear is read.
        let pool = threads::pool("proof", rayon::current_num_threads())?;
        let read = move || {
            finished.iter().for_each(|layer| pool.install(|| proof.layer(layer)));
            proof
        };
        let proof = threads::spawn("proof", read)?;
        Ok(Prover { layers, proof, written_here })
    }

    /// Notes that rank 0 writes what `rank` makes.
    pub fn written_here(&mut self, rank: usize) {
        self.written_here.insert(rank);
    }

    /// Queues a part that `rank` has finished, where it can be read on this host already.
    pub fn finished(&self, rank: usize, part: PartId) {
        if let (PartId::Layer(layer), true) = (part, self.written_here.contains(&rank)) {
            // Where the thread has panicked, `end` passes the panic on.
            let _ = self.layers.send(layer);
        }
    }

    /// Waits until every queued layer has been read; returns the proof so far.
    pub fn end(self) -> Proof {
        drop(self.layers);
        threads::value(self.proof.join())
    }
}
