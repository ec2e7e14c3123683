//! Finds the linears that stay in their source dtype, and how config.json of the output names them.

use std::collections::BTreeSet;

use regex::Regex;

use crate::checkpoint::Layout;
use crate::error::{Error, Result};
use crate::model::Model;

/// The linears that `patterns` leave unquantized, lm_head always among them. `carried` are the tensors beside the
/// decoder, which are never quantized: a pattern may name their modules, and changes nothing then.
///
/// A pattern is a module name in which `*` stands for anything, or `re:` and a regular expression that
/// matches from the start, as in compressed-tensors.
///
/// # Errors
/// Exit code 2: a bad expression, a pattern that matches nothing, a fused group matched in part.
pub fn ignored_modules(
    model: &Model,
    carried: &BTreeSet<&str>,
    patterns: &[String],
) -> Result<BTreeSet<String>> {
    let modules: Vec<&str> =
        model.linears().map(|linear| linear.name.as_str()).chain([model.head.as_str()]).collect();
    let mut ignored = BTreeSet::from([model.head.clone()]);
    for pattern in patterns {
        let expression = expression(pattern)?;
        let matched: Vec<&&str> = modules.iter().filter(|name| expression.is_match(name)).collect();
        let beside = || carried.iter().filter_map(|name| name.rsplit_once('.'));
        if matched.is_empty() && !beside().any(|(module, _)| expression.is_match(module)) {
            let example = modules.first().unwrap_or(&"model.layers.0.mlp.down_proj");
            return Err(Error::usage(format!("--ignore {pattern:?} matches no linear"))
                .fix(format!("write full module names like {example}, with * for any part")));
        }
        ignored.extend(matched.into_iter().map(|name| name.to_string()));
    }
    for fused in model.layers.iter().flat_map(|layer| layer.fused()) {
        let names: Vec<&str> = fused.iter().map(|linear| linear.name.as_str()).collect();
        let hit = names.iter().filter(|name| ignored.contains(**name)).count();
        if hit != 0 && hit != names.len() {
            return Err(Error::usage(format!("--ignore leaves out a part of {}", names.join(", ")))
                .fix("ignore all of them or none: engines merge them into one matrix"));
        }
    }
    Ok(ignored)
}

/// What `ignore` in config.json says of the modules `ignored`: their names, and of a wrapped decoder more.
///
/// Engines name the modules of a class around the decoder otherwise than its files do, and each otherwise than the
/// next. There the list has, beside each name, a pattern of the end that all names share, and a pattern for each of the
/// modules around the decoder that the `carried` tensors belong to.
pub fn entries(
    model: &Model,
    carried: &BTreeSet<&str>,
    ignored: &BTreeSet<String>,
    layout: Layout,
) -> Vec<String> {
    let mut entries: BTreeSet<String> = ignored.iter().cloned().chain(stand_ins(model, ignored)).collect();
    if model.is_wrapped {
        let of_decoder = |name: &String| {
            let end = name.strip_prefix(&model.prefix).or(name.rsplit('.').next()).unwrap_or(name);
            layout.ignoring_names_that_end(end)
        };
        let of_decoder: Vec<String> = entries.iter().map(of_decoder).collect();
        entries.extend(of_decoder);
        entries.extend(towers(carried).into_iter().map(|tower| layout.ignoring_names_with(tower)));
    }
    if layout == Layout::Modelopt {
        // ModelOpt lists the embedding too: it is a module that its wildcards would reach.
        entries.insert(model.embedding_module());
    }
    entries.into_iter().collect()
}

/// The modules that engines build beside those `ignored`, although the model has no such linear: where v is what k's
/// linear gives, engines merge q, k and v all the same.
fn stand_ins(model: &Model, ignored: &BTreeSet<String>) -> Vec<String> {
    let values = model.layers.iter().flat_map(|layer| layer.values_from_keys());
    values.filter(|(key, _)| ignored.contains(key)).map(|(_, value)| value).collect()
}

/// The outermost modules around the decoder that have tensors, such as `vision_tower`.
fn towers<'a>(carried: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
    let tower = |name: &&'a str| {
        // These two names are the decoder's as well.
        let around = ["model.", "language_model."];
        let mut inner = *name;
        while let Some(rest) = around.iter().find_map(|part| inner.strip_prefix(part)) {
            inner = rest;
        }
        inner.split_once('.').map(|(tower, _)| tower)
    };
    carried.iter().filter_map(tower).collect()
}

