//! Rules about which tensors there are, and their dtypes and shapes.

use std::collections::BTreeSet;

use safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::{Layout, LinearScheme};
use crate::model::{Layer, LinearSpec, Mixer, Model, TensorSpec};
use crate::nvfp4::BLOCK;
use crate::verify::subject::Subject;
use crate::verify::{Concerns, Findings, Rule, any};

const ANY: Concerns = Concerns::Tensors(None);
const CT: Concerns = Concerns::Tensors(Some(Layout::CompressedTensors));
const MODELOPT: Concerns = Concerns::Tensors(Some(Layout::Modelopt));

pub(in crate::verify) const RULES: &[Rule] = &[
    Rule {
        id: "A3",
        title: "every quantized linear has its tensors and no others",
        concerns: CT,
        about: has_quantized,
        check: complete,
    },
    Rule {
        id: "A4",
        title: "codes are U8, block scales F8_E4M3, globals F32",
        concerns: ANY,
        about: has_quantized,
        check: dtypes,
    },
    Rule { id: "A5", title: "shapes agree with config.json", concerns: ANY, about: any, check: shapes },
    Rule {
        id: "A10",
        title: "what is ignored is plain, the rest is quantized",
        concerns: ANY,
        about: any,
        check: ignored_is_plain,
    },
    Rule {
        id: "A11",
        title: "FP8 cache scales stand in all layers or none",
        concerns: CT,
        about: has_cache_scales,
        check: cache_scales,
    },
    Rule {
        id: "A12",
        title: "no tensor that the architecture does not know",
        concerns: ANY,
        about: any,
        check: known,
    },
    Rule {
        id: "A15",
        title: "norms, embeddings and lm_head are not quantized",
        concerns: ANY,
        about: any,
        check: unquantized,
    },
    Rule {
        id: "B3",
        title: "every quantized linear has its tensors and no others",
        concerns: MODELOPT,
        about: has_quantized,
        check: complete,
    },
    Rule {
        id: "B7",
        title: "FP8 cache scales and declarations agree",
        concerns: MODELOPT,
        about: has_cache_scales,
        check: modelopt_cache_scales,
    },
];

/// Whether the configuration says that any linear is quantized.
fn has_quantized(subject: &Subject) -> bool {
    !subject.schemes.count().is_empty()
}

/// Suffixes that mark a linear as quantized in one layout or the other.
const FOREIGN: [&str; 16] = [
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "input_global_scale",
    "weight_scale_2",
    "input_scale",
    "weight_zero_point",
    "input_zero_point",
    "pre_quant_scale",
    "weight_shape",
    "weight_g_idx",
    "_double_scale",
    "svdquant_lora_a",
    "svdquant_lora_b",
    "weight_double_scale",
    "output_scale",
];

/// The tensors that a linear must have by its scheme.
fn required(subject: &Subject, linear: &LinearSpec, scheme: LinearScheme) -> Vec<String> {
    let names = subject.names(&linear.name);
    match scheme {
        LinearScheme::Plain => vec![linear.weight()],
        LinearScheme::Nvfp4 { activations } => {
            let mut tensors = vec![names.codes, names.scales, names.weight_global];
            tensors.extend(activations.then_some(names.input_global));
            tensors
        }
        LinearScheme::Fp8 => vec![linear.weight(), names.scales],
    }
}

/// Engines allocate parameters without initialising them: a scale that is missing is whatever was in
/// memory, and one that is too many stops the load.
fn complete(subject: &Subject, findings: &mut Findings) {
    for linear in subject.linears() {
        let scheme = subject.schemes.of_module(&linear.name);
        if scheme == LinearScheme::Plain || !looks_quantized(subject, &linear) {
            continue; // A10 compares declarations with tensors
        }
        let required = required(subject, &linear, scheme);
        for name in required.iter().filter(|name| !subject.tensors.contains_key(*name)) {
            findings.error(format!("{name} is missing"));
        }
        let plain = [linear.weight()];
        let fp8_input = (scheme == LinearScheme::Fp8).then(|| format!("{}.input_scale", linear.name));
        let possible = FOREIGN.iter().map(|suffix| format!("{}.{suffix}", linear.name)).chain(plain);
        for name in possible.filter(|name| subject.tensors.contains_key(name)) {
            if !required.contains(&name) && fp8_input.as_ref() != Some(&name) {
                findings.error(format!("{name} does not belong to this layout and scheme"));
            }
        }
    }
}

