//! Rules about config.json and hf_quant_config.json.

use serde_json::{Map, Value};

use super::scheme::{LinearScheme, strings};
use super::subject::{Subject, object};
use super::{Concerns, Findings, Rule};
use crate::checkpoint::Layout;

const CT: Concerns = Concerns::Config(Some(Layout::CompressedTensors));
const MODELOPT: Concerns = Concerns::Config(Some(Layout::Modelopt));

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "A1",
        title: "config.json declares a known quantization",
        concerns: Concerns::Directory,
        check: declared,
    },
    Rule { id: "A2", title: "every group's arguments are NVFP4's", concerns: CT, check: group_arguments },
    Rule {
        id: "B1",
        title: "config.json declares ModelOpt's NVFP4",
        concerns: MODELOPT,
        check: modelopt_declared,
    },
    Rule {
        id: "B2",
        title: "hf_quant_config.json agrees with config.json",
        concerns: MODELOPT,
        check: second_file_agrees,
    },
    Rule {
        id: "B6",
        title: "exclusions reach what they name and nothing else",
        concerns: MODELOPT,
        check: exclusions,
    },
    Rule { id: "B8", title: "mixed precision lists its linears", concerns: MODELOPT, check: mixed_lists },
];

fn quantization(subject: &Subject) -> &Value {
    match &subject.config {
        Ok(config) => config.get("quantization_config").unwrap_or(&Value::Null),
        Err(_) => &Value::Null,
    }
}

/// A loader that does not recognise the quantization reads packed codes as weights.
fn declared(subject: &Subject, findings: &mut Findings) {
    if let Err(fault) = &subject.config {
        return findings.error(fault.clone());
    }
    let quantization = quantization(subject);
    match subject.layout {
        None => findings.error(format!(
            "quant_method is {}, not compressed-tensors or modelopt",
            quantization["quant_method"]
        )),
        Some(Layout::Modelopt) => {}
        Some(Layout::CompressedTensors) => {
            if quantization["quantization_status"] != "compressed" {
                findings.error("quantization_status is not \"compressed\"");
            }
            let format = quantization["format"].as_str().unwrap_or_default();
            if !["nvfp4-pack-quantized", "mixed-precision"].contains(&format) {
                findings.error(format!("format is {format:?}, not nvfp4-pack-quantized or mixed-precision"));
            }
        }
    }
    if let Err(fault) = &subject.model {
        findings.error(fault.clone());
    }
}

/// Keys that compressed-tensors knows; an unknown one is a validation error there.
const ARGUMENTS: [&str; 14] = [
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
    "kwargs",
    "is_online",
];

/// A wrong argument is an exception in one loader and another number format in the next.
fn group_arguments(subject: &Subject, findings: &mut Findings) {
    let Some(groups) = quantization(subject)["config_groups"].as_object().filter(|groups| !groups.is_empty())
    else {
        return findings.error("there are no config_groups");
    };
    for (name, group) in groups {
        if group["format"].as_str().is_none() {
            findings.error(format!("{name} has no format"));
        }
        let weights = &group["weights"];
        if weights["num_bits"].as_u64() != Some(4) {
            continue; // FP8 groups of a mixed checkpoint
        }
        arguments(&format!("{name}.weights"), weights, &Value::Bool(false), findings);
        match &group["input_activations"] {
            Value::Null => {}
            inputs => {
                arguments(&format!("{name}.input_activations"), inputs, &Value::from("local"), findings)
            }
        }
    }
}

fn arguments(place: &str, arguments: &Value, dynamic: &Value, findings: &mut Findings) {
    let expected: [(&str, Value); 6] = [
        ("num_bits", 4.into()),
        ("type", "float".into()),
        ("symmetric", true.into()),
        ("strategy", "tensor_group".into()),
        ("group_size", 16.into()),
        ("dynamic", dynamic.clone()),
    ];
    for (key, value) in expected {
        if arguments[key] != value {
            findings.error(format!("{place}: {key} is {}, not {value}", arguments[key]));
        }
    }
    for key in arguments.as_object().into_iter().flat_map(Map::keys) {
        if !ARGUMENTS.contains(&key.as_str()) {
            findings.error(format!("{place}: unknown key {key}"));
        }
    }
}

