//! config.json against the source's.
//!
//! distq carries the source's fields over as they stand. Other programs write config.json anew with the Transformers
//! of their day, which renames fields and leaves out, or writes out, what is the default: there, what fields mean is
//! compared.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::model::Model;
use crate::verify::Findings;
use crate::verify::subject::Subject;

/// A field of another model left in config.json is another model.
pub(in crate::verify) fn check(subject: &Subject, findings: &mut Findings) {
    let (Some(source), Ok(config)) = (&subject.source, &subject.config) else { return };
    if subject.ours {
        let plain = |config: &Map<String, Value>| config.clone().into_iter().collect();
        differences(&plain(config), &plain(&source.config))
            .into_iter()
            .for_each(|(text, _)| findings.error(text));
        return;
    }
    for (text, one_side) in differences(&meaning(config), &meaning(&source.config)) {
        // A field that only one of them has may be the other's default.
        if one_side { findings.warn(text) } else { findings.error(text) }
    }
    let has = |name: &str| source.tensors.contains_key(name);
    if let (Ok(here), Ok(there)) = (Model::parse(config, &has), Model::parse(&source.config, &has))
        && here != there
    {
        findings.error("config.json describes another model than the source's");
    }
}

type Fields = BTreeMap<String, Value>;

/// What differs, and whether only one side has it.
fn differences(here: &Fields, there: &Fields) -> Vec<(String, bool)> {
    let keys: BTreeSet<&String> = here.keys().chain(there.keys()).collect();
    let differing = keys.into_iter().filter(|key| *key != "quantization_config").filter_map(|key| {
        let (mine, theirs) = (here.get(key), there.get(key));
        if mine.unwrap_or(&Value::Null) == theirs.unwrap_or(&Value::Null) {
            return None;
        }
        let text = |value: Option<&Value>| value.map_or("absent".to_string(), Value::to_string);
        let said = format!("{key} is {}, and {} in the source", text(mine), text(theirs));
        Some((said, mine.is_none() || theirs.is_none()))
    });
    differing.collect()
}

/// What Transformers takes for a field that is absent, in the families that distq knows. All of them can be written
/// out by one version and left out by another without changing the model.
fn defaults() -> [(&'static str, Value); 18] {
    [
        ("attention_bias", json!(false)),
        ("attention_dropout", json!(0.0)),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
        ("hidden_act", json!("silu")),
        ("initializer_range", json!(0.02)),
        ("is_decoder", json!(false)),
        ("mlp_bias", json!(false)),
        ("output_attentions", json!(false)),
        ("output_hidden_states", json!(false)),
        ("pretraining_tp", json!(1)),
        ("return_dict", json!(true)),
        ("rms_norm_eps", json!(1e-6)),
        ("tie_word_embeddings", json!(false)),
        ("use_cache", json!(true)),
        ("chunk_size_feed_forward", json!(0)),
        ("is_encoder_decoder", json!(false)),
        ("problem_type", Value::Null),
    ]
}

/// Fields that say which program wrote the file, not which model it is.
const PROVENANCE: [&str; 2] = ["transformers_version", "quantization_config"];

/// The fields in one spelling: what is absent, null or the default left out, numbers as floating-point, dtype and
/// rotary embedding under the names of Transformers 5.
fn meaning(config: &Map<String, Value>) -> Fields {
    let mut all = Fields::new();
    for (part, fields) in config.iter().filter(|(name, _)| PARTS.contains(&name.as_str())) {
        let inside = fields.as_object().map(meaning).unwrap_or_default();
        all.extend(inside.into_iter().map(|(name, value)| (format!("{part}.{name}"), value)));
    }
    let own = config.iter().filter(|(name, _)| !PARTS.contains(&name.as_str()));
    all.extend(meaning_alone(own));
    all
}

/// Objects in config.json that have the fields of a part of the model.
const PARTS: [&str; 3] = ["text_config", "vision_config", "audio_config"];

/// The same of fields that stand beside each other.
fn meaning_alone<'a>(config: impl Iterator<Item = (&'a String, &'a Value)>) -> Fields {
    let mut fields: Fields = config
        .filter(|(key, value)| {
            !value.is_null() && !PROVENANCE.contains(&key.as_str()) && !key.starts_with('_')
        })
        .map(|(key, value)| (key.clone(), number(value)))
        .collect();
    if let Some(dtype) = fields.remove("torch_dtype") {
        fields.entry("dtype".into()).or_insert(dtype);
    }
    rope(&mut fields);
    let count = |name: &str| fields.get(name).and_then(Value::as_f64);
    let heads = count("num_attention_heads");
    let head_dim = count("hidden_size").zip(heads).map(|(hidden, heads)| hidden / heads);
    let computed = [("num_key_value_heads", heads), ("head_dim", head_dim)];
    let computed = computed.map(|(name, value)| (name, value.map_or(Value::Null, |value| json!(value))));
    for (name, default) in defaults().into_iter().chain(computed) {
        if fields.get(name).is_some_and(|value| *value == number(&default)) {
            fields.remove(name);
        }
    }
    fields
}