/// Whether any tensor says that the linear is quantized.
fn looks_quantized(subject: &Subject, linear: &LinearSpec) -> bool {
    let weight = subject.tensors.get(&linear.weight());
    weight.is_none_or(|found| matches!(found.dtype, Dtype::U8 | Dtype::I8 | Dtype::F8_E4M3))
        || subject.tensors.contains_key(&format!("{}.weight_packed", linear.name))
}

/// Loaders convert by value: codes stored as I8 or scales stored as U8 load without an error and are
/// garbage.
fn dtypes(subject: &Subject, findings: &mut Findings) {
    for linear in subject.linears() {
        let names = subject.names(&linear.name);
        let expected = match subject.schemes.of_module(&linear.name) {
            LinearScheme::Plain => vec![],
            LinearScheme::Nvfp4 { .. } => vec![
                (names.codes, Dtype::U8),
                (names.scales, Dtype::F8_E4M3),
                (names.weight_global, Dtype::F32),
                (names.input_global, Dtype::F32),
            ],
            LinearScheme::Fp8 => vec![(linear.weight(), Dtype::F8_E4M3)],
        };
        for (name, dtype) in expected {
            match subject.tensors.get(&name) {
                Some(found) if found.dtype != dtype && looks_quantized(subject, &linear) => {
                    findings.error(format!("{name} is {:?}, not {dtype:?}", found.dtype))
                }
                _ => {}
            }
        }
    }
}

/// A wrong shape is a tensor of another model, or packed twice, or not at all.
fn shapes(subject: &Subject, findings: &mut Findings) {
    let Ok(model) = &subject.model else { return };
    let scalar: &[usize] = if subject.layout == Some(Layout::Modelopt) { &[] } else { &[1] };
    let mut expect = |name: &str, shape: &[usize]| {
        if let Some(found) = subject.tensors.get(name).filter(|found| found.shape != shape) {
            findings.error(format!("{name} is {:?}, config.json asks for {shape:?}", found.shape));
        }
    };
    for linear in subject.linears() {
        let names = subject.names(&linear.name);
        match (subject.schemes.of_module(&linear.name), looks_quantized(subject, &linear)) {
            (LinearScheme::Nvfp4 { .. }, true) => {
                expect(&names.codes, &[linear.rows, linear.cols / 2]);
                expect(&names.scales, &[linear.rows, linear.cols / BLOCK]);
                expect(&names.weight_global, scalar);
                expect(&names.input_global, scalar);
            }
            (LinearScheme::Plain, false) | (LinearScheme::Fp8, _) => {
                expect(&linear.weight(), &[linear.rows, linear.cols])
            }
            _ => {} // A10 compares declarations with tensors
        }
        if let Some(bias) = linear.bias() {
            expect(&bias, &[linear.rows]);
        }
    }
    for tensor in others(model) {
        expect(&tensor.name, &tensor.shape);
    }
    for (linear, _) in subject.nvfp4() {
        if linear.cols % BLOCK != 0 {
            findings
                .error(format!("{}: {} input features are not a multiple of 16", linear.name, linear.cols));
        }
    }
    // The outputs of attention and MLP are cut along their inputs; kernels want whole blocks of 32 on every GPU.
    let mut seen = BTreeSet::new();
    for linear in model.layers.iter().flat_map(outputs).filter(|linear| seen.insert(linear.cols)) {
        let odd: Vec<usize> = [2, 4, 8].into_iter().filter(|tp| linear.cols % (tp * 32) != 0).collect();
        if !odd.is_empty() && subject.schemes.of_module(&linear.name) != LinearScheme::Plain {
            findings.warn(format!(
                "{}: {} input features don't split into blocks of 32 over {odd:?} GPUs",
                linear.name, linear.cols
            ));
        }
    }
}

/// The linears that write to the residual stream.
fn outputs(layer: &Layer) -> impl Iterator<Item = &LinearSpec> {
    let mixers = layer.blocks.iter().flat_map(|block| &block.mixers);
    mixers.map(|mixer| match mixer {
        Mixer::Attention(attention) => &layer.linears[attention.output],
        Mixer::Mlp(mlp) => &layer.linears[mlp.output],
    })
}

