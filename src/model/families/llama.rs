//! Llama: a norm before attention and one before the MLP.

use super::Family;
use crate::error::Result;
use crate::model::config::Config;
use crate::model::config::sizes::Defaults;
use crate::model::form::Form;

/// `LlamaForCausalLM`: config.json says which linears have biases.
pub const LLAMA: Family =
    Family { architectures: &["LlamaForCausalLM"], model_types: &["llama"], form: llama };

fn llama(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { max_positions: 2048, ..Defaults::LLAMA })?;
    let bias = config.text.flag("attention_bias")?;
    let mlp_bias = config.text.flag("mlp_bias")?;
    config.activation("hidden_act", &["silu"])?;
    sizes.llama(config, |_, attention, mlp| {
        (attention.input_bias, attention.output_bias, mlp.bias) = (bias, bias, mlp_bias);
    })
}
