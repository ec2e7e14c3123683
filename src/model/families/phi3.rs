//! Phi-3 and Phi-4: q, k and v are stored as one matrix, gate and up as another; a part of each head may rotate, at
//! frequencies that depend on the document's length.

use super::Family;
use crate::error::Result;
use crate::model::attention::Projections;
use crate::model::config::Config;
use crate::model::form::Form;
use crate::model::mlp::MlpShape;
use crate::model::rope::{Rope, RopeOptions};
use crate::model::sizes::Defaults;

/// `Phi3ForCausalLM`.
pub const PHI3: Family = Family { architectures: &["Phi3ForCausalLM"], model_types: &["phi3"], form: phi3 };

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
