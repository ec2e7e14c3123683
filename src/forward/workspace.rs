//! Buffers that a layer writes its intermediate results into; reused by every layer and micro-batch. Layers of one
//! model may differ in the sizes of their heads, so there is a set of buffers for each size that occurs.

use crate::backend::Backend;
use crate::error::Result;
use crate::model::{AttentionForm, Mixer, MlpForm, MlpShape, Model, Projections};

/// Buffers of attention.
pub(super) struct AttentionBuffers<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub attended: T,
    /// q, k and v where one linear gives all of them.
    pub fused: Option<T>,
    pub gate: Option<T>,
}

/// Buffers of an MLP.
pub(super) struct MlpBuffers<T> {
    /// gate, or what the only linear gives.
    pub gate: T,
    pub up: Option<T>,
    /// gate and up where one linear gives both.
    pub fused: Option<T>,
}

/// The features of attention's buffers: q, k, all of q, k and v, the gate.
#[derive(Clone, Copy, PartialEq)]
struct AttentionSizes {
    q: usize,
    k: usize,
    fused: Option<usize>,
    gate: Option<usize>,
}

/// The features of an MLP's buffers.
#[derive(Clone, Copy, PartialEq)]
struct MlpSizes {
    inner: usize,
    shape: MlpShape,
}

/// Buffers for micro-batches of up to a number of tokens.
pub struct Workspace<T> {
    pub(super) normed: T,
    pub(super) branch: T,
    attention: Vec<(AttentionSizes, AttentionBuffers<T>)>,
    mlp: Vec<(MlpSizes, MlpBuffers<T>)>,
}

impl AttentionSizes {
    fn of(form: &AttentionForm) -> AttentionSizes {
        let (q, k) = (form.queries(), form.keys());
        let fused = (form.projections == Projections::Fused).then_some(q + 2 * k);
        AttentionSizes { q, k, fused, gate: form.gated.then_some(q) }
    }

    fn features(&self) -> usize {
        2 * self.q + 2 * self.k + self.fused.unwrap_or(0) + self.gate.unwrap_or(0)
    }
}

impl MlpSizes {
    fn of(form: &MlpForm) -> MlpSizes {
        MlpSizes { inner: form.features, shape: form.shape }
    }

    fn features(&self) -> usize {
        self.inner
            * match self.shape {
                MlpShape::Gated => 2,
                MlpShape::Fused => 4,
                MlpShape::Plain => 1,
            }
    }
}

/// The sizes that occur in a model, each once.
fn sizes(model: &Model) -> (Vec<AttentionSizes>, Vec<MlpSizes>) {
    let (mut attention, mut mlps) = (vec![], vec![]);
    for mixer in model.layers.iter().flat_map(|layer| &layer.blocks).flat_map(|block| &block.mixers) {
        match mixer {
            Mixer::Attention(of) => add(&mut attention, AttentionSizes::of(&of.form)),
            Mixer::Mlp(of) => add(&mut mlps, MlpSizes::of(&of.form)),
        }
    }
    (attention, mlps)
}

fn add<S: PartialEq>(all: &mut Vec<S>, one: S) {
    if !all.contains(&one) {
        all.push(one);
    }
}

/// Features of all buffers together, for one token.
pub fn features(model: &Model) -> usize {
    let (attention, mlps) = sizes(model);
    let attention: usize = attention.iter().map(AttentionSizes::features).sum();
    2 * model.hidden + attention + mlps.iter().map(MlpSizes::features).sum::<usize>()
}

impl<T> Workspace<T> {
    pub(super) fn new<B: Backend<Tensor = T>>(
        backend: &B,
        model: &Model,
        tokens: usize,
    ) -> Result<Workspace<T>> {
        let activation = |cols: usize| backend.activation(tokens, cols);
        let maybe = |cols: Option<usize>| cols.map(activation).transpose();
        let (attention, mlps) = sizes(model);
        let attention = attention.into_iter().map(|sizes| {
            let buffers = AttentionBuffers {
                q: activation(sizes.q)?,
                k: activation(sizes.k)?,
                v: activation(sizes.k)?,
                attended: activation(sizes.q)?,
                fused: maybe(sizes.fused)?,
                gate: maybe(sizes.gate)?,
            };
            Ok((sizes, buffers))
        });
        let mlp = mlps.into_iter().map(|sizes| {
            let MlpSizes { inner, shape } = sizes;
            let buffers = MlpBuffers {
                gate: activation(inner)?,
                up: maybe((shape != MlpShape::Plain).then_some(inner))?,
                fused: maybe((shape == MlpShape::Fused).then_some(2 * inner))?,
            };
            Ok((sizes, buffers))
        });
        Ok(Workspace {
            normed: activation(model.hidden)?,
            attention: attention.collect::<Result<_>>()?,
            mlp: mlp.collect::<Result<_>>()?,
            branch: activation(model.hidden)?,
        })
    }

    /// The normed input, attention's own buffers, and the output.
    pub(super) fn attention(&mut self, form: &AttentionForm) -> (&mut T, &mut AttentionBuffers<T>, &mut T) {
        let sizes = AttentionSizes::of(form);
        let found = self.attention.iter_mut().find(|(known, _)| *known == sizes);
        let (_, buffers) = found.expect("there are buffers for every layer of the model");
        (&mut self.normed, buffers, &mut self.branch)
    }

    /// The normed input, the MLP's own buffers, and the output.
    pub(super) fn mlp(&mut self, form: &MlpForm) -> (&mut T, &mut MlpBuffers<T>, &mut T) {
        let sizes = MlpSizes::of(form);
        let found = self.mlp.iter_mut().find(|(known, _)| *known == sizes);
        let (_, buffers) = found.expect("there are buffers for every layer of the model");
        (&mut self.normed, buffers, &mut self.branch)
    }

    pub(super) fn set_rows<B: Backend<Tensor = T>>(&mut self, backend: &B, rows: usize) {
        let Workspace { normed, branch, attention, mlp } = self;
        let attention = attention.iter_mut().flat_map(|(_, of)| {
            let AttentionBuffers { q, k, v, attended, fused, gate } = of;
            [q, k, v, attended].into_iter().chain(fused).chain(gate)
        });
        let mlp = mlp.iter_mut().flat_map(|(_, of)| {
            let MlpBuffers { gate, up, fused } = of;
            [gate].into_iter().chain(up).chain(fused)
        });
        [normed, branch].into_iter().chain(attention).chain(mlp).for_each(|x| backend.set_rows(x, rows));
    }
}
