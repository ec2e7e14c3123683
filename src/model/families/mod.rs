//! The supported architectures. A family is a file that turns the fields of config.json into a description of every
//! layer ([`Form`]); nothing else in the program knows it by name.

mod llama;

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

const FAMILIES: &[&Family] = &[&llama::LLAMA, &llama::MISTRAL];

const WRAPPERS: &[Wrapper] = &[];

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
