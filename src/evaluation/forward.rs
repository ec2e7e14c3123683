//! Text through the layers of one checkpoint, each rank at its own.

use std::ops::Range;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use super::weights::Weights;
use super::{Backend, MicroBatch, OnBackend};
use crate::cluster::{Cluster, Frame, Outgoing, Pumped, Tag};
use crate::error::{Error, Result};
use crate::model::{Batch, Decoder, LayerWeights, Site};

/// Windows of tokens.
pub struct Text {
    /// Windows that walk together.
    pub batches: Vec<MicroBatch>,
    /// Token ids, one window after another.
    pub ids: Vec<u32>,
    /// Tokens of a window.
    pub window: usize,
}

impl Text {
    /// The token ids of a micro-batch.
    pub fn ids_of(&self, batch: usize) -> &[u32] {
        let windows = &self.batches[batch].samples;
        &self.ids[windows.start * self.window..windows.end * self.window]
    }
}

/// Walks the text through a checkpoint; yields the last hidden states on the last rank, nothing elsewhere.
pub struct Forward<'a> {
    /// The ranks.
    pub cluster: &'a Cluster,
    /// The checkpoint.
    pub weights: &'a Weights,
    /// What to read.
    pub text: &'a Text,
}

/// Hidden states that may wait between the main thread and the worker.
const CHANNEL: usize = 8;

/// Groups of micro-batches for each rank of a pipeline: enough to keep all of them busy.
const GROUPS: usize = 4;

impl OnBackend for Forward<'_> {
    type Output = Result<Vec<Vec<u8>>>;

    fn run<B: Backend>(self, backend: &B) -> Self::Output {
        let (rank, ranks) = (self.cluster.rank(), self.cluster.size());
        let layers = self.weights.model.layers;
        let slice = rank * layers / ranks..(rank + 1) * layers / ranks;
        let next = (rank + 1 < ranks).then_some(rank + 1);
        let (to_main, outgoing) = bounded::<Outgoing>(CHANNEL);
        let (to_worker, incoming) = bounded::<Vec<u8>>(CHANNEL);
        let (weights, text) = (self.weights, self.text);
        let groups = if ranks == 1 { 1 } else { ranks * GROUPS };
        let group = text.batches.len().div_ceil(groups).max(1);
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let to_next = to_main.clone();
                let walk = Walk { weights, text, backend, slice, group, next, incoming, to_next };
                walk.run().inspect_err(|error| drop(to_main.send(Outgoing::Fail(error.clone()))))
            });
            let mut to_worker = Some(to_worker);
            let pumped = self.cluster.pump(&outgoing, &mut |_, peer, frame| match &to_worker {
                Some(to_worker) => match to_worker.try_send(frame.body) {
                    Ok(()) => Ok(Pumped::Taken),
                    Err(TrySendError::Full(body)) => Ok(Pumped::Later(Frame { head: vec![], body })),
                    Err(TrySendError::Disconnected(_)) => {
                        Err(Error::run(format!("hidden states from rank {peer} came unasked")))
                    }
                },
                None => Err(Error::run("the job is ending because of another failure")),
            });
            if pumped.is_err() {
                to_worker = None;
                drop(outgoing);
            }
            let walked = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            drop(to_worker);
            pumped.and(walked)
        })
    }
}

struct Walk<'a, B: Backend> {
    weights: &'a Weights,
    text: &'a Text,
    backend: &'a B,
    slice: Range<usize>,
    /// Micro-batches that pass a layer before the next is loaded.
    group: usize,
    next: Option<usize>,
    incoming: Receiver<Vec<u8>>,
    to_next: Sender<Outgoing>,
}

impl<B: Backend> Walk<'_, B> {
    fn run(self) -> Result<Vec<Vec<u8>>> {
        let (weights, text) = (self.weights, self.text);
        let lengths = vec![text.window; text.ids.len() / text.window];
        let table = weights.model.rope.table(&lengths);
        let decoder = Decoder::new(self.backend, &weights.model, &table)?;
        let batches: Vec<Batch<B>> = text
            .batches
            .iter()
            .map(|mb| decoder.batch(&table, mb.samples.start, &lengths[mb.samples.clone()]))
            .collect::<Result<_>>()?;
        let most = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
        let mut work = decoder.workspace(most)?;
        let mut kept = Vec::new();
        for (number, batches) in batches.chunks(self.group).enumerate() {
            let mut states = Vec::new();
            for (i, batch) in batches.iter().enumerate() {
                states.push(self.incoming(number * self.group + i, batch.tokens)?);
            }
            for layer in self.slice.clone() {
                let loaded =
                    LayerWeights::load(self.backend, &weights.model, layer, &|name| weights.tensor(name))?;
                let mut scales = [None; 4];
                for site in Site::ALL {
                    scales[site as usize] = weights.input_scale(layer, site)?;
                }
                let mut quantize = |site: Site, x: &mut B::Tensor| match scales[site as usize] {
                    Some(scale) => self.backend.quantize_input(x, scale),
                    None => Ok(()),
                };
                for (batch, state) in batches.iter().zip(&mut states) {
                    decoder.layer(&loaded, batch, &mut work, state, &mut quantize)?;
                }
            }
            for state in &states {
                let mut bytes = Vec::new();
                self.backend.download(state, &mut bytes)?;
                match self.next {
                    None => kept.push(bytes),
                    Some(peer) => {
                        let frame = Frame { head: vec![], body: bytes };
                        let sent = self.to_next.send(Outgoing::Message { peer, tag: Tag::Hidden, frame });
                        sent.map_err(|_| Error::run("the job is ending because of another failure"))?;
                    }
                }
            }
        }
        Ok(kept)
    }

    /// The hidden states of a micro-batch before this rank's first layer.
    fn incoming(&self, number: usize, tokens: usize) -> Result<B::Tensor> {
        let (weights, text) = (self.weights, self.text);
        let mut state = self.backend.activation(tokens, weights.model.hidden)?;
        if self.slice.start == 0 {
            let table = self.backend.load(&weights.tensor(&weights.model.embedding().name)?)?;
            self.backend.embed(&table, &self.backend.index(text.ids_of(number))?, &mut state)?;
        } else {
            let ended = |_| Error::run("the stage before ended without sending its hidden states");
            self.backend.upload(&self.incoming.recv().map_err(ended)?, &mut state)?;
        }
        Ok(state)
    }
}
