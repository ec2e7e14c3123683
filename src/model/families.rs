//! The supported architectures and where they differ. All share the Llama decoder layer.

use super::config::Fields;
use crate::error::Result;

/// An architecture, as config.json names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`
    Llama,
    /// `MistralForCausalLM`: no biases, a sliding window.
    Mistral,
}

const FAMILIES: [(&str, Family); 2] =
    [("LlamaForCausalLM", Family::Llama), ("MistralForCausalLM", Family::Mistral)];

/// The names of the supported architectures.
pub fn supported() -> Vec<&'static str> {
    FAMILIES.iter().map(|(name, _)| *name).collect()
}

impl Family {
    /// The family with this architecture name.
    pub fn from_name(name: &str) -> Option<Family> {
        FAMILIES.iter().find(|(known, _)| *known == name).map(|(_, family)| *family)
    }

    /// The architecture name.
    pub fn name(self) -> &'static str {
        FAMILIES.iter().find(|(_, family)| *family == self).map(|(name, _)| *name).unwrap_or_default()
    }

    /// Key and value heads where config.json gives no number; none means as many as query heads, which is what a null
    /// stands for with Mistral too.
    pub(super) fn default_kv_heads(self, fields: &Fields<'_>) -> Option<usize> {
        match self {
            Family::Mistral if !fields.0.contains_key("num_key_value_heads") => Some(8),
            _ => None,
        }
    }

    pub(super) fn default_max_positions(self) -> usize {
        match self {
            Family::Llama => 2048,
            Family::Mistral => 4096 * 32,
        }
    }

    /// Whether config.json says which linears have biases.
    pub fn has_bias_fields(self) -> bool {
        self == Family::Llama
    }

    /// Mistral slides over 4096 tokens unless config.json says otherwise; null switches it off.
    pub(super) fn sliding_window(self, fields: &Fields<'_>) -> Result<Option<usize>> {
        match self {
            Family::Llama => Ok(None),
            Family::Mistral if !fields.0.contains_key("sliding_window") => Ok(Some(4096)),
            Family::Mistral => fields.optional_count("sliding_window"),
        }
    }
}
