//! What ranks tell each other while they work.

use crate::cluster::{Frame, Tag, ToMain};
use crate::error::{Error, Result};
use crate::record::{Observed, PartRecord};

/// Hidden states of one micro-batch.
pub struct Hidden {
    /// Which one.
    pub micro_batch: usize,
    /// `[tokens, hidden]` in the compute dtype.
    pub bytes: Vec<u8>,
}

/// What rank 0 hears from the stages.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Event {
    /// A micro-batch has passed a layer.
    Walked {
        /// The layer.
        layer: usize,
    },
    /// Micro-batches have passed a layer that is not finished yet.
    Observed(Observed),
    /// A part is at its place, or all its tensors are on their way to rank 0.
    Finished(PartRecord),
}

/// The head of a message to rank 0.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum ToRoot {
    /// Something happened.
    Event(Event),
    /// The body is an output tensor.
    Tensor {
        /// Its name.
        name: String,
        /// blake3 of the body.
        digest: String,
    },
}

/// A stage's way out: to the next stage and to rank 0, over the main thread.
#[derive(Clone)]
pub struct Outbox {
    main: ToMain,
    next: Option<usize>,
}

impl Outbox {
    /// An outbox whose hidden states go to rank `next`.
    pub fn new(main: ToMain, next: Option<usize>) -> Outbox {
        Outbox { main, next }
    }

    /// Tells rank 0.
    pub fn event(&self, event: Event) -> Result<()> {
        self.main.send(0, Tag::Root, Frame { head: head(&ToRoot::Event(event)), body: vec![] })
    }

    /// Hands an output tensor to rank 0, with the digest of its bytes.
    pub fn tensor(&self, name: &str, digest: &str, bytes: Vec<u8>) -> Result<()> {
        let head = head(&ToRoot::Tensor { name: name.to_string(), digest: digest.to_string() });
        self.main.send(0, Tag::Root, Frame { head, body: bytes })
    }

    /// Passes a micro-batch's hidden states on.
    pub fn hidden(&self, micro_batch: usize, bytes: Vec<u8>) -> Result<()> {
        let peer = self.next.ok_or_else(|| Error::run("there is no stage behind this one"))?;
        self.main.send(peer, Tag::Hidden, Frame { head: micro_batch.to_le_bytes().to_vec(), body: bytes })
    }

    /// What a thread came to. Others may notice much later that it has failed, so the job hears of it at once.
    pub fn told<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| self.main.fail(error))
    }
}

impl Hidden {
    /// Reads what [`Outbox::hidden`] sent.
    pub fn from_frame(frame: Frame) -> Hidden {
        let number = frame.head.try_into().expect("the head of hidden states is a number");
        Hidden { micro_batch: usize::from_le_bytes(number), bytes: frame.body }
    }
}

fn head(message: &ToRoot) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages are plain data")
}
