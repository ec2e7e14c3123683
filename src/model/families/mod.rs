//! The supported architectures. A family is a file that turns the fields of config.json into a description of every
//! layer ([`Form`]); nothing else in the program knows it by name.

mod cohere;
mod fused;
mod gemma;
mod granite;
mod llama;
mod mistral;
mod near_llama;
mod nemotron;
mod olmo;
mod qwen;

use super::config::Config;
use super::form::Form;
use crate::error::Result;

/// Decoders that one file describes.
pub struct Family {
    /// The classes of plain decoders, as `architectures` in config.json names them.
    pub architectures: &'static [&'static str],
    /// What `model_type` says beside the decoder's fields.
    pub model_types: &'static [&'static str],
    /// Describes the model that config.json's fields mean.
    pub form: fn(&Config<'_>) -> Result<Form>,
}

/// A class that has a decoder beside other modules, such as a vision tower.
pub struct Wrapper {
    /// Its name in `architectures`.
    pub architecture: &'static str,
    /// Its `model_type`.
    pub model_type: &'static str,
    /// The decoder's `model_type` where the fields do not say it.
    pub decoder: &'static str,
    /// Whether the embedding also serves as lm_head where the fields do not say it.
    pub tied: bool,
}

const FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &mistral::MINISTRAL3,
    &qwen::QWEN2,
    &qwen::QWEN2_VL,
    &qwen::QWEN3,
    &qwen::QWEN3_VL,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &gemma::gemma4::GEMMA4,
    &gemma::gemma4::GEMMA4_UNIFIED,
    &gemma::muse::MUSE,
    &cohere::COHERE,
    &cohere::COHERE2,
    &fused::PHI3,
    &fused::GLM4,
    &granite::GRANITE,
    &granite::GRANITE_SWA,
    &granite::HYPERCLOVAX,
    &olmo::OLMO2,
    &olmo::OLMO3,
    &olmo::EXAONE4,
    &near_llama::SMOLLM3,
    &near_llama::SEED_OSS,
    &near_llama::APERTUS,
    &near_llama::HUNYUAN,
    &nemotron::NEMOTRON,
    &nemotron::ARCEE,
    &nemotron::JAIS2,
];

const WRAPPERS: &[Wrapper] = &[
    wraps("Mistral3ForConditionalGeneration", "mistral3", "mistral", true),
    wraps("Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2_vl_text", false),
    wraps("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qwen2_5_vl_text", false),
    wraps("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3_vl_text", false),
    wraps("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", true),
    wraps("Gemma4ForConditionalGeneration", "gemma4", "gemma4_text", true),
    wraps("Gemma4UnifiedForConditionalGeneration", "gemma4_unified", "gemma4_unified_text", true),
    wraps("Cohere2VisionForConditionalGeneration", "cohere2_vision", "cohere2", true),
    wraps("MuseGlimmerForConditionalGeneration", "muse_glimmer", "muse_glimmer_text", false),
];

const fn wraps(
    architecture: &'static str,
    model_type: &'static str,
    decoder: &'static str,
    tied: bool,
) -> Wrapper {
    Wrapper { architecture, model_type, decoder, tied }
}

/// The names of the supported architectures.
pub fn supported() -> Vec<&'static str> {
    let plain = FAMILIES.iter().flat_map(|family| family.architectures).copied();
    plain.chain(WRAPPERS.iter().map(|wrapper| wrapper.architecture)).collect()
}

/// The family with a class of this name.
pub(super) fn of_architecture(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.architectures.contains(&name))
}

/// The family of decoders with this `model_type`.
pub(super) fn of_model_type(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.model_types.contains(&name))
}

/// The wrapper with this class or, where no class is named, this `model_type`.
pub(super) fn wrapper(architecture: Option<&str>, model_type: Option<&str>) -> Option<&'static Wrapper> {
    WRAPPERS.iter().find(|wrapper| match architecture {
        Some(name) => wrapper.architecture == name,
        None => Some(wrapper.model_type) == model_type,
    })
}
