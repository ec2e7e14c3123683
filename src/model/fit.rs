//! Whether a checkpoint's tensors are those of the model that its config.json describes; where they are not, which of
//! its fields is wrong.

use safetensors::Dtype;
use serde_json::Value;

use super::config::ModelConfig;
use super::tensors::TensorSpec;
use crate::checkpoint::{Checkpoint, Entry};
use crate::error::{Error, Result, quoted};

const LM_HEAD: &str = "lm_head.weight";
const REMEDY: &str = "correct config.json, or use the one that belongs to these weights";

impl ModelConfig {
    /// The model that a checkpoint's config.json describes.
    ///
    /// # Errors
    /// As [`ModelConfig::parse`], naming the file.
    pub fn of(checkpoint: &Checkpoint) -> Result<ModelConfig> {
        ModelConfig::parse(&checkpoint.config).map_err(|error| error.file(checkpoint.dir.join("config.json")))
    }

    /// Where a tensor of this model lies.
    ///
    /// # Errors
    /// Exit code 3, naming the field of config.json where one explains it: the tensor is missing, or has another shape
    /// or dtype.
    pub fn stored<'a>(&self, checkpoint: &'a Checkpoint, spec: &TensorSpec) -> Result<&'a Entry> {
        let entry =
            checkpoint.entry(&spec.name).map_err(|error| match checkpoint.is_listed_in_vain(&spec.name) {
                true => error,
                false => self.missing(checkpoint, spec).unwrap_or(error),
            })?;
        let file = &checkpoint.files[entry.file];
        if entry.shape != spec.shape {
            let fields = self.fields_of(&spec.name).map_or(String::new(), |[rows, cols]| {
                let differ = |axis: usize| entry.shape.get(axis) != spec.shape.get(axis);
                let names: Vec<&str> = [rows, cols]
                    .into_iter()
                    .enumerate()
                    .filter(|(i, _)| differ(*i))
                    .map(|(_, name)| name)
                    .collect();
                format!(" ({})", names.join("; "))
            });
            let what = format!("the shape is {:?}, config.json says {:?}{fields}", entry.shape, spec.shape);
            return Err(Error::input(what).file(file).tensor(&spec.name).fix(REMEDY));
        }
        if !matches!(entry.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) {
            return Err(Error::input(format!("the dtype is {:?}", entry.dtype))
                .file(file)
                .tensor(&spec.name)
                .fix("use a checkpoint in BF16, F16 or F32"));
        }
        Ok(entry)
    }

    /// The fields of config.json that say how many rows and columns a tensor has.
    fn fields_of(&self, name: &str) -> Option<[&'static str; 2]> {
        let module = name.strip_suffix(".weight").or(name.strip_suffix(".bias"))?.rsplit('.').next()?;
        let (queries, keys) = ("num_attention_heads times head_dim", "num_key_value_heads times head_dim");
        Some(match module {
            "embed_tokens" | "lm_head" => ["vocab_size", "hidden_size"],
            "q_proj" => [queries, "hidden_size"],
            "k_proj" | "v_proj" => [keys, "hidden_size"],
            "o_proj" => ["hidden_size", queries],
            "gate_proj" | "up_proj" => ["intermediate_size", "hidden_size"],
            "down_proj" => ["hidden_size", "intermediate_size"],
            _ => ["hidden_size", "hidden_size"],
        })
    }

    /// Why config.json asks for a tensor that is missing, where it can be told.
    fn missing(&self, checkpoint: &Checkpoint, spec: &TensorSpec) -> Option<Error> {
        let tensors = &checkpoint.tensors;
        let stored = stored_layers(checkpoint);
        let (what, fix) = if layer_of(&spec.name).is_some_and(|layer| layer >= stored && stored > 0) {
            let what = format!(
                "the tensor is missing: num_hidden_layers is {} in config.json, and the weights have {stored} layers",
                self.layers
            );
            (
                what,
                format!(
                    "set num_hidden_layers to {stored} in config.json, or download the shards that are missing"
                ),
            )
        } else if spec.name == LM_HEAD {
            let what = "the tensor is missing, and tie_word_embeddings in config.json does not say that the embedding \
                        takes its place";
            (what.to_string(), "set tie_word_embeddings to true if the model has no lm_head of its own, or download the shard that is missing".to_string())
        } else if spec.name.ends_with(".bias") {
            let field = bias_field(&spec.name);
            (
                format!("the tensor is missing, and {field} is true in config.json"),
                format!("set {field} to false if the model has no such biases"),
            )
        } else {
            let plain = spec.name.strip_prefix("model.")?;
            let other = ["", "language_model.model.", "model.language_model.", "base_model.model.model."];
            let prefix =
                other.into_iter().find(|prefix| tensors.contains_key(&format!("{prefix}{plain}")))?;
            let what = format!("the tensor is missing: the weights call it {prefix}{plain}");
            (
                what,
                format!(
                    "save the model on its own, as {}: (cd {} && python3 -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('.', dtype='auto').save_pretrained('SAVED')\")",
                    self.family.name(),
                    quoted(&checkpoint.dir.display().to_string())
                ),
            )
        };
        Some(Error::input(what).file(&checkpoint.dir).tensor(&spec.name).fix(fix))
    }

    /// Why a tensor is stored that this model does not have.
    pub fn beyond(&self, checkpoint: &Checkpoint, name: &str) -> Error {
        let config = |field: &str| match checkpoint.config.get(field) {
            None => "is absent".to_string(),
            Some(value) => format!("is {value}"),
        };
        let stored = stored_layers(checkpoint);
        let module = name.strip_suffix(".bias").unwrap_or_default();
        let of_layer = self.groups(0).into_iter().flat_map(|group| group.members);
        let is_linear =
            |own: &str| module.rsplit_once('.').is_some_and(|(_, last)| own.ends_with(&format!(".{last}")));
        let (why, fix) = if layer_of(name).is_some_and(|layer| layer >= self.layers) {
            let why = format!(
                "num_hidden_layers is {} in config.json, and the weights have {stored} layers",
                self.layers
            );
            (
                why,
                format!(
                    "set num_hidden_layers to {stored} in config.json, or remove the weights of the layers beyond"
                ),
            )
        } else if layer_of(name).is_some() && of_layer.into_iter().any(|own| is_linear(&own.name)) {
            let field = bias_field(name);
            let why = format!("{field} {} in config.json, and the weights have biases", config(field));
            let output =
                if field == "attention_bias" { ".self_attn.o_proj.bias" } else { ".mlp.down_proj.bias" };
            let all = checkpoint.tensors.keys().any(|name| name.ends_with(output));
            let fix = match (all, self.family.has_bias_fields()) {
                (true, true) => format!("set {field} to true in config.json"),
                (true, false) => format!(
                    "{} has no biases; LlamaForCausalLM has them where {field} is true",
                    self.family.name()
                ),
                (false, _) => format!(
                    "use the config.json that belongs to these weights: some linears have biases and others none, which {field} can't say; Qwen2 has such"
                ),
            };
            (why, fix)
        } else {
            (
                format!("{} has no such tensor", self.family.name()),
                "use a checkpoint of a plain decoder, without adapters or extra heads; if it is one, architectures in \
                 config.json names another than these weights have"
                    .to_string(),
            )
        };
        let file =
            checkpoint.tensors.get(name).map_or(&checkpoint.dir, |entry| &checkpoint.files[entry.file]);
        Error::input(why).file(file).tensor(name).fix(fix)
    }

    /// What of this model is read in a way that is not plain from config.json, for the user to know. Reads lm_head where
    /// a tied model has one.
    ///
    /// # Errors
    /// Exit code 3 where a tied model has an lm_head of its own, which loaders treat differently.
    pub fn oddities(&self, checkpoint: &Checkpoint) -> Result<Vec<String>> {
        let mut notes = vec![];
        let set = |name: &str| match checkpoint.config.get(name) {
            Some(Value::Object(fields)) => !fields.is_empty(),
            _ => false,
        };
        if set("rope_parameters") && set("rope_scaling") {
            notes.push("config.json has rope_scaling beside rope_parameters: it takes their place, as in Transformers 5".into());
        }
        if self.tie_embeddings
            && let Some(head) = checkpoint.tensors.get(LM_HEAD)
        {
            if !checkpoint.same_bytes(LM_HEAD, &self.embedding().name)? {
                let what = "tie_word_embeddings is true in config.json, but the stored lm_head is not the embedding: \
                            Transformers 5 would use it, vLLM the embedding in its place";
                let fix = "set tie_word_embeddings to false in config.json if lm_head was trained, or remove lm_head.weight \
                           from the weights if it was not";
                return Err(Error::input(what).file(&checkpoint.files[head.file]).tensor(LM_HEAD).fix(fix));
            }
            notes.push(format!("{LM_HEAD} is ignored: it is a copy of the embedding, and the model is tied"));
        }
        Ok(notes)
    }
}

/// Whether a tensor that the model does not have may be left out: rotary frequencies, which old exports stored
/// although every loader computes them, and the lm_head of a tied model, which [`ModelConfig::oddities`] looks at.
pub fn is_dispensable(model: &ModelConfig, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (model.tie_embeddings && name == LM_HEAD)
}

fn bias_field(name: &str) -> &'static str {
    if name.contains(".mlp.") { "mlp_bias" } else { "attention_bias" }
}

/// The decoder layer whose tensor has this name.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
}

/// Decoder layers that have tensors.
fn stored_layers(checkpoint: &Checkpoint) -> usize {
    checkpoint.tensors.keys().filter_map(|name| layer_of(name)).max().map_or(0, |last| last.saturating_add(1))
}
