//! Muse-Glimmer: Gemma's four norms around Llama's MLP, queries and keys normed without weights, and a gate on what
//! attention gives.

use super::{FOUR, sandwich};
use crate::backend::{Gamma, NormKind};
use crate::error::Result;
use crate::model::attention::{HeadNorms, NormScope};
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, KvHeads};
use crate::model::families::Family;
use crate::model::form::{EmbeddingForm, Form, HeadForm};
use crate::model::rope::Rope;

/// The decoder of `MuseGlimmerForConditionalGeneration`.
pub const MUSE: Family = Family { architectures: &[], model_types: &["muse_glimmer_text"], form: muse };

fn muse(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        kv_heads: KvHeads::Count(2),
        head_dim: Some(128),
        eps: 1e-5,
        max_positions: 131_072,
        ..Defaults::LLAMA
    })?;
    let text = &config.text;
    let (bias, _) = config.biases()?;
    config.activation("hidden_activation", &["silu"])?;
    // Every fourth layer, counted from the last.
    let every_fourth = |layer: usize| (sizes.layers - 1 - layer).is_multiple_of(4);
    let windows = config.windows(sizes.layers, text.count_or("sliding_window", Some(2048))?, every_fourth)?;
    let thetas = config.layer_numbers("layer_rope_theta", sizes.layers)?;
    let rotates = |layer: usize| thetas.as_ref().map_or(!every_fourth(layer), |thetas| thetas[layer] != 0.0);
    let number = |name: &str, default: f64| text.number(name).map(|x| x.unwrap_or(default) as f32);
    let (factor, post_eps) = (number("qk_scale_factor", 3.87)?, number("post_norm_eps", 1e-8)?);
    let kind = |gamma, eps| NormKind { centers: false, gamma, rounds_first: false, eps };
    let (before, behind) = (kind(Gamma::OnePlus, sizes.eps), kind(Gamma::OnePlus, post_eps));
    let plain = kind(Gamma::One, sizes.eps);
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    let form = sizes.model(vec![rope], |layer| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        attention.window = windows[layer];
        attention.rope = rotates(layer).then_some(0);
        attention.head_norms = Some(HeadNorms { kind: plain, scope: NormScope::Head, after_rotation: false });
        attention.query_scale = Some(factor);
        attention.gated = true;
        Ok(sandwich([before.into(), behind.into()], FOUR, attention, sizes.mlp()))
    })?;
    let head = HeadForm {
        multiplier: number("output_multiplier", 0.196_116_135_138_184_04)?,
        softcap: text.number_or("final_logit_softcapping", Some(20.0))?.map(|cap| cap as f32),
    };
    let norm = kind(Gamma::Weight, sizes.eps).into();
    Ok(Form { norm: (norm, "norm"), embedding: EmbeddingForm::Normed(plain), head, ..form })
}
