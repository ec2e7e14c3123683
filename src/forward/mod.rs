//! A decoder layer's forward pass, written once over backend operations, for every layer that [`crate::model`] can
//! describe. Knows neither families nor devices.

mod attention;
mod mlp;
mod weights;
mod workspace;

pub use weights::{LayerWeights, Linear};
pub use workspace::{Workspace, features};

use crate::backend::{Backend, Compute};
use crate::error::Result;
use crate::model::{Block, EmbeddingForm, HeadForm, Layer, Mixer, Model, RopeTable, Temperature};

/// The rotary tables of a set of documents, one for each rotary embedding of the model.
pub struct Tables {
    ropes: Vec<RopeTable>,
    lengths: Vec<usize>,
}

impl Tables {
    /// Tables for documents of these lengths (tokens).
    pub fn new(model: &Model, lengths: &[usize]) -> Tables {
        Tables {
            ropes: model.ropes.iter().map(|rope| rope.table(lengths)).collect(),
            lengths: lengths.to_vec(),
        }
    }
}

/// The documents of one micro-batch, as operations need them.
pub struct Batch<B: Backend> {
    /// Tokens of all documents.
    pub tokens: usize,
    bounds: B::Index,
    /// The row of each token in the table of each rotary embedding.
    rope_rows: Vec<B::Index>,
    /// The position of each token in its document.
    positions: B::Index,
}

/// A rotary table where the backend computes.
struct Rotary<T> {
    cos: T,
    sin: T,
}

/// What the layers of one model share: the backend, the description, the tables of positions.
pub struct Decoder<'a, B: Backend> {
    backend: &'a B,
    model: &'a Model,
    rotary: Vec<Rotary<B::Tensor>>,
    /// The factor of queries by position `[positions, 1]`.
    temperature: Option<B::Tensor>,
}

/// Called with the number of each site and its input before it meets the weights; may change the input.
pub type Observe<'a, T> = &'a mut dyn FnMut(usize, &mut T) -> Result<()>;

impl<'a, B: Backend> Decoder<'a, B> {
    /// Puts the tables where the backend computes.
    ///
    /// # Errors
    /// What the backend returns.
    pub fn new(backend: &'a B, model: &'a Model, tables: &Tables) -> Result<Self> {
        let rotary = |(rope, table): (&crate::model::Rope, &RopeTable)| -> Result<Rotary<B::Tensor>> {
            let constant = |values: &[f32]| match rope.style.exact_tables {
                true => backend.exact_constant(values, table.cols),
                false => backend.constant(values, table.cols),
            };
            Ok(Rotary { cos: constant(&table.cos)?, sin: constant(&table.sin)? })
        };
        let rotary = model.ropes.iter().zip(&tables.ropes).map(rotary).collect::<Result<_>>()?;
        let longest = tables.lengths.iter().copied().max().unwrap_or(0);
        let temperature = |t: &Temperature| backend.constant(&factors(t, longest), 1);
        let temperature = model.temperature.as_ref().map(temperature).transpose()?;
        Ok(Decoder { backend, model, rotary, temperature })
    }

    /// Describes the documents `first..first + lengths.len()` of `tables` as one micro-batch.
    ///
    /// # Errors
    /// What the backend returns.
    pub fn batch(&self, tables: &Tables, first: usize, lengths: &[usize]) -> Result<Batch<B>> {
        let mut bounds = vec![0];
        let mut positions = Vec::new();
        for &length in lengths {
            positions.extend(0..length as u32);
            bounds.push(positions.len() as u32);
        }
        let rope_rows = |table: &RopeTable| {
            let rows = lengths.iter().enumerate().flat_map(|(i, &length)| table.rows(first + i, length));
            self.backend.index(&rows.collect::<Vec<u32>>())
        };
        Ok(Batch {
            tokens: positions.len(),
            bounds: self.backend.index(&bounds)?,
            rope_rows: tables.ropes.iter().map(rope_rows).collect::<Result<_>>()?,
            positions: self.backend.index(&positions)?,
        })
    }

