//! What a quantized checkpoint says of itself: who made it, and what is quantized.

use std::path::Path;

use serde_json::Value;

use super::subject::Subject;
use crate::checkpoint::{Layout, LinearScheme};

/// What a quantized checkpoint says of itself, in its configuration and in its files' metadata.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Description {
    /// The layout that config.json declares, where it could be read.
    pub layout: Option<Layout>,
    /// `nvfp4`, `nvfp4a16`, or how many linears have which scheme.
    pub scheme: Option<String>,
    /// How codes and scales were chosen, where the files say so.
    pub method: Option<String>,
    /// The program that wrote the checkpoint, where the files say so.
    pub producer: Option<String>,
    /// The type of the KV cache, where it is quantized.
    pub kv_cache: Option<String>,
    /// The modules and patterns that config.json leaves unquantized.
    pub ignored: Vec<String>,
}

/// Describes the quantized checkpoint in a directory; none where there is none.
pub fn describe(dir: &Path) -> Option<Description> {
    Subject::open(dir, None).ok().map(|subject| Description::of(&subject))
}

impl Description {
    pub(super) fn of(subject: &Subject) -> Description {
        let quantization = subject.quantization();
        Description {
            layout: subject.layout,
            scheme: scheme(subject),
            method: subject.method.clone().filter(|_| subject.ours),
            producer: subject.producer.clone().or_else(|| declared_producer(quantization)),
            kv_cache: kv_cache(&quantization["kv_cache_scheme"]),
            ignored: subject.schemes.ignore.clone(),
        }
    }
}

fn scheme(subject: &Subject) -> Option<String> {
    let count = subject.schemes.count();
    let name = |scheme: &LinearScheme| match scheme {
        LinearScheme::Plain => "plain",
        LinearScheme::Nvfp4 { activations: true } => "nvfp4",
        LinearScheme::Nvfp4 { activations: false } => "nvfp4a16",
        LinearScheme::Fp8 => "fp8",
    };
    match count.len() {
        0 => None,
        1 => count.keys().next().map(|scheme| name(scheme).to_string()),
        _ => {
            let parts: Vec<String> =
                count.iter().map(|(scheme, n)| format!("{n} linears {}", name(scheme))).collect();
            Some(format!("mixed: {}", parts.join(", ")))
        }
    }
}

/// Who wrote the checkpoint by its configuration: ModelOpt names itself, compressed-tensors its version only.
fn declared_producer(quantization: &Value) -> Option<String> {
    let text = |value: &Value| value.as_str().map(str::to_string);
    let (name, version) = (&quantization["producer"]["name"], &quantization["producer"]["version"]);
    match (text(name), text(version)) {
        (Some(name), version) => Some([name, version.unwrap_or_default()].join(" ").trim().to_string()),
        (None, _) => text(&quantization["version"]).map(|version| format!("compressed-tensors {version}")),
    }
}

fn kv_cache(scheme: &Value) -> Option<String> {
    if let Some(name) = scheme.as_str() {
        return Some(name.to_lowercase());
    }
    let bits = scheme["num_bits"].as_u64()?;
    Some(match scheme["type"].as_str() {
        Some("float") => format!("fp{bits}"),
        _ => format!("{bits} bits"),
    })
}
