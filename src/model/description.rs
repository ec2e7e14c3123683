//! A whole model as data: what config.json and the tensors' names say of it.

use serde_json::{Map, Value};

use super::config::{Config, Tying};
use super::form::{EmbeddingForm, Form, HeadForm, LayerForm, Temperature, share};
use super::layer::{Layer, LinearSpec, Norm, TensorSpec};
use super::rope::Rope;
use crate::error::Result;
use crate::nvfp4::BLOCK;

/// A decoder-only model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// The class that config.json names.
    pub architecture: String,
    /// Features of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// The decoder layers.
    pub layers: Vec<Layer>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<Rope>,
    /// The temperature of queries.
    pub temperature: Option<Temperature>,
    /// The token embedding `[vocab, hidden]`, which the first stage owns.
    pub embedding: TensorSpec,
    /// What becomes of embedded tokens.
    pub embedded: EmbeddingForm,
    /// The norm behind the last layer.
    pub norm: Norm,
    /// The module that turns hidden states into logits; its tensor is the embedding's where the model is tied.
    pub head: String,
    /// What becomes of logits.
    pub logits: HeadForm,
    /// Whether the embedding also serves as lm_head.
    pub tied: bool,
    /// What the names of the decoder's tensors begin with.
    pub prefix: String,
    /// Whether other modules stand beside the decoder, such as a vision tower.
    pub is_wrapped: bool,
    /// What the names of tensors end with that files may hold although they are the same in every model.
    constants: &'static [&'static str],
    /// What the family says of each layer.
    forms: Vec<LayerForm>,
}

/// What the names of a wrapped decoder's tensors may begin with, and the name of its head, newest first.
const PREFIXES: [(&str, &str); 4] = [
    ("model.language_model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.", "lm_head"),
    ("model.language_model.model.", "lm_head"),
];

/// The same of a decoder that stands alone.
const PLAIN: (&str, &str) = ("model.", "lm_head");

impl Model {
    /// Reads the fields of config.json. `has` says whether the checkpoint has a tensor of a name.
    ///
    /// # Errors
    /// Exit code 3: an unsupported architecture (named, with the supported ones), a missing or malformed field, sizes
    /// that contradict each other, a field that asks for what distq does not compute.
    pub fn parse(config: &Map<String, Value>, has: &dyn Fn(&str) -> bool) -> Result<Model> {
        let config = Config::read(config)?;
        let form = (config.family.form)(&config)?;
        let embedding = |prefix: &str| format!("{prefix}embed_tokens.weight");
        let (prefix, head) = match config.wrapper {
            None => PLAIN,
            Some(_) => {
                let stored = |(prefix, _): &&(&str, &str)| has(&embedding(prefix));
                *PREFIXES.iter().find(stored).unwrap_or(&PREFIXES[0])
            }
        };
        let tied = match form.tying {
            Tying::Tied => true,
            Tying::UnlessStored => !has(&format!("{head}.weight")),
            Tying::Apart => false,
        };
        let is_wrapped = config.wrapper.is_some();
        Ok(Model { tied, is_wrapped, ..Model::new(form, config.architecture, (prefix, head)) })
    }

    fn new(form: Form, architecture: String, (prefix, head): (&str, &str)) -> Model {
        let Form { hidden, vocab, layers: forms, .. } = form;
        let build = |(i, layer): (usize, &LayerForm)| layer.build(format!("{prefix}layers.{i}."), hidden);
        Model {
            architecture,
            hidden,
            vocab,
            layers: forms.iter().enumerate().map(build).collect(),
            ropes: form.ropes,
            temperature: form.temperature,
            embedding: TensorSpec {
                name: format!("{prefix}embed_tokens.weight"),
                shape: vec![vocab, hidden],
            },
            embedded: form.embedding,
            norm: Norm::new(form.norm.0, &format!("{prefix}{}", form.norm.1), &[hidden]),
            head: head.to_string(),
            logits: form.head,
            tied: false,
            prefix: prefix.to_string(),
            is_wrapped: false,
            constants: form.constants,
            forms,
        }
    }

    /// lm_head's tensor `[vocab, hidden]`, where the model has one of its own.
    pub fn own_head(&self) -> Option<TensorSpec> {
        let spec = || TensorSpec { name: self.head_weight(), shape: vec![self.vocab, self.hidden] };
        (!self.tied).then(spec)
    }

    /// The name of lm_head's tensor, whether there is one or not.
    pub fn head_weight(&self) -> String {
        format!("{}.weight", self.head)
    }

    /// The module of the embedding.
    pub fn embedding_module(&self) -> String {
        format!("{}embed_tokens", self.prefix)
    }