/// vLLM and TensorRT-LLM choose their kernels by these fields.
fn modelopt_declared(subject: &Subject, findings: &mut Findings) {
    let quantization = quantization(subject);
    let algorithm = quantization["quant_algo"].as_str().unwrap_or_default();
    if !["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"].contains(&algorithm) {
        findings.error(format!("quant_algo is {algorithm:?}"));
    }
    if !quantization["ignore"].is_array() {
        findings.error("ignore is not a list");
    }
    for (name, group) in quantization["config_groups"].as_object().into_iter().flatten() {
        let weights = &group["weights"];
        if weights["num_bits"].as_u64() == Some(4) && weights["group_size"].as_u64() != Some(16) {
            findings.error(format!("{name}: group_size is {}, not 16", weights["group_size"]));
        }
    }
}

/// Some engines read the one file, some the other.
fn second_file_agrees(subject: &Subject, findings: &mut Findings) {
    let second = match object(&subject.dir.join("hf_quant_config.json")) {
        Ok(second) => second,
        Err(fault) => return findings.error(fault),
    };
    let (first, second) = (quantization(subject), &second["quantization"]);
    if first["quant_algo"] != second["quant_algo"] {
        findings.error(format!(
            "quant_algo is {} here and {} in config.json",
            second["quant_algo"], first["quant_algo"]
        ));
    }
    if second["quant_algo"] == "MIXED_PRECISION" {
        return; // B8 compares the lists
    }
    let sorted = |value: &Value| {
        let mut names = strings(value);
        names.sort();
        names
    };
    // The embedding is no linear: listing it in one file only changes nothing.
    let linears =
        |names: Vec<String>| names.into_iter().filter(|name| !name.contains("embed")).collect::<Vec<_>>();
    if linears(sorted(&first["ignore"])) != linears(sorted(&second["exclude_modules"])) {
        findings.error("exclude_modules differs from ignore in config.json");
    }
    if second["group_size"].as_u64() != Some(16) {
        findings.error(format!("group_size is {}, not 16", second["group_size"]));
    }
    match second.get("kv_cache_quant_algo") {
        Some(Value::Null) => {}
        Some(Value::String(algo)) if algo == "FP8" => {}
        other => findings.error(format!("kv_cache_quant_algo is {other:?}, not null or FP8")),
    }
}

/// ModelOpt's loaders take a pattern as any part of a name, so `gate` removes gate_proj and
/// `model.layers.1` removes layers 10 to 19 as well.
fn exclusions(subject: &Subject, findings: &mut Findings) {
    let patterns = &subject.schemes.ignore;
    let mixed = quantization(subject)["quant_algo"] == "MIXED_PRECISION";
    if !mixed && subject.schemes.of_module("lm_head") != LinearScheme::Plain {
        findings.error("lm_head is not listed in ignore, so loaders build it quantized");
    }
    let linears = subject.linears();
    for pattern in patterns.iter().filter(|pattern| !pattern.contains('*')) {
        let mut modules = linears.iter().map(|linear| linear.name.as_str());
        let accidental = modules.find(|name| *name != pattern && name.contains(pattern.as_str()));
        if let Some(name) = accidental {
            findings.error(format!("{pattern:?} is a part of {name} and removes it too"));
        }
    }
}

/// In a mixed checkpoint only what is listed is quantized, and both files are read.
fn mixed_lists(subject: &Subject, findings: &mut Findings) {
    let first = quantization(subject);
    if first["quant_algo"] != "MIXED_PRECISION" {
        return;
    }
    let Some(layers) = first["quantized_layers"].as_object() else {
        return findings.error("there is no quantized_layers");
    };
    let second = object(&subject.dir.join("hf_quant_config.json")).unwrap_or_default();
    let there = second.get("quantization").map_or(&Value::Null, |q| &q["quantized_layers"]);
    for (module, how) in layers {
        if there[module]["quant_algo"] != how["quant_algo"] {
            findings.error(format!(
                "{module}: {} here, {} in hf_quant_config.json",
                how["quant_algo"], there[module]["quant_algo"]
            ));
        }
    }
    for module in
        there.as_object().into_iter().flat_map(Map::keys).filter(|module| !layers.contains_key(*module))
    {
        findings.error(format!("{module} is listed in hf_quant_config.json only"));
    }
}
