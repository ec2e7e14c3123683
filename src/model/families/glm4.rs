//! GLM-4 (0414): norms before and behind each mixer, gate and up stored as one matrix, and half of each head rotates, in
//! neighbouring pairs.

use super::Family;
use super::gemma::sandwich;
use crate::error::Result;
use crate::model::config::Config;
use crate::model::form::Form;
use crate::model::mlp::MlpShape;
use crate::model::rope::{Rope, RopeOptions, RopeStyle};
use crate::model::sizes::{Defaults, KvHeads};

/// `Glm4ForCausalLM`.
pub const GLM4: Family = Family { architectures: &["Glm4ForCausalLM"], model_types: &["glm4"], form: glm4 };

/// The norm before the MLP is the third, whatever its name says.
const NORMS: [&str; 4] =
    ["input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"];

fn glm4(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        kv_heads: KvHeads::Count(2),
        head_dim: Some(128),
        eps: 1.5625e-7,
        max_positions: 131_072,
        ..Defaults::LLAMA
    })?;
    let bias = config.text.optional_flag("attention_bias")?.unwrap_or(true);
    config.activation("hidden_act", &["silu"])?;
    let style = RopeStyle { interleaved: true, ..RopeStyle::default() };
    let rope = Rope::read(config, &sizes, &RopeOptions { partial: 0.5, style, ..sizes.rope() })?;
    let norm = sizes.norm();
    sizes.model(vec![rope], |_| {
        let (mut attention, mut mlp) = (sizes.attention(), sizes.mlp());
        attention.input_bias = bias;
        (mlp.shape, mlp.linears[0]) = (MlpShape::Fused, "gate_up_proj");
        Ok(sandwich([norm, norm], NORMS, attention, mlp))
    })
}