    /// What the last stage owns of the decoder: the final norm, and lm_head where it is not tied.
    pub fn tail_tensors(&self) -> Vec<TensorSpec> {
        self.norm.tensors().cloned().chain(self.own_head()).collect()
    }

    /// Every tensor of the decoder, in the order of the forward pass.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> {
        let layers = self.layers.iter().flat_map(Layer::tensors);
        std::iter::once(self.embedding.clone()).chain(layers).chain(self.tail_tensors())
    }

    /// Every linear of the layers.
    pub fn linears(&self) -> impl Iterator<Item = &LinearSpec> {
        self.layers.iter().flat_map(|layer| &layer.linears)
    }

    /// The windows of the layers' attention, each once; none where a token sees all before it.
    pub fn windows(&self) -> Vec<Option<usize>> {
        let of_layers = self.layers.iter().flat_map(Layer::attention).map(|attention| attention.form.window);
        of_layers.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    }

    /// Whether a tensor is carried over that no description of the decoder has: it stands beside the decoder, in a
    /// module of the class around it, or it is a constant.
    pub fn is_carried(&self, name: &str) -> bool {
        let beside = self.is_wrapped && !name.starts_with(&self.prefix) && name != self.head_weight();
        beside || self.constants.iter().any(|end| name.ends_with(end))
    }

    /// The decoder layer whose tensor has this name.
    pub fn layer_of(&self, name: &str) -> Option<usize> {
        let inside = name.strip_prefix(&self.prefix)?.strip_prefix("layers.")?;
        inside.split_once('.')?.0.parse().ok()
    }

    /// The layer with the most weights.
    pub fn largest_layer(&self) -> usize {
        // Of equal ones the first.
        let weights = |&i: &usize| (self.layers[i].weights(), std::cmp::Reverse(i));
        (0..self.layers.len()).max_by_key(weights).unwrap_or(0)
    }

    /// A model of one layer, of the proportions of the largest, that has about `most` weights, or that layer where it
    /// has fewer. Inputs of all its linears are whole blocks, also where those of the model are not, which `--ignore`
    /// allows.
    pub fn shrunk(&self, most: usize) -> Model {
        let number = self.largest_layer();
        let layer = &self.layers[number];
        let factor = (layer.weights() as f64 / most as f64).sqrt().max(1.0);
        let whole = layer.sites.iter().all(|site| site.features.is_multiple_of(BLOCK));
        let mut small = Model { layers: vec![layer.clone()], forms: vec![], ..self.clone() };
        if factor > 1.0 || !whole {
            let form = self.forms[number].shrunk(factor);
            small.hidden = share(self.hidden, factor, BLOCK);
            small.layers = vec![form.build(layer.prefix.clone(), small.hidden)];
        }
        small
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn model(hidden: usize, intermediate: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Model {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "num_hidden_layers": 3, "vocab_size": 128,
        });
        Model::parse(config.as_object().unwrap(), &|_| false).unwrap()
    }

    fn rows(model: &Model) -> Vec<[usize; 2]> {
        model.layers[0].linears.iter().map(|linear| [linear.rows, linear.cols]).collect()
    }

    #[test]
    fn a_shrunk_model_keeps_its_proportions() {
        let large = model(12288, 28672, 96, 8, 128);
        let weights = large.layers[0].weights();
        let small = large.shrunk(weights / 64);
        assert_eq!(rows(&small), rows(&model(1536, 3584, 12, 1, 128)));
        assert_eq!(small.hidden, 1536);
        assert_eq!(large.shrunk(usize::MAX).layers[0], large.layers[0]);
    }

    proptest! {
        #[test]
        fn a_made_up_layer_has_whole_blocks_and_whole_groups_of_heads_for_every_model(
            kv_heads in 1usize..=40, queries in 1usize..=16, half in 1usize..=128,
            hidden in 1usize..=2000, intermediate in 1usize..=4000, shift in 0u32..40,
        ) {
            let large = model(hidden, intermediate, kv_heads * queries, kv_heads, 2 * half);
            let small = large.shrunk(1 << shift);
            let heads = small.layers[0].attention().next().unwrap().form.heads;
            prop_assert!(heads.heads.is_multiple_of(heads.kv_heads));
            prop_assert_eq!(heads.dim, 2 * half);
            for site in &small.layers[0].sites {
                prop_assert!(site.features > 0);
                prop_assert!(site.features.is_multiple_of(BLOCK), "{site:?}: {small:?}");
            }
            // What shares can be rounded up to: a block, and heads that are whole blocks.
            let least = model(16, 16, 8, 8, 2 * half).layers[0].weights();
            let most = 8 * (large.layers[0].weights().min(1 << shift) + least);
            prop_assert!(small.layers[0].weights() <= most, "{small:?}");
        }
    }
}
