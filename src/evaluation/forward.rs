//! Text through the layers of one checkpoint, each rank at its own.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crossbeam_channel::Receiver;

use super::weights::Weights;
use super::{Backend, MicroBatch, OnBackend, Solver};
use crate::cluster::{Cluster, Frame, Tag, ToMain};
use crate::error::{Error, Result};
use crate::forward::{Batch, Decoder, LayerWeights, Tables};
use crate::nvfp4::GlobalScale;
use crate::progress::Steps;

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

/// Walks the text through a checkpoint. Yields the last hidden states of the micro-batches that this rank scores, which
/// are every n-th where there are n ranks.
pub struct Forward<'a> {
    /// The ranks.
    pub cluster: &'a Cluster,
    /// The checkpoint.
    pub weights: &'a Weights,
    /// What to read.
    pub text: &'a Text,
    /// Bytes that the weights of this rank's layers may take. Where they fit, each layer is loaded and dequantized
    /// once, and otherwise once for each group of micro-batches.
    pub room: u64,
    /// Counts each layer over each micro-batch.
    pub steps: &'a Steps,
}

/// Groups of micro-batches for each rank of a pipeline: enough to keep all of them busy.
const GROUPS: usize = 4;

/// The layers of a rank.
pub fn slice(cluster: &Cluster, layers: usize) -> Range<usize> {
    let (rank, ranks) = (cluster.rank(), cluster.size());
    rank * layers / ranks..(rank + 1) * layers / ranks
}

impl OnBackend for Forward<'_> {
    type Output = Result<BTreeMap<usize, Vec<u8>>>;

    fn run<B: Solver>(self, backend: &B) -> Self::Output {
        let Forward { cluster, weights, text, room, steps } = self;
        let (rank, ranks) = (cluster.rank(), cluster.size());
        let slice = slice(cluster, weights.model.layers.len());
        let groups = if ranks == 1 { 1 } else { ranks * GROUPS };
        let group = text.batches.len().div_ceil(groups).max(1);
        let resident = ranks > 1 && weights.layers_bytes(slice.clone()) <= room;
        cluster.work(
            |out, incoming| {
                let walk = Walk {
                    weights,
                    text,
                    backend,
                    slice,
                    group,
                    resident,
                    rank,
                    ranks,
                    incoming,
                    out,
                    steps,
                };
                walk.run()
            },
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
    /// Whether layers are kept from one group to the next.
    resident: bool,
    rank: usize,
    ranks: usize,
    incoming: Receiver<Frame>,
    out: ToMain,
    steps: &'a Steps,
}

/// What a site's inputs are quantized with.
type InputScales = Vec<Option<GlobalScale>>;

impl<B: Backend> Walk<'_, B> {
    fn run(self) -> Result<BTreeMap<usize, Vec<u8>>> {
        let (weights, text) = (self.weights, self.text);
        let lengths = vec![text.window; text.ids.len() / text.window];
        let tables = Tables::new(&weights.model, &lengths);
        let decoder = Decoder::new(self.backend, &weights.model, &tables)?;
        let batches: Vec<Batch<B>> = text
            .batches
            .iter()
            .map(|mb| decoder.batch(&tables, mb.samples.start, &lengths[mb.samples.clone()]))
            .collect::<Result<_>>()?;
        let most = batches.iter().map(|batch| batch.tokens).max().unwrap_or(0);
        let mut work = decoder.workspace(most)?;
        let embedding = match self.slice.start {
            0 => Some(self.backend.load(&weights.tensor(&weights.model.embedding.name)?)?),
            _ => None,
        };
        let mut kept = BTreeMap::new();
        let mut layers = HashMap::new();
        for (number, batches) in batches.chunks(self.group).enumerate() {
            let first = number * self.group;
            let mut states = Vec::new();
            for (i, batch) in batches.iter().enumerate() {
                let mut state = self.incoming(first + i, batch.tokens, embedding.as_ref())?;
                if embedding.is_some() {
                    decoder.embedded(&mut state)?;
                }
                states.push(state);
            }
            for layer in self.slice.clone() {
                let (loaded, scales) = match layers.remove(&layer) {
                    Some(kept) => kept,
                    None => self.load(layer)?,
                };
                let mut quantize = |site: usize, x: &mut B::Tensor| match scales[site] {
                    Some(scale) => self.backend.quantize_input(x, scale),
                    None => Ok(()),
                };
                for (batch, state) in batches.iter().zip(&mut states) {
                    decoder.layer(
                        &weights.model.layers[layer],
                        &loaded,
                        batch,
                        &mut work,
                        state,
                        &mut quantize,
                    )?;
                    self.steps.step();
                }
                if self.resident {
                    layers.insert(layer, (loaded, scales));
                }
            }
            for (i, state) in states.iter().enumerate() {
                let mut bytes = Vec::new();
                self.backend.download(state, &mut bytes)?;
                if self.rank + 1 == self.ranks {
                    kept.insert(first + i, bytes);
                } else {
                    self.send(self.rank + 1, bytes)?;
                }
            }
        }
        self.share(kept)
    }

    fn load(&self, layer: usize) -> Result<(LayerWeights<B::Tensor>, InputScales)> {
        let weights = self.weights;
        let loaded =
            LayerWeights::load(self.backend, &weights.model.layers[layer], &|name| weights.tensor(name))?;
        let sites = 0..weights.model.layers[layer].sites.len();
        let scales = sites.map(|site| weights.input_scale(layer, site)).collect::<Result<_>>()?;
        Ok((loaded, scales))
    }

    /// Gives each rank the last hidden states that it scores. The last rank begins with it when it has received
    /// everything, so no rank waits for it with something left to send.
    fn share(&self, mut all: BTreeMap<usize, Vec<u8>>) -> Result<BTreeMap<usize, Vec<u8>>> {
        let batches = 0..self.text.batches.len();
        if self.rank + 1 == self.ranks {
            for batch in batches.filter(|batch| batch % self.ranks != self.rank) {
                let bytes = all.remove(&batch).expect("every micro-batch ends on the last rank");
                self.send(batch % self.ranks, bytes)?;
            }
            return Ok(all);
        }
        batches.filter(|batch| batch % self.ranks == self.rank).map(|b| Ok((b, self.receive()?))).collect()
    }

    fn send(&self, peer: usize, body: Vec<u8>) -> Result<()> {
        let frame = Frame { head: vec![], body };
        self.out.send(peer, Tag::Hidden, frame)
    }

    fn receive(&self) -> Result<Vec<u8>> {
        let ended = |_| Error::run("another stage ended without sending its hidden states");
        self.incoming.recv().map(|frame| frame.body).map_err(ended)
    }

    /// The hidden states of a micro-batch before this rank's first layer: embedded on the first rank, received on
    /// the others.
    fn incoming(&self, number: usize, tokens: usize, embedding: Option<&B::Tensor>) -> Result<B::Tensor> {
        let mut state = self.backend.activation(tokens, self.weights.model.hidden)?;
        match embedding {
            Some(table) => {
                self.backend.embed(table, &self.backend.index(self.text.ids_of(number))?, &mut state)?
            }
            None => self.backend.upload(&self.receive()?, &mut state)?,
        }
        Ok(state)
    }
}
