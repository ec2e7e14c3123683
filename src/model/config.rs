//! config.json, read into the sizes and switches of a decoder.

use serde_json::{Map, Value};

use super::families::{Family, supported};
use super::rope::Rope;
use crate::error::{Error, LONGEST_NAME, Result, printable};

/// The sizes and switches of a decoder-only model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub family: Family,
    /// Decoder layers.
    pub layers: usize,
    /// Features of the residual stream.
    pub hidden: usize,
    /// Features inside the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features of one head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Added to the mean square before the root in every norm.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether the embedding also serves as lm_head.
    pub tie_embeddings: bool,
    /// Whether q, k, v and o have a bias.
    pub attention_bias: bool,
    /// Whether gate, up and down have a bias.
    pub mlp_bias: bool,
    /// Tokens that attention reaches back, the token itself included.
    pub sliding_window: Option<usize>,
}

impl ModelConfig {
    /// Reads the fields of config.json.
    ///
    /// # Errors
    /// Exit code 3: an unsupported architecture (named, with the supported ones), a missing or
    /// malformed field, sizes that contradict each other.
    pub fn parse(config: &Map<String, Value>) -> Result<ModelConfig> {
        let fields = Fields(config);
        let family = family(&fields)?;
        let heads = fields.count("num_attention_heads")?;
        let hidden = fields.count("hidden_size")?;
        let head_dim = match fields.optional_count("head_dim")? {
            Some(dim) => dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(fields.wrong(
                    "hidden_size",
                    format!(
                        "is {hidden}, not a multiple of num_attention_heads {heads}, and head_dim is absent"
                    ),
                ));
            }
        };
        let max_positions =
            fields.optional_count("max_position_embeddings")?.unwrap_or(family.default_max_positions());
        let parsed = ModelConfig {
            family,
            layers: fields.count("num_hidden_layers")?,
            hidden,
            intermediate: fields.count("intermediate_size")?,
            heads,
            kv_heads: fields
                .optional_count("num_key_value_heads")?
                .unwrap_or(family.default_kv_heads(&fields).unwrap_or(heads)),
            head_dim,
            vocab: fields.count("vocab_size")?,
            norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope: Rope::parse(&fields, max_positions, head_dim)?,
            tie_embeddings: fields.flag("tie_word_embeddings")?,
            attention_bias: family.has_bias_fields() && fields.flag("attention_bias")?,
            mlp_bias: family.has_bias_fields() && fields.flag("mlp_bias")?,
            sliding_window: family.sliding_window(&fields)?,
        };
        parsed.check_size()?;
        if !parsed.heads.is_multiple_of(parsed.kv_heads) {
            return Err(fields.wrong(
                "num_attention_heads",
                format!("is {heads}, not a multiple of num_key_value_heads {}", parsed.kv_heads),
            ));
        }
        if head_dim % 2 != 0 {
            return Err(
                fields.wrong("head_dim", format!("is {head_dim}; rotary embedding needs an even number"))
            );
        }
        match fields.text("hidden_act")? {
            None | Some("silu") => Ok(parsed),
            Some(other) => {
                Err(fields.wrong("hidden_act", format!("is {other:?}; only \"silu\" is supported")))
            }
        }
    }
}

/// Decoder layers that a model may have: eight times as many as the deepest has, and few enough to plan for.
const MOST_LAYERS: usize = 1024;
/// Parameters that it may have: a hundred times as many as the largest has. Sums over them fit in 64 bits.
const MOST_PARAMETERS: u128 = 100_000_000_000_000;

