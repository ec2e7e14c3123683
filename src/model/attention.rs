//! Grouped-query attention as data: what a family says of it, and the linears and sites that follow.

use super::layer::{Layer, Mixer, Producer, Rows, Site};
use crate::backend::{Heads, NormKind};

/// How q, k and v are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// A linear each.
    Apart,
    /// One linear, whose rows are those of q, then k, then v.
    Fused,
    /// Linears for q and k; v is what k's linear gives, before k's norm and rotation.
    KeyIsValue,
}

/// The names of attention's tensors inside a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionNames {
    /// The module that the linears belong to, with a dot behind it.
    pub module: &'static str,
    /// q, k, v and o.
    pub linears: [&'static str; 4],
    /// q, k and v in one.
    pub fused: &'static str,
    /// The gate of the output.
    pub gate: &'static str,
    /// The norms of queries and keys.
    pub norms: [&'static str; 2],
}

impl AttentionNames {
    /// Llama's, and most others'.
    pub const LLAMA: AttentionNames = AttentionNames {
        module: "self_attn.",
        linears: ["q_proj", "k_proj", "v_proj", "o_proj"],
        fused: "qkv_proj",
        gate: "gate_proj",
        norms: ["q_norm", "k_norm"],
    };
}

/// Over which features queries and keys are normed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormScope {
    /// Each head by itself, all heads with the same weights.
    Head,
    /// Each head by itself, with weights of its own.
    EachHead,
    /// All heads together.
    Row,
}

/// The norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorms {
    /// What is computed.
    pub kind: NormKind,
    /// Over which features.
    pub scope: NormScope,
    /// Whether they come behind the rotation.
    pub after_rotation: bool,
}

/// What a family says of a layer's attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionForm {
    /// The names of its tensors.
    pub names: AttentionNames,
    /// Heads and their size.
    pub heads: Heads,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Tokens that attention reaches back, the token itself included.
    pub window: Option<usize>,
    /// Scores become `softcap · tanh(scores / softcap)`.
    pub softcap: Option<f32>,
    /// Which of the model's rotary embeddings applies; none where positions are not encoded.
    pub rope: Option<usize>,
    /// How q, k and v are stored.
    pub projections: Projections,
    /// Whether q, k and v have a bias.
    pub input_bias: bool,
    /// Whether o has one.
    pub output_bias: bool,
    /// The norms of queries and keys.
    pub head_norms: Option<HeadNorms>,
    /// The norm of values, which has no weight.
    pub value_norm: Option<NormKind>,
    /// What queries are multiplied by before they are rotated.
    pub query_scale: Option<f32>,
    /// Whether queries are multiplied by the model's temperature for their position.
    pub has_temperature: bool,
    /// Whether a linear of the same input gates the output, through a sigmoid.
    pub gated: bool,
    /// Whether each head has a logit that takes part in the softmax and has no value.
    pub sinks: bool,
}

/// A layer's attention: what the family says of it, and the numbers of its tensors and sites in the layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// What the family says.
    pub form: AttentionForm,
    /// q, k and v as far as they are linears of their own, or the one that holds all of them.
    pub inputs: Vec<usize>,
    /// The gate of the output.
    pub gate: Option<usize>,
    /// o.
    pub output: usize,
    /// The norms of queries and keys.
    pub head_norms: Option<[usize; 2]>,
    /// The logits without a value.
    pub sinks: Option<usize>,
    /// The site of q, k and v.
    pub input_site: usize,
    /// The site of o.
    pub output_site: usize,
}

impl AttentionForm {
    /// Llama's.
    pub fn llama(heads: Heads) -> AttentionForm {
        AttentionForm {
            names: AttentionNames::LLAMA,
            heads,
            scale: (heads.dim as f32).powf(-0.5),
            window: None,
            softcap: None,
            rope: Some(0),
            projections: Projections::Apart,
            input_bias: false,
            output_bias: false,
            head_norms: None,
            value_norm: None,
            query_scale: None,
            has_temperature: false,
            gated: false,
            sinks: false,
        }
    }

    /// Features of all query heads.
    pub fn queries(&self) -> usize {
        self.heads.heads * self.heads.dim
    }

