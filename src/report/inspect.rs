//! `distq inspect`: what a directory is.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{LONGEST_NAME, Result, printable};
use crate::model::{architectures, supported};
use crate::units::{binary, counted};
use crate::verify::{Description, describe};

/// Names of unquantized modules that are shown.
const SHOWN: usize = 3;

/// What a directory is. `--json` prints it; its field names are stable.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Inspection {
    /// The directory.
    pub dir: String,
    /// Architecture, as config.json names it: the one that distq can quantize, where there are several.
    pub architecture: String,
    /// Whether distq can quantize this architecture.
    pub supported: bool,
    /// config.json's number of decoder layers.
    pub layers: Option<u64>,
    /// config.json's hidden size.
    pub hidden: Option<u64>,
    /// config.json's intermediate size.
    pub intermediate: Option<u64>,
    /// config.json's vocabulary size.
    pub vocab: Option<u64>,
    /// Safetensors files.
    pub files: usize,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Elements as stored, by dtype.
    pub elements: BTreeMap<String, u64>,
    /// Parameters: packed codes count twice, scales don't count.
    pub parameters: u64,
    /// Whether there is a tokenizer.json.
    pub tokenizer: bool,
    /// quantization_config, where there is one.
    pub quantization: Option<Value>,
    /// What is used and what is ignored, where that is not plain.
    pub notes: Vec<String>,
    /// What a quantized checkpoint says of itself.
    pub quantized: Option<Description>,
}

/// Reads a directory's configuration and headers.
///
/// # Errors
/// Exit code 3 where it is not a usable checkpoint.
pub fn inspect(dir: &Path) -> Result<Inspection> {
    let checkpoint = Checkpoint::open(dir)?;
    let config = &checkpoint.config;
    // A decoder inside of another class has its sizes in an object of their own.
    let decoder = config.get("text_config");
    let number = |name: &str| {
        decoder.and_then(|decoder| decoder.get(name)).or(config.get(name)).and_then(Value::as_u64)
    };
    let named = architectures(config);
    let supported = named.iter().find(|name| supported().contains(name));
    let architecture = supported.or(named.first()).map_or("unknown", |name| name).to_string();
    let mut elements = BTreeMap::new();
    let mut parameters = 0;
    for (name, dtype, shape) in checkpoint.stored_tensors() {
        // Zero bytes may have any shape.
        let count = shape.iter().fold(1u64, |count, &n| count.saturating_mul(n as u64));
        *elements.entry(format!("{dtype:?}")).or_insert(0u64) += count;
        let packed = dtype == safetensors::Dtype::U8;
        let scale = ["_scale", "_scale_2", "_scale_inv"].iter().any(|suffix| name.ends_with(suffix));
        parameters += if scale { 0 } else { count * if packed { 2 } else { 1 } };
    }
    let quantization = config.get("quantization_config").filter(|value| !value.is_null());
    let quantization = checkpoint.fp8_description().or(quantization).cloned();
    Ok(Inspection {
        quantized: quantization.as_ref().and_then(|_| describe(dir)),
        quantization,
        dir: dir.display().to_string(),
        supported: supported.is_some(),
        architecture,
        layers: number("num_hidden_layers"),
        hidden: number("hidden_size"),
        intermediate: number("intermediate_size"),
        vocab: number("vocab_size"),
        files: checkpoint.files.len(),
        tensors: checkpoint.stored_tensors().count(),
        bytes: checkpoint.total_bytes(),
        elements,
        parameters,
        tokenizer: checkpoint.dir.join("tokenizer.json").exists(),
        notes: checkpoint.notes.clone(),
    })
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = |value: Option<u64>| value.map_or("?".to_string(), |n| n.to_string());
        let supported = if self.supported { "" } else { " (distq can't quantize it)" };
        writeln!(f, "{}", self.dir)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  note          {note}"))?;
        writeln!(f, "  architecture  {}{supported}", printable(&self.architecture, LONGEST_NAME))?;
        writeln!(
            f,
            "  sizes         {} layers, hidden {}, intermediate {}, vocabulary {}",
            known(self.layers),
            known(self.hidden),
            known(self.intermediate),
            known(self.vocab),
        )?;
        writeln!(f, "  parameters    {:.3} billion", self.parameters as f64 / 1e9)?;
        writeln!(
            f,
            "  stored        {} in {}, {}",
            binary(self.bytes),
            counted(self.tensors, "tensor", "tensors"),
            counted(self.files, "file", "files")
        )?;
        let dtypes: Vec<String> = self.elements.iter().map(|(dtype, n)| format!("{dtype} {n}")).collect();
        writeln!(f, "  elements      {}", dtypes.join(", "))?;
        writeln!(f, "  tokenizer     {}", if self.tokenizer { "yes" } else { "no tokenizer.json" })?;
        write!(f, "  quantization  ")?;
        if let Some(quantized) = &self.quantized.as_ref().filter(|quantized| quantized.layout.is_some()) {
            let (shown, more) = quantized.ignored.split_at(quantized.ignored.len().min(SHOWN));
            let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
            let modules = if shown.is_empty() { "none".to_string() } else { shown.join(", ") };
            return write!(f, "{quantized}\n  unquantized   {modules}{more}");
        }
        let Some(quantization) = &self.quantization else { return write!(f, "none") };
        let text = |name: &str| quantization.get(name).and_then(Value::as_str).unwrap_or("-");
        write!(f, "{}", printable(text("quant_method"), LONGEST_NAME))?;
        for detail in ["format", "quant_algo"] {
            if quantization.get(detail).is_some() {
                write!(f, ", {}", printable(text(detail), LONGEST_NAME))?;
            }
        }
        let ignored = quantization.get("ignore").and_then(Value::as_array).map_or(0, Vec::len);
        write!(f, ", {} ignored", counted(ignored, "module", "modules"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> Inspection {
        inspect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
    }

    #[test]
    fn a_source_and_its_quantized_forms_have_the_same_parameters() {
        let (source, modelopt, peer) = (golden("src_bf16"), golden("."), golden("peer"));
        assert_eq!(source.quantization, None);
        assert_eq!((source.layers, source.tensors), (Some(2), 21));
        let said =
            "layout modelopt, nvfp4, KV cache fp8, written by modelopt 0.43.0\n  unquantized   lm_head";
        assert!(modelopt.to_string().ends_with(said), "{modelopt}");
        let said = "layout compressed-tensors, nvfp4, KV cache fp8, written by compressed-tensors 0.19.0";
        assert!(peer.to_string().contains(said) && peer.to_string().contains("tensors, 1 file\n"), "{peer}");
        assert_eq!(source.parameters, modelopt.parameters);
        assert_eq!(source.parameters, peer.parameters);
    }
}
