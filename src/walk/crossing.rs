//! Hidden states between the device and other ranks, each way on a thread of its own: while some are copied, the
//! forward pass goes on with others.

use std::convert::Infallible;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, select};

use crate::backend::Backend;
use crate::cluster::{Frame, spare};
use crate::error::{Error, Result};
use crate::finish::{Hidden, Outbox};

/// Hidden states that have been copied to the device, or are ready to leave it, and wait for their turn.
pub const WAITING: usize = 1;

/// A micro-batch's hidden states on the device, from the stage before or the embedding.
pub type Arrived<T> = Result<(usize, T)>;

/// A micro-batch's hidden states on the device, for the stage behind.
pub struct Departing<B: Backend> {
    /// Which one.
    pub micro_batch: usize,
    /// A copy that nobody else uses.
    pub states: B::Tensor,
    /// When it was made.
    pub since: B::Moment,
    /// Its bytes.
    pub bytes: usize,
}

/// Copies what comes to the device, in order, until the walk has ended; returns the seconds of copying.
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

/// Copies hidden states from the device and passes them on, in order, until the walk has ended; returns the seconds of
/// it, without the waiting for the device to make them.
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
        // Waits until they are there.
        backend.seconds(&since, &since)?;
        let started = Instant::now();
        backend.download_as_of(&since, &states, &mut bytes)?;
        outbox.hidden(micro_batch, bytes)?;
        seconds += started.elapsed().as_secs_f64();
    }
    Ok(seconds)
}

/// The walk's ends of both.
pub struct Crossing<B: Backend> {
    /// From the stage before or the embedding, in micro-batch order.
    pub arrived: Receiver<Arrived<B::Tensor>>,
    /// To the stage behind.
    pub departing: Sender<Departing<B>>,
}

impl<B: Backend> Crossing<B> {
    /// The next micro-batch that comes, which is `micro_batch`, into `state`.
    pub fn enter(&self, backend: &B, micro_batch: usize, state: &mut B::Tensor) -> Result<()> {
        let ended = |_| Error::run("what brings hidden states ended early");
        let (number, states) = self.arrived.recv().map_err(ended)??;
        if number != micro_batch {
            return Err(Error::run(format!(
                "hidden states of micro-batch {number} came where those of {micro_batch} are due; please report this"
            )));
        }
        backend.copy(&states, state)
    }

    /// Sends a micro-batch's hidden states, `[rows, cols]`, to the stage behind, as they are now.
    pub fn pass_on(
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
        sent.map_err(|_| Error::run("the thread that passes hidden states on ended early"))
    }
}