    /// Features of all key heads, which are as many as those of all value heads.
    pub fn keys(&self) -> usize {
        self.heads.kv_heads * self.heads.dim
    }

    /// Names and rows of the linears that read the input.
    fn input_linears(&self) -> Vec<(&'static str, usize)> {
        let (q, kv, [q_name, k_name, v_name, _]) = (self.queries(), self.keys(), self.names.linears);
        let mut linears = match self.projections {
            Projections::Apart => vec![(q_name, q), (k_name, kv), (v_name, kv)],
            Projections::Fused => vec![(self.names.fused, q + 2 * kv)],
            Projections::KeyIsValue => vec![(q_name, q), (k_name, kv)],
        };
        linears.extend(self.gated.then_some((self.names.gate, q)));
        linears
    }
}

impl Layer {
    /// Adds attention whose input the site `shared` has already, or a site of its own that `producer` gives.
    pub(super) fn add_attention(&mut self, form: &AttentionForm, producer: Producer) -> Mixer {
        let (hidden, names) = (self.hidden, form.names);
        let name = |part: &str| format!("{}{part}", names.module);
        let members: Vec<usize> = (form.input_linears().into_iter())
            .map(|(part, rows)| self.linear(&name(part), rows, hidden, form.input_bias && part != names.gate))
            .collect();
        let (gate, inputs) = match form.gated {
            true => (members.last().copied(), members[..members.len() - 1].to_vec()),
            false => (None, members.clone()),
        };
        let mut fused = vec![(0..inputs.len()).collect()];
        fused.extend(gate.map(|_| vec![inputs.len()]));
        let input_site = self.site("qkv", hidden, members, fused, producer);
        let head_norms = form.head_norms.map(|norms| {
            let features = |heads: usize| match norms.scope {
                NormScope::Head => vec![form.heads.dim],
                NormScope::EachHead => vec![heads, form.heads.dim],
                NormScope::Row => vec![heads * form.heads.dim],
            };
            let [q, k] = names.norms.map(name);
            [
                self.norm(norms.kind.into(), &q, &features(form.heads.heads)),
                self.norm(norms.kind.into(), &k, &features(form.heads.kv_heads)),
            ]
        });
        let sinks = form.sinks.then(|| self.vector(&name("sinks"), &[form.heads.heads]));
        let output = self.linear(&name(names.linears[3]), hidden, form.queries(), form.output_bias);
        let values = match form.projections {
            _ if form.value_norm.is_some() => Producer::Fixed,
            Projections::KeyIsValue => Producer::Fixed,
            Projections::Apart => Producer::Rows(form.value_rows(inputs[2], 0)),
            Projections::Fused => Producer::Rows(form.value_rows(inputs[0], form.queries() + form.keys())),
        };
        let output_site = self.site("o", form.queries(), vec![output], vec![vec![0]], values);
        let form = form.clone();
        Mixer::Attention(Attention { form, inputs, gate, output, head_norms, sinks, input_site, output_site })
    }
}

impl AttentionForm {
    /// The rows of a linear that are values, as the output reads them.
    fn value_rows(&self, linear: usize, first: usize) -> Rows {
        let Heads { heads, kv_heads, dim } = self.heads;
        Rows { linear, first, count: self.keys(), repeats: heads / kv_heads, width: dim, squared: false }
    }
}

impl Layer {
    /// Adds a site; returns its number. Two mixers that read the output of one norm share its site.
    pub(super) fn site(
        &mut self,
        name: &'static str,
        features: usize,
        members: Vec<usize>,
        fused: Vec<Vec<usize>>,
        producer: Producer,
    ) -> usize {
        let norm = |site: &Site| matches!(site.producer, Producer::Norm(_)) && site.producer == producer;
        if let Some(shared) = self.sites.iter().position(norm) {
            let before = self.sites[shared].members.len();
            self.sites[shared].members.extend(members);
            let moved = fused.into_iter().map(|part| part.into_iter().map(|i| before + i).collect());
            self.sites[shared].fused.extend(moved);
            return shared;
        }
        self.sites.push(Site { name, features, members, fused, producer });
        self.sites.len() - 1
    }
}