/// Tensors that are never quantized.
fn others(model: &Model) -> Vec<TensorSpec> {
    let plain = model.layers.iter().flat_map(Layer::plain_tensors);
    std::iter::once(model.embedding.clone()).chain(plain).chain(model.tail_tensors()).collect()
}

/// Declarations and tensors that disagree stop the load, or leave a linear with the wrong kernel.
fn ignored_is_plain(subject: &Subject, findings: &mut Findings) {
    let linears = subject.linears();
    for linear in &linears {
        let declared = subject.schemes.of_module(&linear.name) != LinearScheme::Plain;
        match (declared, looks_quantized(subject, linear)) {
            (true, false) => {
                findings.error(format!("{} is plain, the configuration does not ignore it", linear.name))
            }
            (false, true) => {
                findings.error(format!("{} is quantized, the configuration ignores it", linear.name))
            }
            _ => {}
        }
    }
    for fused in subject.layers().iter().flat_map(Layer::fused) {
        let schemes: Vec<LinearScheme> = fused.iter().map(|l| subject.schemes.of_module(&l.name)).collect();
        if schemes.iter().any(|scheme| *scheme != schemes[0]) {
            findings.error(format!("{} and the linears fused with it have different schemes", fused[0].name));
        }
    }
    for pattern in &subject.schemes.idle {
        findings.warn(format!("{pattern:?} in ignore matches no linear"));
    }
    let is_plain = |module: &&String| subject.tensors.contains_key(&format!("{module}.weight"));
    let unreached: Vec<&String> = subject.schemes.unreached.iter().filter(is_plain).collect();
    if let Some(first) = unreached.first() {
        let text = format!(
            "{} modules beside the decoder are plain, and ignore does not reach them; {first} is the first",
            unreached.len()
        );
        // Other programs may list linears alone, by full names, and embeddings are no linears.
        if subject.ours { findings.error(text) } else { findings.warn(text) }
    }
    if subject.schemes.count().is_empty() {
        findings.warn("the configuration quantizes no linear");
    }
}

/// The names of a layer's cache scales, key and value.
fn cache_names(layout: Option<Layout>, layer: &Layer) -> [String; 2] {
    let prefix = format!("{}self_attn", layer.prefix);
    match layout {
        Some(Layout::Modelopt) => [format!("{prefix}.k_proj.k_scale"), format!("{prefix}.v_proj.v_scale")],
        _ => [format!("{prefix}.k_scale"), format!("{prefix}.v_scale")],
    }
}

/// Whether there are cache scales, or a declaration of some.
fn has_cache_scales(subject: &Subject) -> bool {
    let second =
        crate::verify::subject::object(&subject.dir.join("hf_quant_config.json")).unwrap_or_default();
    let algorithm = second.get("quantization").map_or(&Value::Null, |q| &q["kv_cache_quant_algo"]);
    let named = |name: &String| name.ends_with(".k_scale") || name.ends_with(".v_scale");
    !subject.quantization()["kv_cache_scheme"].is_null()
        || (subject.layout == Some(Layout::Modelopt) && !algorithm.is_null())
        || subject.tensors.keys().any(named)
}

/// Layers with and without cache scales; a scale that can't be used counts as a finding.
fn count_cache_scales(subject: &Subject, findings: &mut Findings) -> (usize, usize) {
    let (mut with, mut without) = (0, 0);
    for layer in subject.layers() {
        for name in cache_names(subject.layout, layer) {
            match subject.tensors.get(&name) {
                None => without += 1,
                Some(found) => {
                    with += 1;
                    let elements: usize = found.shape.iter().product();
                    let value = subject.map(&name).and_then(|map| scalar_of(found.dtype, &map));
                    if elements != 1 || !value.is_some_and(|value| value.is_finite() && value > 0.0) {
                        findings.error(format!("{name} is not one positive number"));
                    }
                }
            }
        }
    }
    (with, without)
}

fn scalar_of(dtype: Dtype, bytes: &[u8]) -> Option<f32> {
    match (dtype, bytes) {
        (Dtype::F32, bytes) => Some(f32::from_le_bytes(bytes.try_into().ok()?)),
        (Dtype::BF16, &[low, high]) => Some(half::bf16::from_le_bytes([low, high]).to_f32()),
        (Dtype::F16, &[low, high]) => Some(half::f16::from_le_bytes([low, high]).to_f32()),
        _ => None,
    }
}

