//! Text through the layers of one checkpoint, each rank at its own.

use std::ops::Range;

use crossbeam_channel::Receiver;

use super::weights::Weights;
use super::{Backend, MicroBatch, OnBackend, Solver};
use crate::cluster::{Cluster, Frame, Tag, ToMain};
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

/// Groups of micro-batches for each rank of a pipeline: enough to keep all of them busy.
const GROUPS: usize = 4;

impl OnBackend for Forward<'_> {
    type Output = Result<Vec<Vec<u8>>>;

    fn run<B: Solver>(self, backend: &B) -> Self::Output {
        let (rank, ranks) = (self.cluster.rank(), self.cluster.size());
        let layers = self.weights.model.layers;
        let slice = rank * layers / ranks..(rank + 1) * layers / ranks;
        let next = (rank + 1 < ranks).then_some(rank + 1);
        let (weights, text) = (self.weights, self.text);
        let groups = if ranks == 1 { 1 } else { ranks * GROUPS };
        let group = text.batches.len().div_ceil(groups).max(1);
        self.cluster.work(
            |to_next, incoming| Walk { weights, text, backend, slice, group, next, incoming, to_next }.run(),
            |peer, _| Err(Error::run(format!("rank {peer} sent a message that is not for this rank"))),
        )
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
    incoming: Receiver<Frame>,
    to_next: ToMain,
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
        let embedding = match self.slice.start {
            0 => Some(self.backend.load(&weights.tensor(&weights.model.embedding().name)?)?),
            _ => None,
        };
        let mut kept = Vec::new();
        for (number, batches) in batches.chunks(self.group).enumerate() {
            let mut states = Vec::new();
            for (i, batch) in batches.iter().enumerate() {
                states.push(self.incoming(number * self.group + i, batch.tokens, embedding.as_ref())?);
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
                        self.to_next.send(peer, Tag::Hidden, frame)?;
                    }
                }
            }
        }
        Ok(kept)
    }

    /// The hidden states of a micro-batch before this rank's first layer: embedded on the first rank, received on
    /// the others.
    fn incoming(&self, number: usize, tokens: usize, embedding: Option<&B::Tensor>) -> Result<B::Tensor> {
        let mut state = self.backend.activation(tokens, self.weights.model.hidden)?;
        match embedding {
            Some(table) => {
                self.backend.embed(table, &self.backend.index(self.text.ids_of(number))?, &mut state)?
            }
            None => {
                let ended = |_| Error::run("the stage before ended without sending its hidden states");
                self.backend.upload(&self.incoming.recv().map_err(ended)?.body, &mut state)?
            }
        }
        Ok(state)
    }
}
