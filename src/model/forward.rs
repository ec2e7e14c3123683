//! The decoder layer's forward pass, written once over backend operations.

use super::config::ModelConfig;
use super::rope::RopeTable;
use super::tensors::Site;
use crate::backend::{Activation, AttentionShape, Backend, Heads, NormKind, Rotation};
use crate::checkpoint::SourceTensor;
use crate::error::Result;

/// A linear's weight `[rows, cols]` and bias `[rows]` on a backend.
pub struct Linear<T> {
    /// The weight.
    pub weight: T,
    /// The bias, where the model has one.
    pub bias: Option<T>,
}

/// One decoder layer's tensors on a backend.
pub struct LayerWeights<T> {
    norms: [T; 2],
    /// By site, in the order of [`Site::ALL`], and by member of the fused group.
    pub linears: [Vec<Linear<T>>; 4],
}

impl<T> LayerWeights<T> {
    /// Loads layer `layer`, taking each tensor by name from `source`.
    pub fn load<B: Backend<Tensor = T>>(
        backend: &B,
        config: &ModelConfig,
        layer: usize,
        source: &dyn Fn(&str) -> Result<SourceTensor>,
    ) -> Result<LayerWeights<T>> {
        let load = |name: &str| backend.load(&source(name)?);
        let [before_attention, before_mlp] = config.layer_norms(layer);
        let norms = [load(&before_attention.name)?, load(&before_mlp.name)?];
        let mut linears = [vec![], vec![], vec![], vec![]];
        for group in config.groups(layer) {
            for member in &group.members {
                let bias = member.bias().map(|name| load(&name)).transpose()?;
                linears[group.site as usize].push(Linear { weight: load(&member.weight())?, bias });
            }
        }
        Ok(LayerWeights { norms, linears })
    }
}

/// The documents of one micro-batch, as operations need them.
pub struct Batch<B: Backend> {
    /// Tokens of all documents.
    pub tokens: usize,
    bounds: B::Index,
    rope_rows: B::Index,
}

/// Buffers that a layer writes its intermediate results into; reused by every layer and micro-batch.
pub struct Workspace<T> {
    normed: T,
    q: T,
    k: T,
    v: T,
    attended: T,
    gate: T,
    up: T,
    branch: T,
}

/// What the layers of one model share: the backend, the sizes, the rotary table.
pub struct Decoder<'a, B: Backend> {
    backend: &'a B,
    config: &'a ModelConfig,
    cos: B::Tensor,
    sin: B::Tensor,
}

/// Called with each site's input before it meets the weights; may change it.
pub type Observe<'a, T> = &'a mut dyn FnMut(Site, &mut T) -> Result<()>;

impl<'a, B: Backend> Decoder<'a, B> {
    /// Puts the rotary table where the backend computes.
    pub fn new(backend: &'a B, config: &'a ModelConfig, table: &RopeTable) -> Result<Self> {
        let cos = backend.constant(&table.cos, table.cols)?;
        let sin = backend.constant(&table.sin, table.cols)?;
        Ok(Decoder { backend, config, cos, sin })
    }

    /// Describes the documents `first..first + lengths.len()` of `table` as one micro-batch.
    pub fn batch(&self, table: &RopeTable, first: usize, lengths: &[usize]) -> Result<Batch<B>> {
        let mut bounds = vec![0];
        let mut rope_rows = Vec::new();
        for (i, &length) in lengths.iter().enumerate() {
            rope_rows.extend(table.rows(first + i, length));
            bounds.push(rope_rows.len() as u32);
        }
        Ok(Batch {
            tokens: rope_rows.len(),
            bounds: self.backend.index(&bounds)?,
            rope_rows: self.backend.index(&rope_rows)?,
        })
    }

    /// Buffers for micro-batches of at most `tokens` tokens.
    pub fn workspace(&self, tokens: usize) -> Result<Workspace<B::Tensor>> {
        let c = self.config;
        let activation = |cols| self.backend.activation(tokens, cols);
        Ok(Workspace {
            normed: activation(c.hidden)?,
            q: activation(c.heads * c.head_dim)?,
            k: activation(c.kv_heads * c.head_dim)?,
            v: activation(c.kv_heads * c.head_dim)?,
            attended: activation(c.heads * c.head_dim)?,
            gate: activation(c.intermediate)?,
            up: activation(c.intermediate)?,
            branch: activation(c.hidden)?,
        })
    }

    /// Runs one layer over one micro-batch: `x` `[tokens, hidden]` becomes the next hidden state.
    pub fn layer(
        &self,
        weights: &LayerWeights<B::Tensor>,
        batch: &Batch<B>,
        work: &mut Workspace<B::Tensor>,
        x: &mut B::Tensor,
        observe: Observe<'_, B::Tensor>,
    ) -> Result<()> {
        let (b, c) = (self.backend, self.config);
        work.set_rows(b, batch.tokens);
        let (norm, rotation) = (NormKind::llama(c.norm_eps), Rotation::llama(c.head_dim));
        let [qkv, o, gate_up, down] = &weights.linears;
        let linear = |x: &B::Tensor, l: &Linear<B::Tensor>, out: &mut B::Tensor| {
            b.linear(x, &l.weight, l.bias.as_ref(), out)
        };

        b.norm(x, &norm, Some(&weights.norms[0]), None, &mut work.normed)?;
        observe(Site::Qkv, &mut work.normed)?;
        linear(&work.normed, &qkv[0], &mut work.q)?;
        linear(&work.normed, &qkv[1], &mut work.k)?;
        linear(&work.normed, &qkv[2], &mut work.v)?;
        b.rope(&mut work.q, &rotation, &self.cos, &self.sin, &batch.rope_rows)?;
        b.rope(&mut work.k, &rotation, &self.cos, &self.sin, &batch.rope_rows)?;
        let attention = AttentionShape {
            heads: Heads { heads: c.heads, kv_heads: c.kv_heads, dim: c.head_dim },
            scale: (c.head_dim as f32).powf(-0.5),
            window: c.sliding_window,
            softcap: None,
        };
        b.attention(&work.q, &work.k, &work.v, &batch.bounds, &attention, None, &mut work.attended)?;
        observe(Site::O, &mut work.attended)?;
        linear(&work.attended, &o[0], &mut work.branch)?;
        b.add(x, &work.branch)?;

        b.norm(x, &norm, Some(&weights.norms[1]), None, &mut work.normed)?;
        observe(Site::GateUp, &mut work.normed)?;
        linear(&work.normed, &gate_up[0], &mut work.gate)?;
        linear(&work.normed, &gate_up[1], &mut work.up)?;
        b.activate_mul(&mut work.gate, &work.up, Activation::Silu)?;
        observe(Site::Down, &mut work.gate)?;
        linear(&work.gate, &down[0], &mut work.branch)?;
        b.add(x, &work.branch)
    }
}

impl<T> Workspace<T> {
    fn set_rows<B: Backend<Tensor = T>>(&mut self, backend: &B, rows: usize) {
        for buffer in [
            &mut self.normed,
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.attended,
            &mut self.gate,
            &mut self.up,
            &mut self.branch,
        ] {
            backend.set_rows(buffer, rows);
        }
    }
}
