//! The sizes that every decoder has, with a family's defaults for fields that config.json does not have.

use super::fields::Fields;
use super::{Config, Tying};
use crate::backend::{Heads, NormKind};
use crate::error::{Error, Result};
use crate::model::attention::AttentionForm;
use crate::model::form::{BlockForm, EmbeddingForm, Form, HeadForm, LayerForm, MixerForm};
use crate::model::layer::NormForm;
use crate::model::mlp::MlpForm;
use crate::model::rope::{Rope, RopeOptions};

/// Key and value heads where config.json has no such field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvHeads {
    /// As many as query heads.
    AsHeads,
    /// So many.
    Count(usize),
}

/// What a family's fields are where config.json does not have them; none for those that it must have.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    /// `num_hidden_layers`.
    pub layers: Option<usize>,
    /// `hidden_size`.
    pub hidden: Option<usize>,
    /// `intermediate_size`.
    pub intermediate: Option<usize>,
    /// `num_attention_heads`.
    pub heads: Option<usize>,
    /// `num_key_value_heads`.
    pub kv_heads: KvHeads,
    /// `head_dim`; none where it is the hidden size divided by the heads.
    pub head_dim: Option<usize>,
    /// `vocab_size`.
    pub vocab: Option<usize>,
    /// The name of the field of the norms' epsilon.
    pub eps_field: &'static str,
    /// The norms' epsilon.
    pub eps: f64,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// `rope_theta`.
    pub theta: f64,
    /// `tie_word_embeddings`.
    pub tied: bool,
}

impl Defaults {
    /// What most families have in common.
    pub const LLAMA: Defaults = Defaults {
        layers: None,
        hidden: None,
        intermediate: None,
        heads: None,
        kv_heads: KvHeads::AsHeads,
        head_dim: None,
        vocab: None,
        eps_field: "rms_norm_eps",
        eps: 1e-6,
        max_positions: 2048,
        theta: 10_000.0,
        tied: false,
    };
}

/// The sizes that every decoder has.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes {
    /// Decoder layers.
    pub layers: usize,
    /// Features of the residual stream.
    pub hidden: usize,
    /// Features inside the MLP.
    pub intermediate: usize,
    /// Heads and their size.
    pub heads: Heads,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Added to the mean square before the root in every norm.
    pub eps: f32,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// The base of rotary frequencies where config.json has none.
    pub theta: f64,
    /// Whether the embedding also serves as lm_head.
    pub tying: Tying,
}

/// Decoder layers that a model may have: eight times as many as the deepest has, and few enough to plan for.
const MOST_LAYERS: usize = 1024;
/// Parameters that it may have: a hundred times as many as the largest has. Sums over them fit in 64 bits.
const MOST_PARAMETERS: u128 = 100_000_000_000_000;

impl Sizes {
    /// A model of these sizes with such layers and rotary embeddings, plain ends, and Llama's norm behind the layers.
    pub fn model(&self, ropes: Vec<Rope>, layer: impl FnMut(usize) -> Result<LayerForm>) -> Result<Form> {
        Ok(Form {
            hidden: self.hidden,
            vocab: self.vocab,
            layers: (0..self.layers).map(layer).collect::<Result<_>>()?,
            ropes,
            temperature: None,
            embedding: EmbeddingForm::Plain,
            norm: (self.norm(), "norm"),
            head: HeadForm { multiplier: 1.0, softcap: None },
            tying: self.tying,
            constants: &[],
        })
    }

    /// Llama's attention.
    pub fn attention(&self) -> AttentionForm {
        AttentionForm::llama(self.heads)
    }

    /// Llama's MLP.
    pub fn mlp(&self) -> MlpForm {
        MlpForm::llama(self.intermediate)
    }

    /// Llama's norm.
    pub fn norm(&self) -> NormForm {
        NormKind::llama(self.eps).into()
    }

