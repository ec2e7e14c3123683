//! Rules about files, before any tensor is looked at.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::checkpoint::Layout;
use crate::verify::subject::Subject;
use crate::verify::{Concerns, Findings, Rule, any};

pub(in crate::verify) const RULES: &[Rule] = &[
    Rule {
        id: "A13",
        title: "files, headers and index agree",
        concerns: Concerns::Directory,
        about: any,
        check: files_agree,
    },
    Rule {
        id: "A14",
        title: "no files that loaders would take instead",
        concerns: Concerns::Directory,
        about: any,
        check: no_strangers,
    },
    Rule {
        id: "A16",
        title: "tokenizer and generation settings can be served",
        concerns: Concerns::Directory,
        about: any,
        check: side_files,
    },
];

/// A shard cut short by a full disk parses and loads as garbage; a shard of an older run is loaded whole by
/// engines that go by files; a tensor that the index misses stays uninitialised.
fn files_agree(subject: &Subject, findings: &mut Findings) {
    subject.file_faults.iter().for_each(|fault| findings.error(fault.clone()));
    subject.doubled.iter().for_each(|name| findings.error(format!("{name} stands in more than one file")));
    if subject.files.is_empty() && subject.file_faults.is_empty() {
        findings.error("there is no safetensors file");
    }
    match &subject.index {
        None if subject.files.len() > 1 => findings.error("several safetensors files and no index"),
        None if !subject.listing.contains("model.safetensors") && subject.files.len() == 1 => {
            findings.error("a single file must be named model.safetensors")
        }
        None => {}
        Some(Err(fault)) => findings.error(fault.clone()),
        Some(Ok(_)) if subject.listing.contains("model.safetensors") => {
            findings.error("model.safetensors stands beside an index of shards")
        }
        Some(Ok(index)) => index_agrees(subject, index, findings),
    }
}

fn index_agrees(subject: &Subject, index: &serde_json::Map<String, Value>, findings: &mut Findings) {
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        return findings.error("the index has no weight_map");
    };
    let mut named = BTreeMap::new();
    for (tensor, file) in map {
        let file = file.as_str().unwrap_or_default();
        *named.entry(file).or_insert(0) += 1;
        match subject.tensors.get(tensor) {
            _ if !subject.listing.contains(file) => {
                findings.error(format!("{tensor}: the index names {file}, which is missing"))
            }
            Some(found) if subject.files[found.file].0 == file => {}
            _ if !subject.file_faults.is_empty() => {}
            _ => findings.error(format!("{tensor} is not in {file}, where the index says it is")),
        }
    }
    for name in subject.tensors.keys().filter(|name| !map.contains_key(*name)) {
        findings.error(format!("{name} is not in the index"));
    }
    for (name, _) in subject.files.iter().filter(|(name, _)| !named.contains_key(name.as_str())) {
        findings.error(format!("{name} is not named by the index"));
    }
    let total: u64 = subject.tensors.values().map(|found| found.bytes).sum();
    let claimed =
        index.get("metadata").and_then(|metadata| metadata.get("total_size")).and_then(Value::as_u64);
    if claimed.is_some_and(|claimed| claimed != total) && subject.file_faults.is_empty() {
        findings.error(format!("the index says {} bytes, the tensors have {total}", claimed.unwrap_or(0)));
    }
}

/// Engines prefer Mistral's own files over these, and `.bin` weights or another layout's description over
/// what was verified.
fn no_strangers(subject: &Subject, findings: &mut Findings) {
    for name in &subject.listing {
        let weights = [".bin", ".pt", ".pth", ".gguf"].iter().any(|suffix| name.ends_with(suffix));
        if name.starts_with("consolidated") || name == "params.json" || name.ends_with(".partial") || weights
        {
            findings.error(format!("{name} does not belong here"));
        }
    }
    if subject.layout == Some(Layout::CompressedTensors) && subject.listing.contains("hf_quant_config.json") {
        findings.warn("hf_quant_config.json belongs to the other layout");
    }
}

/// Without its tokenizer a model answers oddly or does not start; a hybrid cache is refused by engines.
fn side_files(subject: &Subject, findings: &mut Findings) {
    if !["tokenizer.json", "tokenizer.model", "tekken.json"]
        .iter()
        .any(|name| subject.listing.contains(*name))
    {
        findings.warn("there is no tokenizer");
    }
    if subject.listing.contains("generation_config.json") {
        match crate::verify::subject::object(&subject.dir.join("generation_config.json")) {
            Err(fault) => findings.warn(fault),
            Ok(config) if config.get("cache_implementation").is_some_and(|cache| cache == "hybrid") => {
                findings.warn("generation_config.json asks for a hybrid cache, which engines refuse")
            }
            Ok(_) => {}
        }
    }
}
