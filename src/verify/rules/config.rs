//! Rules about config.json and hf_quant_config.json.

use serde_json::{Map, Value};

use crate::checkpoint::{Layout, LinearScheme, strings};
use crate::verify::subject::{Subject, object};
use crate::verify::{Concerns, Findings, Rule, any};

const CT: Concerns = Concerns::Config(Some(Layout::CompressedTensors));
const MODELOPT: Concerns = Concerns::Config(Some(Layout::Modelopt));

pub(in crate::verify) const RULES: &[Rule] = &[
    Rule {
        id: "A1",
        title: "config.json declares a known quantization",
        concerns: Concerns::Directory,
        about: any,
        check: declared,
    },
    Rule {
        id: "A2",
        title: "every group's arguments are NVFP4's",
        concerns: CT,
        about: any,
        check: group_arguments,
    },
    Rule {
        id: "B1",
        title: "config.json declares ModelOpt's NVFP4",
        concerns: MODELOPT,
        about: any,
        check: modelopt_declared,
    },
    Rule {
        id: "B2",
        title: "hf_quant_config.json agrees with config.json",
        concerns: MODELOPT,
        about: any,
        check: second_file_agrees,
    },
    Rule {
        id: "B6",
        title: "exclusions reach what they name and nothing else",
        concerns: MODELOPT,
        about: any,
        check: exclusions,
    },
    Rule {
        id: "B8",
        title: "mixed precision lists its linears",
        concerns: MODELOPT,
        about: is_mixed,
        check: mixed_lists,
    },
];

/// A loader that does not recognise the quantization reads packed codes as weights.
fn declared(subject: &Subject, findings: &mut Findings) {
    if let Err(fault) = &subject.config {
        return findings.error(fault.clone());
    }
    let quantization = subject.quantization();
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
    subject.schemes.faults.iter().for_each(|fault| findings.error(format!("quantization_config: {fault}")));
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
    let Some(groups) =
        subject.quantization()["config_groups"].as_object().filter(|groups| !groups.is_empty())
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
    let quantization = subject.quantization();
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
    let first = subject.quantization();
    let Some(second) = second.get("quantization").filter(|second| second.is_object()) else {
        return findings.error("hf_quant_config.json: there is no object \"quantization\"");
    };
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
    match &second["kv_cache_quant_algo"] {
        Value::Null => {}
        algo if algo == "FP8" || algo == "NVFP4" => {}
        other => findings.error(format!("kv_cache_quant_algo is {other}, not null, \"FP8\" or \"NVFP4\"")),
    }
}

/// ModelOpt's loaders take a pattern as any part of a name, so `gate` removes gate_proj and
/// `model.layers.1` removes layers 10 to 19 as well.
fn exclusions(subject: &Subject, findings: &mut Findings) {
    let head = subject.model.as_ref().map_or("lm_head", |model| &model.head);
    if !is_mixed(subject) && subject.schemes.of_module(head) != LinearScheme::Plain {
        findings.error("lm_head is not listed in ignore, so loaders build it quantized");
    }
    for (pattern, module) in
        subject.schemes.accidental.iter().filter(|(_, module)| module.contains(".layers."))
    {
        findings.error(format!("{pattern:?} is a part of {module} and removes it too"));
    }
}

fn is_mixed(subject: &Subject) -> bool {
    subject.quantization()["quant_algo"] == "MIXED_PRECISION"
}

/// In a mixed checkpoint only what is listed is quantized, and both files are read.
fn mixed_lists(subject: &Subject, findings: &mut Findings) {
    let first = subject.quantization();
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
