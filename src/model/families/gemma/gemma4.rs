//! Gemma 4, dense: layers that see everything have larger heads than those that slide, and may take keys as values;
//! values are normed, scores are not scaled, and a number multiplies each layer's output.

use serde_json::{Value, json};

use super::{FOUR, root, sandwich};
use crate::backend::{Gamma, Heads, NormKind};
use crate::error::Result;
use crate::model::attention::{AttentionForm, HeadNorms, NormScope, Projections};
use crate::model::config::sizes::{Defaults, KvHeads, Sizes};
use crate::model::config::{Config, FULL, SLIDING};
use crate::model::families::Family;
use crate::model::form::{Form, HeadForm, LayerForm};
use crate::model::layer::NormForm;
use crate::model::mlp::{Function, MlpForm};
use crate::model::rope::{Rope, RopeOptions};

/// Alone or inside of `Gemma4ForConditionalGeneration`.
pub const GEMMA4: Family = Family {
    architectures: &["Gemma4ForCausalLM"],
    model_types: &["gemma4_text"],
    form: |config| {
        // Without the field there are embeddings for each layer.
        if !config.text.map.contains_key(PER_LAYER) {
            return Err(config
                .text
                .wrong(PER_LAYER, "is absent, which means 256; distq computes 0 only".into()));
        }
        gemma4(config, 512)
    },
};

/// The decoder of `Gemma4UnifiedForConditionalGeneration`.
pub const GEMMA4_UNIFIED: Family =
    Family { architectures: &[], model_types: &["gemma4_unified_text"], form: |config| gemma4(config, 1024) };

const PER_LAYER: &str = "hidden_size_per_layer_input";

fn gemma4(config: &Config<'_>, window: usize) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        heads: Some(8),
        kv_heads: KvHeads::Count(4),
        head_dim: Some(256),
        vocab: Some(262_144),
        max_positions: 131_072,
        tied: true,
        ..Defaults::LLAMA
    })?;
    for (field, harmless) in [
        (PER_LAYER, json!(0)),
        ("num_kv_shared_layers", json!(0)),
        ("enable_moe_block", json!(false)),
        ("use_double_wide_mlp", json!(false)),
    ] {
        config.refuse(field, &harmless)?;
    }
    if config.text.get("use_bidirectional_attention").and_then(Value::as_str) != Some("vision") {
        config.refuse("use_bidirectional_attention", &Value::Null)?;
    }
    let text = &config.text;
    let window = text.count_or("sliding_window", Some(window))?;
    let activation = config.activation("hidden_activation", &["gelu_pytorch_tanh"])?;
    let softcap = text.number_or("final_logit_softcapping", None)?.map(|cap| cap as f32);
    let of_pattern = |layer: usize| if (layer + 1).is_multiple_of(6) { FULL } else { SLIDING };
    let mut types = config.layer_types(sizes.layers, of_pattern)?;
    // Whatever the list says.
    types.last_mut().into_iter().for_each(|last| *last = FULL.to_string());
    let attention = Attentions::of(config, &sizes)?;
    let norm: NormForm = norm_kind(sizes.eps).into();
    let form = sizes.model(attention.ropes.clone(), |layer| {
        let attention = match types[layer] == FULL {
            true => attention.full.clone(),
            false => AttentionForm { window, ..attention.sliding.clone() },
        };
        let mlp = MlpForm { function: Function::Of(activation), ..sizes.mlp() };
        let layer = sandwich([norm, norm], FOUR, attention, mlp);
        Ok(LayerForm { scalar: Some("layer_scalar"), ..layer })
    })?;
    let head = HeadForm { softcap, ..form.head };
    Ok(Form { norm: (norm, "norm"), embedding: root(&sizes), head, ..form })
}

fn norm_kind(eps: f32) -> NormKind {
    NormKind { centers: false, gamma: Gamma::Weight, rounds_first: false, eps }
}

/// The attention of both kinds of layers, and their rotary embeddings.
struct Attentions {
    full: AttentionForm,
    sliding: AttentionForm,
    ropes: Vec<Rope>,
}

impl Attentions {
    fn of(config: &Config<'_>, sizes: &Sizes) -> Result<Attentions> {
        let text = &config.text;
        let (bias, _) = config.biases()?;
        let key_is_value = text.flag("attention_k_eq_v")?;
        let global_dim = text.count_or("global_head_dim", Some(512))?.unwrap_or(sizes.heads.dim);
        let global_kv = text.optional_count("num_global_key_value_heads")?.filter(|_| key_is_value);
        let global =
            Heads { kv_heads: global_kv.unwrap_or(sizes.heads.kv_heads), dim: global_dim, ..sizes.heads };
        let kind = norm_kind(sizes.eps);
        let of_heads = |heads: Heads, rope: usize| AttentionForm {
            scale: 1.0,
            rope: Some(rope),
            input_bias: bias,
            output_bias: bias,
            head_norms: Some(HeadNorms { kind, scope: NormScope::Head, after_rotation: false }),
            value_norm: Some(NormKind { gamma: Gamma::One, ..kind }),
            ..AttentionForm::llama(heads)
        };
        let mut full = of_heads(global, 0);
        if key_is_value {
            full.projections = Projections::KeyIsValue;
        }
        let proportional =
            json!({"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6});
        let plain = json!({"rope_type": "default", "rope_theta": 1e4});
        let options = |absent: Value, head_dim: usize| RopeOptions { absent, head_dim, ..sizes.rope() };
        let ropes = vec![
            Rope::of_kind(config, sizes, (FULL, "rope_theta"), &options(proportional, global.dim))?,
            Rope::of_kind(config, sizes, (SLIDING, "rope_theta"), &options(plain, sizes.heads.dim))?,
        ];
        Ok(Attentions { full, sliding: of_heads(sizes.heads, 1), ropes })
    }
}
