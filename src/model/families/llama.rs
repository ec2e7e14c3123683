//! Llama, and Mistral before its third generation: a norm before attention and one before the MLP.

use super::Family;
use crate::error::Result;
use crate::model::config::Config;
use crate::model::form::Form;
use crate::model::sizes::{Defaults, KvHeads};

/// `LlamaForCausalLM`: config.json says which linears have biases.
pub const LLAMA: Family =
    Family { architectures: &["LlamaForCausalLM"], model_types: &["llama"], form: llama };

/// `MistralForCausalLM`: no biases, a sliding window.
pub const MISTRAL: Family =
    Family { architectures: &["MistralForCausalLM"], model_types: &["mistral"], form: mistral };

fn llama(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { max_positions: 2048, ..Defaults::LLAMA })?;
    let bias = config.text.flag("attention_bias")?;
    let mlp_bias = config.text.flag("mlp_bias")?;
    config.activation("hidden_act", &["silu"])?;
    sizes.llama(config, |_, attention, mlp| {
        (attention.input_bias, attention.output_bias, mlp.bias) = (bias, bias, mlp_bias);
    })
}

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
