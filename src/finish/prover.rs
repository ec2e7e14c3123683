//! The proof of what is finished, beside the making of the rest. Worth a thread where a GPU computes: the cores have
//! little else to do then.

use std::collections::HashSet;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

use crate::error::Result;
use crate::record::PartId;
use crate::threads;
use crate::verify::Proof;

/// A thread that reads finished layers.
pub struct Prover {
    layers: Sender<usize>,
    proof: JoinHandle<Proof>,
    /// Ranks whose tensors this host writes. What others wrote may still be on their side of a network file system.
    written_here: HashSet<usize>,
}

impl Prover {
    /// Starts it. `written_here` are ranks whose tensors this host writes; layers of others are left to
    /// [`Proof::finish`].
    ///
    /// # Errors
    /// Exit code 5 where the system refuses a thread.
    pub fn start(mut proof: Proof, written_here: HashSet<usize>) -> Result<Prover> {
        let (layers, finished) = unbounded();
        // Threads of its own: in the common pool a copy to the card would wait until a whole linear is read.
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

    /// Takes a part that `rank` has finished.
    pub fn finished(&self, rank: usize, part: PartId) {
        if let (PartId::Layer(layer), true) = (part, self.written_here.contains(&rank)) {
            // Where the thread is gone, its panic shows when it is waited for.
            let _ = self.layers.send(layer);
        }
    }

    /// Waits until every layer that was named has been read.
    pub fn end(self) -> Proof {
        drop(self.layers);
        threads::value(self.proof.join())
    }
}
