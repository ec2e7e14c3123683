//! Hidden states between the device and other ranks. Each direction has a thread of its own, so that those of some
//! micro-batches are copied while the forward pass computes others.

use std::convert::Infallible;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, select};

use crate::backend::Backend;
use crate::cluster::{Frame, spare};
use crate::error::{Error, Result};
use crate::finish::{Hidden, Outbox};

/// Micro-batches whose hidden states may wait in each channel: copied to the device before the walk takes them, or
/// ready to be copied from it.
pub const WAITING: usize = 1;

/// The number of a micro-batch and its hidden states on the device, from the stage before or the embedding.
pub type Arrived<T> = Result<(usize, T)>;

/// A micro-batch's hidden states on the device, for the next stage.
pub struct Departing<B: Backend> {
    /// Which micro-batch.
    pub micro_batch: usize,
    /// A copy that nothing else uses.
    pub states: B::Tensor,
    /// The moment at which the copy is complete.
    pub since: B::Moment,
    /// The number of its bytes.
    pub bytes: usize,
}

/// Copies received hidden states to the device, in order, until the walk has ended; returns the seconds of copying.
pub fn arrivals<B: Backend>(
    backend: &B,
    cols: usize,
    incoming: &Receiver<Frame>,
    walk: &Sender<Arrived<B::Tensor>>,
    ended: &Receiver<Infallible>,
) -> f64 {
    let mut seconds = 0.0;
    loop {
        let frame = select! {
            recv(incoming) -> frame => frame,
            recv(ended) -> _ => return seconds,
        };
        let Ok(frame) = frame else { return seconds };
        let started = Instant::now();
        let Hidden { micro_batch, bytes } = Hidden::from_frame(frame);
        let arrived = backend.arrived(&bytes, cols).map(|states| (micro_batch, states));
        spare::give(bytes);
        seconds += started.elapsed().as_secs_f64();
        select! {
            send(walk, arrived) -> sent => if sent.is_err() { return seconds },
            recv(ended) -> _ => return seconds,
        }
    }
}

/// Copies hidden states from the device and sends them to the next stage, in order, until the walk has ended; returns
/// the seconds of copying and sending. The time in which the device computes them is not counted.
///
/// # Errors
/// Exit code 5: a device that fails.
pub fn departures<B: Backend>(
    backend: &B,
    outbox: &Outbox,
    departing: &Receiver<Departing<B>>,
) -> Result<f64> {
    let mut seconds = 0.0;
    for Departing { micro_batch, states, since, bytes } in departing {
        let mut bytes = spare::take(bytes);
        // Waits until the device has computed them.
        backend.seconds(&since, &since)?;
        let started = Instant::now();
        backend.download_as_of(&since, &states, &mut bytes)?;
        outbox.hidden(micro_batch, bytes)?;
        seconds += started.elapsed().as_secs_f64();
    }
    Ok(seconds)
}

/// The walk's ends of the channels to both threads.
pub struct Transfer<B: Backend> {
    /// Hidden states from the stage before or the embedding, in micro-batch order.
    pub arrived: Receiver<Arrived<B::Tensor>>,
    /// Hidden states for the next stage.
    pub departing: Sender<Departing<B>>,
}

impl<B: Backend> Transfer<B> {
    /// Waits for the next hidden states, which must be those of `micro_batch`, and copies them into `state`.
    ///
    /// # Errors
    /// Exit code 5 where the thread that brings them failed, or where they are those of another micro-batch.
    pub fn receive(&self, backend: &B, micro_batch: usize, state: &mut B::Tensor) -> Result<()> {
        let ended = |_| Error::run("the thread that brings hidden states ended early");
        let (number, states) = self.arrived.recv().map_err(ended)??;
        if number != micro_batch {
            return Err(Error::run(format!(
                "hidden states of micro-batch {number} came where those of {micro_batch} are due; please report this"
            )));
        }
        backend.copy(&states, state)
    }

    /// Sends a copy of a micro-batch's hidden states, `[rows, cols]`, to the next stage.
    ///
    /// # Errors
    /// Exit code 5 where the device has no memory for it, or the sending thread failed.
    pub fn send(
        &self,
        backend: &B,
        micro_batch: usize,
        state: &B::Tensor,
        [rows, cols]: [usize; 2],
    ) -> Result<()> {
        let mut states = backend.activation(rows, cols)?;
        backend.copy(state, &mut states)?;
        let since = backend.moment()?;
        let bytes = rows * cols * backend.compute().bytes();
        let sent = self.departing.send(Departing { micro_batch, states, since, bytes });
        sent.map_err(|_| Error::run("the thread that sends hidden states ended early"))
    }
}