    /// Buffers for micro-batches of at most `tokens` tokens.
    ///
    /// # Errors
    /// What the backend returns.
    pub fn workspace(&self, tokens: usize) -> Result<Workspace<B::Tensor>> {
        Workspace::new(self.backend, self.model, tokens)
    }

    /// Turns rows of the embedding `x` `[tokens, hidden]` into the first hidden state.
    ///
    /// # Errors
    /// What the backend returns.
    pub fn embedded(&self, x: &mut B::Tensor) -> Result<()> {
        let b = self.backend;
        match &self.model.embedded {
            EmbeddingForm::Plain => Ok(()),
            EmbeddingForm::Times(factor) => b.multiply(x, *factor),
            EmbeddingForm::TimesRounded(factor) => b.multiply(x, rounded(b.compute(), *factor)),
            EmbeddingForm::Normed(kind) => b.norm_heads(x, self.model.hidden, kind, None),
        }
    }

    /// Runs one layer over one micro-batch: `x` `[tokens, hidden]` becomes the next hidden state.
    ///
    /// # Errors
    /// What the backend or `observe` returns.
    pub fn layer(
        &self,
        layer: &Layer,
        weights: &LayerWeights<B::Tensor>,
        batch: &Batch<B>,
        work: &mut Workspace<B::Tensor>,
        x: &mut B::Tensor,
        observe: Observe<'_, B::Tensor>,
    ) -> Result<()> {
        work.set_rows(self.backend, batch.tokens);
        for block in &layer.blocks {
            self.block(layer, block, weights, batch, work, x, observe)?;
        }
        match weights.scalar {
            Some(factor) => self.backend.multiply(x, factor),
            None => Ok(()),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn block(
        &self,
        layer: &Layer,
        block: &Block,
        weights: &LayerWeights<B::Tensor>,
        batch: &Batch<B>,
        work: &mut Workspace<B::Tensor>,
        x: &mut B::Tensor,
        observe: Observe<'_, B::Tensor>,
    ) -> Result<()> {
        let b = self.backend;
        match block.input {
            Some(norm) => self.norm(layer, norm, weights, x, &mut work.normed)?,
            // Whoever observes it may change it.
            None => b.copy(x, &mut work.normed)?,
        }
        for (i, mixer) in block.mixers.iter().enumerate() {
            // Two mixers of one block have one input.
            if i == 0 {
                observe(mixer.input_site(), &mut work.normed)?;
            }
            match mixer {
                Mixer::Attention(attention) => {
                    attention::forward(self, layer, attention, weights, batch, work, observe)?
                }
                Mixer::Mlp(mlp) => mlp::forward(self, mlp, weights, work, observe)?,
            }
            let mut output = &mut work.branch;
            if let Some(norm) = block.output {
                self.norm(layer, norm, weights, &work.branch, &mut work.normed)?;
                output = &mut work.normed;
            }
            if let Some(scale) = block.scale {
                b.multiply(output, scale)?;
            }
            b.add(x, output)?;
        }
        Ok(())
    }

    fn norm(
        &self,
        layer: &Layer,
        number: usize,
        weights: &LayerWeights<B::Tensor>,
        x: &B::Tensor,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let of = &weights.norms[number];
        self.backend.norm(x, &layer.norms[number].kind, of.weight.as_ref(), of.bias.as_ref(), out)
    }
}

/// What becomes of the logits that lm_head gives.
///
/// # Errors
/// What the backend returns.
pub fn finish_logits<B: Backend>(backend: &B, form: &HeadForm, logits: &mut B::Tensor) -> Result<()> {
    if form.multiplier != 1.0 {
        backend.multiply(logits, form.multiplier)?;
    }
    form.softcap.map_or(Ok(()), |cap| backend.softcap(logits, cap))
}

/// A number in the dtype that is computed in.
fn rounded(compute: Compute, value: f32) -> f32 {
    match compute {
        Compute::Bf16 => half::bf16::from_f32(value).to_f32(),
        Compute::F32 => value,
    }
}

/// The factor of queries at each position.
fn factors(temperature: &Temperature, positions: usize) -> Vec<f32> {
    let Temperature { beta, positions: period } = *temperature;
    (0..positions).map(|p| 1.0 + beta * (1.0 + (p / period) as f32).ln()).collect()
}