impl ModelConfig {
    /// Everything that is made from these sizes can be counted, in numbers and in memory.
    fn check_size(&self) -> Result<()> {
        if self.layers > MOST_LAYERS {
            let what = format!(
                "config.json: num_hidden_layers is {}, more than the {MOST_LAYERS} that distq reads",
                self.layers
            );
            return Err(Error::input(what).fix("correct config.json"));
        }
        let n = |size: usize| size as u128;
        let product = |factors: &[usize]| {
            factors
                .iter()
                .try_fold(1u128, |product, &factor| product.checked_mul(n(factor)))
                .unwrap_or(u128::MAX)
        };
        let parts = [
            product(&[self.vocab, self.hidden, 2]),
            product(&[self.layers, self.heads, self.head_dim, self.hidden, 2]),
            product(&[self.layers, self.kv_heads, self.head_dim, self.hidden, 2]),
            product(&[self.layers, self.intermediate, self.hidden, 3]),
        ];
        let parameters = parts.into_iter().fold(0, u128::saturating_add);
        if parameters > MOST_PARAMETERS {
            let sizes = format!(
                "vocab_size {}, hidden_size {}, intermediate_size {}, num_hidden_layers {}, num_attention_heads {}, \
                 num_key_value_heads {}, head_dim {}",
                self.vocab,
                self.hidden,
                self.intermediate,
                self.layers,
                self.heads,
                self.kv_heads,
                self.head_dim
            );
            let what = format!(
                "config.json describes a model of more than {} trillion parameters: {sizes}",
                MOST_PARAMETERS / 1_000_000_000_000
            );
            return Err(Error::input(what).fix("correct the size that is too large"));
        }
        Ok(())
    }
}

fn family(fields: &Fields<'_>) -> Result<Family> {
    let names = architectures(fields.0);
    if let Some(family) = names.iter().find_map(|name| Family::from_name(name)) {
        return Ok(family);
    }
    let what = match names.as_slice() {
        [] => "config.json names no architecture".to_string(),
        names => format!("the architecture {} is not supported", shown(&names.join(", "))),
    };
    Err(Error::input(what).fix(format!("use a checkpoint of one of: {}", supported().join(", "))))
}

/// The architectures that config.json names.
pub fn architectures(config: &Map<String, Value>) -> Vec<&str> {
    match config.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// What a message shows of a value.
fn shown(value: &impl std::fmt::Display) -> String {
    printable(&value.to_string(), LONGEST_NAME)
}

/// Typed access to config.json with errors that name the field.
pub(super) struct Fields<'a>(pub &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// A field, where JSON's null counts as absent.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub fn wrong(&self, name: &str, what: String) -> Error {
        Error::input(format!("config.json: {name} {what}")).fix("correct config.json")
    }

    pub fn count(&self, name: &str) -> Result<usize> {
        self.optional_count(name)?.ok_or_else(|| self.wrong(name, "is missing".into()))
    }

    pub fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if n > 0 => Ok(Some(n as usize)),
                _ => Err(self.wrong(name, format!("is {}, not a positive whole number", shown(value)))),
            },
        }
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
                _ => Err(self.wrong(name, format!("is {}, not a positive number", shown(value)))),
            },
        }
    }

    pub fn flag(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(name, format!("is {}, not true or false", shown(value)))),
        }
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_str()
                .map(Some)
                .ok_or_else(|| self.wrong(name, format!("is {}, not a string", shown(value)))),
        }
    }

    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields(map))),
            Some(value) => Err(self.wrong(name, format!("is {}, not an object", shown(value)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(change: Value) -> Result<ModelConfig> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true
        });
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::parse(config.as_object().unwrap())
    }

    #[test]
    fn head_dim_defaults_to_an_even_share_of_the_hidden_size() {
        assert_eq!(parse(json!({})).unwrap().head_dim, 16);
        assert_eq!(parse(json!({"head_dim": 32})).unwrap().head_dim, 32);
        assert_eq!(parse(json!({"head_dim": null})).unwrap().head_dim, 16);
    }

    #[test]
    fn mistral_slides_by_default_and_not_when_told_so() {
        let mistral = |window: Value| {
            parse(json!({"architectures": ["MistralForCausalLM"], "sliding_window": window}))
                .unwrap()
                .sliding_window
        };
        assert_eq!(mistral(json!(128)), Some(128));
        assert_eq!(mistral(Value::Null), None);
        let absent = parse(json!({"architectures": ["MistralForCausalLM"]})).unwrap();
        assert_eq!(absent.sliding_window, Some(4096));
        assert_eq!(parse(json!({"sliding_window": 128})).unwrap().sliding_window, None);
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
            (json!({"rope_scaling": {"rope_type": "longrope", "factor": 2}}), "longrope"),
        ] {
            let error = parse(change.clone()).unwrap_err();
            assert!(error.to_string().contains(name), "{change}: {error}");
            assert_eq!(error.exit, crate::error::ExitCode::Input);
        }
    }
}
