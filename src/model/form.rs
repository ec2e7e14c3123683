//! What a family says of a model and of each of its layers, before names have their prefix. Tensors, linears and sites
//! follow from it.

use super::attention::AttentionForm;
use super::config::Tying;
use super::layer::{Block, Layer, Mixer, NormForm, Producer};
use super::mlp::MlpForm;
use super::rope::Rope;
use crate::backend::NormKind;
use crate::nvfp4::BLOCK;

/// A norm and the name of its module inside a layer.
pub type NamedNorm = (NormForm, &'static str);

/// What a family says of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockForm {
    /// The norm of its input; none where the mixers read the residual stream itself.
    pub input: Option<NamedNorm>,
    /// What is computed; where there are two, both read the same normed input.
    pub mixers: Vec<MixerForm>,
    /// The norm of its output.
    pub output: Option<NamedNorm>,
    /// What the output is multiplied by.
    pub scale: Option<f32>,
}

/// What a family says of a mixer.
#[derive(Clone, Debug, PartialEq)]
pub enum MixerForm {
    /// Between tokens.
    Attention(AttentionForm),
    /// Inside a token.
    Mlp(MlpForm),
}

/// What a family says of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerForm {
    /// Its steps, in order.
    pub blocks: Vec<BlockForm>,
    /// The vector of one element that its output is multiplied by.
    pub scalar: Option<&'static str>,
}

/// What becomes of a row of the embedding before the first layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EmbeddingForm {
    /// Nothing.
    Plain,
    /// It is multiplied by this number.
    Times(f32),
    /// It is multiplied by this number, rounded to the dtype that is computed in.
    TimesRounded(f32),
    /// It is normed.
    Normed(NormKind),
}

/// What a family says of the way from the last hidden state to logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadForm {
    /// What logits are multiplied by.
    pub multiplier: f32,
    /// Logits become `softcap · tanh(logits / softcap)`.
    pub softcap: Option<f32>,
}

/// Queries at position `p` are multiplied by `1 + beta · ln(1 + floor(p / positions))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// How strongly.
    pub beta: f32,
    /// Positions up to which the factor is one.
    pub positions: usize,
}

/// What a family says of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// Features of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// The layers.
    pub layers: Vec<LayerForm>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<Rope>,
    /// The temperature of queries that layers refer to.
    pub temperature: Option<Temperature>,
    /// What becomes of embedded tokens.
    pub embedding: EmbeddingForm,
    /// The last norm.
    pub norm: NamedNorm,
    /// What becomes of logits.
    pub head: HeadForm,
    /// Whether the embedding also serves as lm_head.
    pub tying: Tying,
    /// What the names of tensors end with that files may hold although they are the same in every model.
    pub constants: &'static [&'static str],
}

impl BlockForm {
    /// A block with a norm before its mixer.
    pub fn new(input: NamedNorm, mixer: MixerForm) -> BlockForm {
        BlockForm { input: Some(input), mixers: vec![mixer], output: None, scale: None }
    }

    fn build(&self, layer: &mut Layer) -> Block {
        let features = [layer.hidden];
        let input = self.input.map(|(form, name)| layer.norm(form, name, &features));
        let producer = || input.map_or(Producer::Fixed, Producer::Norm);
        let mixers: Vec<Mixer> = (self.mixers.iter())
            .map(|mixer| match mixer {
                MixerForm::Attention(form) => layer.add_attention(form, producer()),
                MixerForm::Mlp(form) => layer.add_mlp(form, producer()),
            })
            .collect();
        let output = self.output.map(|(form, name)| layer.norm(form, name, &features));
        Block { input, mixers, output, scale: self.scale }
    }
}

impl LayerForm {
    /// A layer of these blocks.
    pub fn of(blocks: Vec<BlockForm>) -> LayerForm {
        LayerForm { blocks, scalar: None }
    }

    /// Its attention; a layer may have none.
    pub fn attention_mut(&mut self) -> impl Iterator<Item = &mut AttentionForm> {
        self.blocks.iter_mut().flat_map(|block| &mut block.mixers).filter_map(|mixer| match mixer {
            MixerForm::Attention(form) => Some(form),
            MixerForm::Mlp(_) => None,
        })
    }

    /// The layer whose tensors' names begin with `prefix`.
    pub fn build(&self, prefix: String, hidden: usize) -> Layer {
        let mut layer = Layer::empty(prefix, hidden);
        let blocks = self.blocks.iter().map(|block| block.build(&mut layer)).collect();
        layer.blocks = blocks;
        layer.scalar = self.scalar.map(|name| layer.vector(name, &[1]));
        layer
    }

    /// A layer of the same proportions, every size divided by `factor`. Inputs of its linears are whole blocks.
    pub fn shrunk(&self, factor: f64) -> LayerForm {
        let mut small = self.clone();
        for mixer in small.blocks.iter_mut().flat_map(|block| &mut block.mixers) {
            match mixer {
                MixerForm::Attention(form) => {
                    // So many heads are whole blocks together: 16 divided by what it has in common with the size of a
                    // head, which is a power of two.
                    let heads = &mut form.heads;
                    let unit = BLOCK >> heads.dim.trailing_zeros().min(BLOCK.trailing_zeros());
                    heads.kv_heads = share(heads.kv_heads, factor, unit);
                    heads.heads = share(heads.heads, factor, 1).div_ceil(heads.kv_heads) * heads.kv_heads;
                }
                MixerForm::Mlp(form) => form.features = share(form.features, factor, BLOCK),
            }
        }
        small
    }
}

/// A size divided by `factor`, as a multiple of `unit`.
pub fn share(size: usize, factor: f64, unit: usize) -> usize {
    ((size as f64 / factor / unit as f64).round() as usize).max(1) * unit
}