/// `rope_theta`, `rope_scaling` and `rope_parameters` as one field without defaults.
fn rope(fields: &mut Fields) {
    let theta = fields.remove("rope_theta");
    let (older, newer) = (fields.remove("rope_scaling"), fields.remove("rope_parameters"));
    let Some(Value::Object(mut rope)) = newer.or(older).or(Some(json!({}))) else { return };
    rope.retain(|_, value| !value.is_null());
    if let Some(theta) = theta {
        rope.entry("rope_theta").or_insert(theta);
    }
    if let Some(kind) = rope.remove("type") {
        rope.entry("rope_type").or_insert(kind);
    }
    for (name, default) in [("rope_type", json!("default")), ("rope_theta", json!(10_000.0))] {
        if rope.get(name) == Some(&default) {
            rope.remove(name);
        }
    }
    fields.extend(rope.into_iter().map(|(name, value)| (format!("rope_parameters.{name}"), value)));
}

/// A value with its numbers as floating-point, and a list of one for its element.
fn number(value: &Value) -> Value {
    match value {
        Value::Number(n) => n.as_f64().map_or_else(|| value.clone(), |x| json!(x)),
        Value::Array(items) if items.len() == 1 && items[0].is_number() => number(&items[0]),
        Value::Array(items) => items.iter().map(number).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), number(value))).collect(),
        _ => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What differs by meaning between two configurations.
    fn differing(here: Value, there: Value) -> Vec<(String, bool)> {
        differences(&meaning(here.as_object().unwrap()), &meaning(there.as_object().unwrap()))
    }

    #[test]
    fn spellings_of_one_model_are_equal() {
        let old = json!({
            "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 500000, "torch_dtype": "bfloat16",
            "rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1.0}, "eos_token_id": [5],
            "transformers_version": "4.40.0", "_name_or_path": "x", "pad_token_id": null
        });
        let new = json!({
            "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "rope_theta": 5e5},
            "dtype": "bfloat16", "eos_token_id": 5, "transformers_version": "5.17.0", "use_cache": true,
            "attention_bias": false, "rms_norm_eps": 1e-6
        });
        assert_eq!(differing(new, old), []);
        let plain = json!({"rope_scaling": null});
        let written = json!({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}});
        assert_eq!(differing(plain, written), []);
    }

    #[test]
    fn another_value_is_a_difference_in_any_spelling() {
        for (here, there) in [
            (json!({"rope_theta": 1e4}), json!({"rope_parameters": {"rope_theta": 5e5}})),
            (json!({"rope_scaling": {"type": "linear"}}), json!({"rope_parameters": {"rope_type": "yarn"}})),
            (json!({"head_dim": 32}), json!({"hidden_size": 64, "num_attention_heads": 4})),
            (json!({"dtype": "float16"}), json!({"torch_dtype": "bfloat16"})),
            (json!({"rms_norm_eps": 1e-5}), json!({})),
            (json!({"eos_token_id": [2, 3]}), json!({"eos_token_id": 2})),
        ] {
            assert_ne!(differing(here.clone(), there.clone()), [], "{here} {there}");
        }
        let text = |value: Value| json!({"text_config": value});
        let old = text(json!({"torch_dtype": "bfloat16", "rope_theta": 1e6, "attention_bias": false}));
        let new = text(json!({"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000}}));
        assert_eq!(differing(old, new), []);
        let another = differing(text(json!({"vocab_size": 5})), text(json!({"vocab_size": 6})));
        assert_eq!(another[0].0, "text_config.vocab_size is 5.0, and 6.0 in the source");
        let both = differing(json!({"vocab_size": 5}), json!({"vocab_size": 6}));
        assert_eq!(both, [("vocab_size is 5.0, and 6.0 in the source".to_string(), false)]);
    }
}
