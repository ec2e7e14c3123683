//! Hidden states between the device and other ranks, each way on a thread of its own: while some are copied, the
//! forward pass goes on with others.

use std::convert::Infallible;

use crossbeam_channel::{Receiver, Sender, select};

use super::messages::{Hidden, Outbox};
use crate::backend::Backend;
use crate::cluster::{Frame, spare};
use crate::error::{Error, Result};

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

/// Copies what comes to the device, in order, until the walk has ended.
pub fn arrivals<B: Backend>(
    backend: &B,
    cols: usize,
    incoming: &Receiver<Frame>,
    walk: &Sender<Arrived<B::Tensor>>,
    ended: &Receiver<Infallible>,
) {
    loop {
        let frame = select! {
            recv(incoming) -> frame => frame,
            recv(ended) -> _ => return,
        };
        let Ok(frame) = frame else { return };
        let Hidden { micro_batch, bytes } = Hidden::from_frame(frame);
        let arrived = backend.arrived(&bytes, cols).map(|states| (micro_batch, states));
        spare::give(bytes);
        select! {
            send(walk, arrived) -> sent => if sent.is_err() { return },
            recv(ended) -> _ => return,
        }
    }
}

/// Copies hidden states from the device and passes them on, in order, until the walk has ended.
///
/// # Errors
/// Exit code 5: a device that fails.
pub fn departures<B: Backend>(
    backend: &B,
    outbox: &Outbox,
    departing: &Receiver<Departing<B>>,
) -> Result<()> {
    departing.iter().try_for_each(|Departing { micro_batch, states, since, bytes }| {
        let mut bytes = spare::take(bytes);
        backend.download_as_of(&since, &states, &mut bytes)?;
        outbox.hidden(micro_batch, bytes)
    })
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
        debug_assert_eq!(number, micro_batch, "messages of one sender arrive in order");
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
