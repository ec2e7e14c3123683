//! Mistral: Llama with a sliding window and no biases; in the third generation YaRN, and queries that grow with their
//! position.

use serde_json::json;

use super::Family;
use crate::error::Result;
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, KvHeads};
use crate::model::form::{Form, Temperature};
use crate::model::rope::{Rope, RopeOptions, parameters};

/// `MistralForCausalLM`: no biases, a sliding window.
pub const MISTRAL: Family =
    Family { architectures: &["MistralForCausalLM"], model_types: &["mistral"], form: mistral };

/// `Ministral3ForCausalLM`, alone or inside of `Mistral3ForConditionalGeneration`.
pub const MINISTRAL3: Family =
    Family { architectures: &["Ministral3ForCausalLM"], model_types: &["ministral3"], form: ministral3 };

fn mistral(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        max_positions: 4096 * 32,
        kv_heads: KvHeads::Count(8),
        ..Defaults::LLAMA
    })?;
    // A null switches the window off.
    let window = config.text.count_or("sliding_window", Some(4096))?;
    config.activation("hidden_act", &["silu"])?;
    sizes.llama(config, |_, attention, _| attention.window = window)
}

fn ministral3(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        max_positions: 262_144,
        kv_heads: KvHeads::Count(8),
        head_dim: Some(128),
        eps: 1e-5,
        theta: 1e6,
        ..Defaults::LLAMA
    })?;
    let window = config.text.count_or("sliding_window", None)?;
    config.activation("hidden_act", &["silu"])?;
    let absent = json!({
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    });
    let options = RopeOptions { absent: absent.clone(), ..sizes.rope() };
    let given = parameters(&config.text)?;
    let number = |name: &str| given.map_or(&absent[name], |given| &given.map[name]).as_f64();
    let has = |name: &str| given.is_none_or(|given| given.map.contains_key(name));
    let beta = has("llama_4_scaling_beta").then(|| number("llama_4_scaling_beta")).flatten().unwrap_or(0.0);
    let original = has("original_max_position_embeddings")
        .then(|| number("original_max_position_embeddings"))
        .flatten()
        .map_or(sizes.max_positions, |positions| positions as usize);
    let rope = Rope::read(config, &sizes, &options)?;
    let temperature = (beta != 0.0).then_some(Temperature { beta: beta as f32, positions: original.max(1) });
    let form = sizes.model(vec![rope], |_| {
        let mut attention = sizes.attention();
        (attention.window, attention.has_temperature) = (window, temperature.is_some());
        Ok(sizes.llama_layer(attention, sizes.mlp()))
    })?;
    Ok(Form { temperature, ..form })
}
