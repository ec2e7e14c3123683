//! The messages between ranks: hidden states to the next stage, and events and tensors to rank 0.

use crate::cluster::{Frame, Tag, ToMain};
use crate::error::{Error, Result};
use crate::record::{Observed, PartRecord};

/// Hidden states of one micro-batch.
pub struct Hidden {
    /// The micro-batch.
    pub micro_batch: usize,
    /// `[tokens, hidden]` in the compute dtype.
    pub bytes: Vec<u8>,
}

/// Something that happened on a rank, for rank 0.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Event {
    /// A micro-batch has passed a layer.
    Passed {
        /// The layer.
        layer: usize,
    },
    /// The running maxima of a layer that is not finished yet.
    Observed(Observed),
    /// All tensors of a part have been written, or sent to rank 0 before this message.
    Finished(PartRecord),
}

/// The head of a message to rank 0.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum ToRoot {
    /// An event.
    Event(Event),
    /// The body is an output tensor.
    Tensor {
        /// Its name.
        name: String,
        /// blake3 of the body.
        digest: String,
    },
}

/// Sends the messages of a stage, to the next stage and to rank 0. The main thread passes them to MPI.
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

    /// Sends an event to rank 0.
    pub fn event(&self, event: Event) -> Result<()> {
        self.main.send(0, Tag::Root, Frame { head: head(&ToRoot::Event(event)), body: vec![] })
    }

    /// Sends an output tensor to rank 0, with the digest of its bytes.
    pub fn tensor(&self, name: &str, digest: &str, bytes: Vec<u8>) -> Result<()> {
        let head = head(&ToRoot::Tensor { name: name.to_string(), digest: digest.to_string() });
        self.main.send(0, Tag::Root, Frame { head, body: bytes })
    }

    /// Sends a micro-batch's hidden states to the next stage.
    pub fn hidden(&self, micro_batch: usize, bytes: Vec<u8>) -> Result<()> {
        let peer = self
            .next
            .ok_or_else(|| Error::run("this is the last stage: there is none to send hidden states to"))?;
        self.main.send(peer, Tag::Hidden, Frame { head: micro_batch.to_le_bytes().to_vec(), body: bytes })
    }

    /// Passes the result of a thread through, and reports a failure to the main thread at once: threads that wait for
    /// this one may notice its end much later.
    pub fn report_failure<T>(&self, result: Result<T>) -> Result<T> {
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