/// A layer without scales runs its cache at 1.0 beside layers that are calibrated.
fn cache_scales(subject: &Subject, findings: &mut Findings) {
    let declared = !subject.quantization()["kv_cache_scheme"].is_null();
    let (with, without) = count_cache_scales(subject, findings);
    match (declared, with, without) {
        (true, _, 1..) => {
            findings.error(format!("kv_cache_scheme is declared, {without} cache scales are missing"))
        }
        (false, 1.., _) => findings.error(format!("{with} cache scales, but no kv_cache_scheme")),
        _ => {}
    }
}

/// As [`cache_scales`], with two declarations; none of the scales is ModelOpt's cast mode.
fn modelopt_cache_scales(subject: &Subject, findings: &mut Findings) {
    let scheme = &subject.quantization()["kv_cache_scheme"];
    let declared = match scheme {
        Value::Null => None,
        Value::String(algorithm) => Some(algorithm.as_str()),
        scheme if scheme["num_bits"].as_u64() == Some(8) && scheme["type"] == "float" => Some("FP8"),
        _ => return findings.error(format!("kv_cache_scheme is {scheme}, which is neither FP8 nor NVFP4")),
    };
    let second =
        crate::verify::subject::object(&subject.dir.join("hf_quant_config.json")).unwrap_or_default();
    let algorithm = second.get("quantization").map_or(&Value::Null, |q| &q["kv_cache_quant_algo"]);
    if declared != algorithm.as_str() {
        findings
            .error("kv_cache_scheme in config.json and kv_cache_quant_algo in hf_quant_config.json disagree");
    }
    if declared == Some("NVFP4") {
        findings.warn("the KV cache is NVFP4: engines that know FP8 caches only refuse it or ignore it");
    }
    let (with, without) = count_cache_scales(subject, findings);
    match (declared, with, without) {
        (Some(_), 0, _) => findings.warn("a quantized KV cache without scales: engines use 1.0"),
        (Some(_), _, 1..) => findings.error(format!("{without} cache scales are missing")),
        (None, 1.., _) => findings.error(format!("{with} cache scales, but no kv_cache_scheme")),
        _ => {}
    }
}

/// An unknown name stops vLLM's load.
fn known(subject: &Subject, findings: &mut Findings) {
    let Ok(model) = &subject.model else { return };
    let mut known: BTreeSet<String> = others(model).into_iter().map(|tensor| tensor.name).collect();
    known.insert(model.head_weight()); // A15 judges it
    for linear in subject.linears() {
        known.insert(linear.weight());
        known.extend(linear.bias());
        known.extend(FOREIGN.iter().map(|suffix| format!("{}.{suffix}", linear.name))); // A3, B3 and A10 judge them
    }
    for layer in &model.layers {
        for layout in [Layout::Modelopt, Layout::CompressedTensors] {
            known.extend(cache_names(Some(layout), layer));
        }
        known.insert(format!("{}self_attn.rotary_emb.inv_freq", layer.prefix));
    }
    let unknown = |name: &&String| !known.contains(*name) && !model.is_carried(name);
    for name in subject.tensors.keys().filter(unknown) {
        findings.error(format!("{name} is unknown to {}", model.architecture));
    }
}

/// Norms and embeddings in another dtype cost memory or fail; a separate lm_head beside tied embeddings is
/// taken by some loaders and not by others.
fn unquantized(subject: &Subject, findings: &mut Findings) {
    let Ok(model) = &subject.model else { return };
    for tensor in others(model) {
        match subject.tensors.get(&tensor.name) {
            None => findings.error(format!("{} is missing", tensor.name)),
            Some(found) => {
                let source = subject.source.as_ref().and_then(|source| source.tensors.get(&tensor.name));
                let float = matches!(found.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
                if !float {
                    findings.error(format!("{} is {:?}, not BF16, F16 or F32", tensor.name, found.dtype));
                } else if let Some(source) = source.filter(|source| source.dtype != found.dtype) {
                    let (name, here, there) = (&tensor.name, found.dtype, source.dtype);
                    findings.error(format!("{name} is {here:?}, and {there:?} in the source"));
                }
            }
        }
    }
    if model.tied && subject.tensors.contains_key(&model.head_weight()) {
        findings.error(format!("embeddings are tied, yet there is an {}", model.head_weight()));
    }
}