fn expression(pattern: &str) -> Result<Regex> {
    let source = match pattern.strip_prefix("re:") {
        Some(source) => format!("^(?:{source})"),
        None => format!("^{}$", regex::escape(pattern).replace(r"\*", ".*")),
    };
    Regex::new(&source).map_err(|error| {
        Error::usage(format!("--ignore {pattern:?}: {error}"))
            .fix("write a valid regular expression after re:")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::{Declared, LinearScheme};

    fn model() -> Model {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_hidden_layers": 12, "vocab_size": 100
        });
        Model::parse(config.as_object().unwrap(), &|_| false).unwrap()
    }

    fn ignored(patterns: &[&str]) -> Result<BTreeSet<String>> {
        let patterns: Vec<String> = patterns.iter().map(|pattern| pattern.to_string()).collect();
        ignored_modules(&model(), &BTreeSet::new(), &patterns)
    }

    #[test]
    fn lm_head_is_always_left_alone() {
        assert_eq!(ignored(&[]).unwrap().into_iter().collect::<Vec<_>>(), ["lm_head"]);
        assert_eq!(ignored(&["lm_head"]).unwrap().len(), 1);
    }

    #[test]
    fn a_layer_pattern_does_not_reach_other_layers() {
        let names = ignored(&["model.layers.1.self_attn.*"]).unwrap();
        assert_eq!(names.len(), 5);
        assert!(names.iter().all(|name| name == "lm_head" || name.starts_with("model.layers.1.")));
    }

    #[test]
    fn expressions_match_from_the_start() {
        assert_eq!(ignored(&[r"re:.*\.down_proj"]).unwrap().len(), 13);
        assert!(ignored(&["re:down_proj"]).is_err());
    }

    #[test]
    fn bad_patterns_are_named() {
        for pattern in ["*.q_proj", "re:*", "model.layers.99.*", "gate"] {
            let error = ignored(&[pattern]).unwrap_err();
            assert_eq!(error.exit, crate::error::ExitCode::Usage);
            assert!(error.to_string().contains("--ignore"), "{error}");
        }
    }

    #[test]
    fn a_decoder_alone_lists_names() {
        let (model, ignored) = (model(), ignored(&["model.layers.1.mlp.down_proj"]).unwrap());
        let listed = |layout| entries(&model, &BTreeSet::new(), &ignored, layout);
        assert_eq!(listed(Layout::CompressedTensors), ["lm_head", "model.layers.1.mlp.down_proj"]);
        let with_embedding = ["lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"];
        assert_eq!(listed(Layout::Modelopt), with_embedding);
    }

    /// Names of the same modules in files, in Transformers and in vLLM.
    const DOWN: [&str; 3] = [
        "language_model.model.layers.1.mlp.down_proj",
        "model.language_model.layers.1.mlp.down_proj",
        "language_model.model.layers.1.mlp.down_proj",
    ];

    #[test]
    fn a_wrapped_decoder_lists_what_every_engine_finds() {
        let mut model = model();
        (model.is_wrapped, model.prefix) = (true, "language_model.model.".into());
        model.head = "language_model.lm_head".into();
        let carried = [
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            "model.multi_modal_projector.linear_1.weight",
            "image_newline",
        ];
        let carried = BTreeSet::from(carried);
        let ignored = BTreeSet::from([model.head.clone(), DOWN[0].to_string()]);
        for layout in [Layout::CompressedTensors, Layout::Modelopt] {
            let listed = entries(&model, &carried, &ignored, layout);
            let config = json!({"quantization_config": {
                "ignore": listed, "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
            }});
            let plain = [
                "lm_head",
                "language_model.lm_head",
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
                "model.vision_tower.encoder.layers.0.mlp.fc1",
                "multi_modal_projector.linear_1",
                "model.multi_modal_projector.linear_1",
            ];
            let quantized = ["model.language_model.layers.11.mlp.down_proj", "model.layers.2.mlp.down_proj"];
            let all = [&plain[..], &DOWN, &quantized].concat().into_iter().map(str::to_string);
            let all: Vec<String> = all.collect();
            let declared = Declared::of(Some(layout), config.as_object().unwrap(), &all, &[]);
            for name in plain.iter().chain(&DOWN) {
                assert_eq!(declared.of_module(name), LinearScheme::Plain, "{layout} {name}: {listed:?}");
            }
            for name in quantized {
                assert_ne!(declared.of_module(name), LinearScheme::Plain, "{layout} {name}: {listed:?}");
            }
            assert_eq!(listed.len(), if layout == Layout::Modelopt { 7 } else { 6 }, "{listed:?}");
        }
    }

    #[test]
    fn modules_beside_the_decoder_may_be_named() {
        let carried = BTreeSet::from(["visual.blocks.0.mlp.fc1.weight"]);
        let named = |pattern: &str| ignored_modules(&model(), &carried, &[pattern.to_string()]);
        assert_eq!(named("re:.*visual.*").unwrap().len(), 1);
        assert!(named("re:.*audio.*").is_err());
    }
}
