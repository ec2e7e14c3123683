//! Whether a checkpoint's tensors are those of the model that its config.json describes; where they are not, which of
//! its fields is wrong.

use std::collections::BTreeSet;

use safetensors::Dtype;
use serde_json::Value;

use super::description::Model;
use super::layer::{LinearSpec, TensorSpec};
use crate::checkpoint::{Checkpoint, Entry};
use crate::error::{Error, Result, quoted};

const REMEDY: &str = "correct config.json, or use the one that belongs to these weights";

impl Model {
    /// The model that a checkpoint's config.json and the names of its tensors describe.
    ///
    /// # Errors
    /// As [`Model::parse`], naming the file.
    pub fn of(checkpoint: &Checkpoint) -> Result<Model> {
        Model::parse(&checkpoint.config, &|name| checkpoint.tensors.contains_key(name))
            .map_err(|error| error.file(checkpoint.dir.join("config.json")))
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
            "q_norm" | "k_norm" => ["head_dim", "head_dim"],
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
        let stored = self.stored_layers(checkpoint);
        let (what, fix) = if self.layer_of(&spec.name).is_some_and(|layer| layer >= stored && stored > 0) {
            let what = format!(
                "the tensor is missing: num_hidden_layers is {} in config.json, and the weights have {stored} layers",
                self.layers.len()
            );
            (
                what,
                format!(
                    "set num_hidden_layers to {stored} in config.json, or download the shards that are missing"
                ),
            )
        } else if spec.name == self.head_weight() {
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
                    self.architecture,
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
        let stored = self.stored_layers(checkpoint);
        let module = name.strip_suffix(".bias").unwrap_or_default();
        let of_linear = self.linears().any(|linear| linear.name == module);
        let (why, fix) = if self.layer_of(name).is_some_and(|layer| layer >= self.layers.len()) {
            let why = format!(
                "num_hidden_layers is {} in config.json, and the weights have {stored} layers",
                self.layers.len()
            );
            (
                why,
                format!(
                    "set num_hidden_layers to {stored} in config.json, or remove the weights of the layers beyond"
                ),
            )
        } else if of_linear {
            let field = bias_field(name);
            let why = format!("{field} {} in config.json, and the weights have biases", config(field));
            let mut with_biases = checkpoint.config.clone();
            with_biases.insert(field.into(), true.into());
            let explained = Model::parse(&with_biases, &|name| checkpoint.tensors.contains_key(name))
                .is_ok_and(|model| model.has_biases_of(checkpoint, name));
            let fix = match explained {
                true => format!("set {field} to true in config.json"),
                false => format!(
                    "use the config.json that belongs to these weights: {} has no biases, or has them on other \
                     linears than these",
                    self.architecture
                ),
            };
            (why, fix)
        } else {
            (
                format!("{} has no such tensor", self.architecture),
                "use a checkpoint of a plain decoder, without adapters or extra heads; if it is one, architectures in \
                 config.json names another than these weights have"
                    .to_string(),
            )
        };
        let file =
            checkpoint.tensors.get(name).map_or(&checkpoint.dir, |entry| &checkpoint.files[entry.file]);
        Error::input(why).file(file).tensor(name).fix(fix)
    }

    /// Whether a bias of this name belongs to this model, and every kind of linear that has a bias in it has one in the
    /// checkpoint, in some layer at least.
    fn has_biases_of(&self, checkpoint: &Checkpoint, name: &str) -> bool {
        let biased = || self.linears().filter_map(LinearSpec::bias);
        let kind = |name: &str| {
            let parts: Vec<&str> = name.rsplit('.').take(2).collect();
            format!(".{}.{}", parts[1], parts[0])
        };
        let kinds: BTreeSet<String> = biased().map(|bias| kind(&bias)).collect();
        let stored = |kind: &String| checkpoint.tensors.keys().any(|name| name.ends_with(kind.as_str()));
        biased().any(|bias| bias == name) && kinds.iter().all(stored)
    }

    /// Decoder layers that have tensors.
    fn stored_layers(&self, checkpoint: &Checkpoint) -> usize {
        let layers = checkpoint.tensors.keys().filter_map(|name| self.layer_of(name));
        layers.max().map_or(0, |last| last.saturating_add(1))
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
        let name = self.head_weight();
        if self.tied
            && let Some(head) = checkpoint.tensors.get(&name)
        {
            if !checkpoint.same_bytes(&name, &self.embedding.name)? {
                let what = "tie_word_embeddings is true in config.json, but the stored lm_head is not the embedding: \
                            Transformers 5 would use it, vLLM the embedding in its place";
                let fix = "set tie_word_embeddings to false in config.json if lm_head was trained, or remove lm_head.weight \
                           from the weights if it was not";
                return Err(Error::input(what).file(&checkpoint.files[head.file]).tensor(&name).fix(fix));
            }
            notes.push(format!("{name} is ignored: it is a copy of the embedding, and the model is tied"));
        }
        Ok(notes)
    }
}

/// Whether a tensor that the model does not have may be left out: rotary frequencies, which old exports stored
/// although every loader computes them, and the lm_head of a tied model, which [`Model::oddities`] looks at.
pub fn is_dispensable(model: &Model, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (model.tied && name == model.head_weight())
}

fn bias_field(name: &str) -> &'static str {
    if name.contains(".mlp.") { "mlp_bias" } else { "attention_bias" }
}
