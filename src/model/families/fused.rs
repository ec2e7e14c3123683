//! Families that store several matrices as one: Phi-3 and Phi-4, and GLM-4 (0414).

use super::Family;
use super::gemma::sandwich;
use crate::error::Result;
use crate::model::attention::Projections;
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, KvHeads};
use crate::model::form::Form;
use crate::model::mlp::MlpShape;
use crate::model::rope::{Rope, RopeOptions, RopeStyle};

/// q, k and v are one matrix, gate and up another; a part of each head may rotate, at frequencies that depend on the
/// document's length.
pub const PHI3: Family = Family { architectures: &["Phi3ForCausalLM"], model_types: &["phi3"], form: phi3 };

/// Gate and up are one matrix; norms stand before and behind each mixer, and half of each head rotates, in neighbouring
/// pairs.
pub const GLM4: Family = Family { architectures: &["Glm4ForCausalLM"], model_types: &["glm4"], form: glm4 };

/// The norm before the MLP is the third, whatever its name says.
const NORMS: [&str; 4] =
    ["input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"];

fn phi3(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { eps: 1e-5, max_positions: 4096, ..Defaults::LLAMA })?;
    let window = config.text.count_or("sliding_window", None)?;
    config.activation("hidden_act", &["silu"])?;
    let options = RopeOptions {
        original_positions: Some(4096),
        renamed: &[("su", "longrope"), ("yarn", "longrope")],
        ..sizes.rope()
    };
    let rope = Rope::read(config, &sizes, &options)?;
    sizes.model(vec![rope], |_| {
        let (mut attention, mut mlp) = (sizes.attention(), sizes.mlp());
        (attention.window, attention.projections) = (window, Projections::Fused);
        (mlp.shape, mlp.linears[0]) = (MlpShape::Fused, "gate_up_proj");
        Ok(sizes.llama_layer(attention, mlp))
    })
}

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
