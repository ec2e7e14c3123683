//! config.json, as Transformers reads it: which family describes the decoder, and where its fields are.

pub mod fields;
pub mod sizes;

use serde_json::{Map, Value};

use super::families::{self, Family, Wrapper, supported};
use crate::backend::Activation;
use crate::error::{Error, Result};
use fields::{Fields, shown};

/// config.json with the family that describes its decoder.
pub struct Config<'a> {
    /// The decoder's fields.
    pub text: Fields<'a>,
    /// All fields: the same ones, or those of the wrapper that has the decoder's under `text_config`.
    pub outer: Fields<'a>,
    /// The class that config.json names.
    pub architecture: String,
    /// The decoder's family.
    pub family: &'static Family,
    /// The class around the decoder, where there is one.
    pub wrapper: Option<&'static Wrapper>,
}

impl<'a> Config<'a> {
    /// Finds the family and the decoder's fields.
    ///
    /// # Errors
    /// Exit code 3: an unsupported architecture (named, with the supported ones), a malformed field.
    pub fn read(config: &'a Map<String, Value>) -> Result<Config<'a>> {
        let outer = Fields::new(config);
        let names = architectures(config);
        let model_type = outer.text("model_type")?;
        let nested = outer.object("text_config", "text_config.")?;
        let text = nested.unwrap_or(outer);
        let own_type = nested.map(|text| text.text("model_type")).transpose()?.flatten();
        let candidates: Vec<Option<&str>> = match names.as_slice() {
            [] => vec![None],
            names => names.iter().copied().map(Some).collect(),
        };
        for name in candidates {
            let wrapper = families::wrapper(name, model_type);
            let family = match (wrapper, name) {
                (Some(wrapper), _) => families::of_model_type(own_type.unwrap_or(wrapper.decoder)),
                (None, Some(name)) => families::of_architecture(name),
                (None, None) => model_type.and_then(families::of_model_type),
            };
            let named = name.or(wrapper.map(|wrapper| wrapper.architecture));
            if let Some(family) = family {
                let own = family.architectures.first().copied();
                let architecture = named.or(own).or(model_type).unwrap_or_default().to_string();
                return Ok(Config { text, outer, architecture, family, wrapper });
            }
        }
        Err(unsupported(&names, model_type, own_type))
    }

    /// Whether config.json says that the embedding also serves as lm_head: in the decoder's fields, or in the
    /// wrapper's, or by the default of the class.
    pub fn tying(&self, default: bool) -> Result<Tying> {
        const NAME: &str = "tie_word_embeddings";
        let own = self.text.optional_flag(NAME)?;
        let (said, default) = match self.wrapper {
            None => (own, default),
            Some(wrapper) => match self.outer.optional_flag(NAME)? {
                Some(tied) => (Some(tied || own == Some(true)), wrapper.tied),
                None => (own, wrapper.tied),
            },
        };
        Ok(match (said, default) {
            (Some(true), _) => Tying::Tied,
            (None, true) => Tying::UnlessStored,
            (Some(false), _) | (None, false) => Tying::Apart,
        })
    }

    /// The function between an MLP's linears, which must be one of `known`; the first of them where the field is absent.
    pub fn activation(&self, field: &str, known: &[&str]) -> Result<Activation> {
        let name = self.text.text(field)?.unwrap_or(known[0]);
        let found = match name {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Some(Activation::GeluTanh),
            "gelu" => Some(Activation::Gelu),
            "relu2" => Some(Activation::Relu2),
            _ => None,
        };
        match found {
            Some(activation) if known.contains(&name) => Ok(activation),
            _ => {
                let known: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
                let what = format!("is {}; supported here: {}", shown(&name), known.join(", "));
                Err(self.text.wrong(field, what))
            }
        }
    }

    /// Refuses fields that the family's forward pass does not know, unless they have the value that changes nothing.
    pub fn refuse(&self, field: &str, harmless: &Value) -> Result<()> {
        match self.text.get(field) {
            Some(value) if value != harmless => {
                Err(self.text.wrong(field, format!("is {}, which distq does not compute", shown(value))))
            }
            _ => Ok(()),
        }
    }

    /// The window of every layer: `window` where the layer slides, by `layer_types` or, where that field is absent, by
    /// the family's pattern, which says of a layer whether it sees everything.
    pub fn windows(
        &self,
        layers: usize,
        window: Option<usize>,
        sees_all: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>> {
        let types = self.layer_types(layers, |layer| if sees_all(layer) { FULL } else { SLIDING })?;
        Ok(types.iter().map(|kind| window.filter(|_| kind == SLIDING)).collect())
    }

    /// A list of a number for each layer.
    pub fn layer_numbers(&self, name: &str, layers: usize) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.text.get(name) else { return Ok(None) };
        let numbers: Option<Vec<f64>> =
            value.as_array().and_then(|items| items.iter().map(Value::as_f64).collect());
        match numbers {
            Some(numbers) if numbers.len() >= layers => Ok(Some(numbers)),
            _ => Err(self.text.wrong(name, format!("is not a list of a number for each of {layers} layers"))),
        }
    }

    /// Whether q, k, v and o have biases, and whether the MLP has, as the fields of most families say it.
    pub fn biases(&self) -> Result<(bool, bool)> {
        Ok((self.text.flag("attention_bias")?, self.text.flag("mlp_bias")?))
    }

    /// The kind of every layer by `layer_types`, or by the family's pattern where that field is absent. Older names of
    /// the kinds are replaced by newer ones.
    pub fn layer_types(&self, layers: usize, pattern: impl Fn(usize) -> &'static str) -> Result<Vec<String>> {
        let Some(types) = self.text.texts("layer_types")? else {
            return Ok((0..layers).map(|layer| pattern(layer).to_string()).collect());
        };
        if types.len() < layers {
            let what = format!("has {} entries, and num_hidden_layers is {layers}", types.len());
            return Err(self.text.wrong("layer_types", what));
        }
        let newer = |name: &str| match name {
            "attention" => FULL.to_string(),
            "mamba" => "linear_attention".to_string(),
            name => name.to_string(),
        };
        let types: Vec<String> = types[..layers].iter().map(|name| newer(name)).collect();
        match types.iter().find(|name| ![FULL, SLIDING].contains(&name.as_str())) {
            Some(other) => {
                let what = format!("names layers of kind {}, which distq does not compute", shown(other));
                Err(self.text.wrong("layer_types", what))
            }
            None => Ok(types),
        }
    }
}

/// Whether the embedding also serves as lm_head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tying {
    /// config.json says so.
    Tied,
    /// By the default of the class, which a stored lm_head overrides.
    UnlessStored,
    /// No.
    Apart,
}

/// The kind of a layer that sees all tokens before.
pub const FULL: &str = "full_attention";
/// The kind of a layer that sees a window of tokens.
pub const SLIDING: &str = "sliding_attention";

fn unsupported(names: &[&str], model_type: Option<&str>, decoder: Option<&str>) -> Error {
    let what = match (names, model_type) {
        ([], None) => "config.json names no architecture".to_string(),
        ([], Some(model_type)) => format!("the model_type {} is not supported", shown(&model_type)),
        (names, _) => {
            let around = decoder.map(|name| format!(" around {}", shown(&name))).unwrap_or_default();
            format!("the architecture {}{around} is not supported", shown(&names.join(", ")))
        }
    };
    Error::input(what).fix(format!("use a checkpoint of one of: {}", supported().join(", ")))
}

/// The architectures that config.json names.
pub fn architectures(config: &Map<String, Value>) -> Vec<&str> {
    match config.get("architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}