    /// Llama's rotary embedding, as config.json gives it.
    pub fn rope(&self) -> RopeOptions {
        RopeOptions::llama(self.theta, self.heads.dim)
    }

    /// Llama's layer with this attention and this MLP.
    pub fn llama_layer(&self, attention: AttentionForm, mlp: MlpForm) -> LayerForm {
        let norm = self.norm();
        LayerForm::of(vec![
            BlockForm::new((norm, "input_layernorm"), MixerForm::Attention(attention)),
            BlockForm::new((norm, "post_attention_layernorm"), MixerForm::Mlp(mlp)),
        ])
    }

    /// A model of Llama's layers, each of which `change` may make another: it is given the layer's number, its
    /// attention and its MLP.
    pub fn llama(
        &self,
        config: &Config<'_>,
        mut change: impl FnMut(usize, &mut AttentionForm, &mut MlpForm),
    ) -> Result<Form> {
        let ropes = vec![Rope::read(config, self, &self.rope())?];
        self.model(ropes, |layer| {
            let (mut attention, mut mlp) = (self.attention(), self.mlp());
            change(layer, &mut attention, &mut mlp);
            Ok(self.llama_layer(attention, mlp))
        })
    }

    /// Everything that is made from these sizes can be counted, in numbers and in memory, and heads are whole.
    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        if self.layers > MOST_LAYERS {
            let what = format!(
                "config.json: num_hidden_layers is {}, more than the {MOST_LAYERS} that distq reads",
                self.layers
            );
            return Err(Error::input(what).fix("correct config.json"));
        }
        let Heads { heads, kv_heads, dim } = self.heads;
        let n = |size: usize| size as u128;
        let product = |factors: &[usize]| {
            factors
                .iter()
                .try_fold(1u128, |product, &factor| product.checked_mul(n(factor)))
                .unwrap_or(u128::MAX)
        };
        let parts = [
            product(&[self.vocab, self.hidden, 2]),
            product(&[self.layers, heads, dim, self.hidden, 2]),
            product(&[self.layers, kv_heads, dim, self.hidden, 2]),
            product(&[self.layers, self.intermediate, self.hidden, 3]),
        ];
        let parameters = parts.into_iter().fold(0, u128::saturating_add);
        if parameters > MOST_PARAMETERS {
            let sizes = format!(
                "vocab_size {}, hidden_size {}, intermediate_size {}, num_hidden_layers {}, num_attention_heads \
                 {heads}, num_key_value_heads {kv_heads}, head_dim {dim}",
                self.vocab, self.hidden, self.intermediate, self.layers,
            );
            let what = format!(
                "config.json describes a model of more than {} trillion parameters: {sizes}",
                MOST_PARAMETERS / 1_000_000_000_000
            );
            return Err(Error::input(what).fix("correct the size that is too large"));
        }
        if !heads.is_multiple_of(kv_heads) {
            let what = format!("is {heads}, not a multiple of num_key_value_heads {kv_heads}");
            return Err(fields.wrong("num_attention_heads", what));
        }
        if dim % 2 != 0 {
            return Err(fields.wrong("head_dim", format!("is {dim}; rotary embedding needs an even number")));
        }
        Ok(())
    }
}

impl Config<'_> {
    /// The sizes that every decoder has.
    ///
    /// # Errors
    /// Exit code 3: a missing or malformed field, sizes that contradict each other.
    pub fn sizes(&self, defaults: &Defaults) -> Result<Sizes> {
        let fields = &self.text;
        let count = |name: &str, default: Option<usize>| match fields.optional_count(name)?.or(default) {
            Some(count) => Ok(count),
            None => Err(fields.wrong(name, "is missing".into())),
        };
        let heads = count("num_attention_heads", defaults.heads)?;
        let hidden = count("hidden_size", defaults.hidden)?;
        let dim = match (fields.count_or("head_dim", defaults.head_dim)?, hidden % heads) {
            (Some(dim), _) => dim,
            (None, 0) => hidden / heads,
            _ => {
                let what = format!(
                    "is {hidden}, not a multiple of num_attention_heads {heads}, and head_dim is absent"
                );
                return Err(fields.wrong("hidden_size", what));
            }
        };
        let kv_default = match defaults.kv_heads {
            KvHeads::AsHeads => heads,
            KvHeads::Count(count) => count,
        };
        let kv_heads = fields.count_or("num_key_value_heads", Some(kv_default))?.unwrap_or(heads);
        let sizes = Sizes {
            layers: count("num_hidden_layers", defaults.layers)?,
            hidden,
            intermediate: count("intermediate_size", defaults.intermediate)?,
            heads: Heads { heads, kv_heads, dim },
            vocab: count("vocab_size", defaults.vocab)?,
            eps: fields.number(defaults.eps_field)?.unwrap_or(defaults.eps) as f32,
            max_positions: fields
                .optional_count("max_position_embeddings")?
                .unwrap_or(defaults.max_positions),
            theta: defaults.theta,
            tying: self.tying(defaults.tied)?,
        };
        sizes.check(fields)?;
        Ok(sizes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::Model;

    fn attention(model: &Model) -> &AttentionForm {
        &model.layers[0].attention().next().unwrap().form
    }

    fn parse(change: Value) -> Result<Model> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true
        });
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        Model::parse(config.as_object().unwrap(), &|_| false)
    }

    #[test]
    fn head_dim_defaults_to_an_even_share_of_the_hidden_size() {
        assert_eq!(attention(&parse(json!({})).unwrap()).heads.dim, 16);
        assert_eq!(attention(&parse(json!({"head_dim": 32})).unwrap()).heads.dim, 32);
        assert_eq!(attention(&parse(json!({"head_dim": null})).unwrap()).heads.dim, 16);
    }

    #[test]
    fn mistral_slides_by_default_and_not_when_told_so() {
        let mistral = |window: Value| {
            let config = json!({"architectures": ["MistralForCausalLM"], "sliding_window": window});
            attention(&parse(config).unwrap()).window
        };
        assert_eq!(mistral(json!(128)), Some(128));
        assert_eq!(mistral(Value::Null), None);
        let absent = parse(json!({"architectures": ["MistralForCausalLM"]})).unwrap();
        assert_eq!(attention(&absent).window, Some(4096));
        assert_eq!(attention(&parse(json!({"sliding_window": 128})).unwrap()).window, None);
    }

    #[test]
    fn an_unsupported_architecture_is_named_with_the_supported_ones() {
        let error = parse(json!({"architectures": ["GPT2LMHeadModel"]})).unwrap_err().to_string();
        assert!(error.contains("GPT2LMHeadModel"), "{error}");
        assert!(error.contains("LlamaForCausalLM, MistralForCausalLM"), "{error}");
        let error = parse(json!({"architectures": null})).unwrap_err().to_string();
        assert!(error.contains("names no architecture"), "{error}");
    }

    #[test]
    fn bad_fields_are_named() {
        for (change, name) in [
            (json!({"hidden_size": null}), "hidden_size"),
            (json!({"hidden_size": "64"}), "hidden_size"),
            (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"num_attention_heads": 5, "num_key_value_heads": 5}), "hidden_size"),
            (json!({"head_dim": 15}), "head_dim"),
            (json!({"tie_word_embeddings": 1}), "tie_word_embeddings"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"rms_norm_eps": -1}), "rms_norm_eps"),
            (json!({"rope_scaling": {"rope_type": "longrope", "factor": 2}}), "short_factor"),
            (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "full_attention"),
        ] {
            let error = parse(change.clone()).unwrap_err();
            assert!(error.to_string().contains(name), "{change}: {error}");
            assert_eq!(error.exit, crate::error::ExitCode::Input);
        }
    }
}
