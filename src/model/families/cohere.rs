//! Command: attention and MLP read the same normed input, and both are added to the residual stream.

use super::Family;
use crate::backend::{Gamma, NormKind};
use crate::error::Result;
use crate::model::attention::{HeadNorms, NormScope};
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, Sizes};
use crate::model::form::{BlockForm, Form, HeadForm, LayerForm, MixerForm};
use crate::model::layer::NormForm;
use crate::model::rope::{Rope, RopeOptions, RopeStyle};

/// The first generation: positions on every layer, and norms of queries and keys in the larger models.
pub const COHERE: Family =
    Family { architectures: &["CohereForCausalLM"], model_types: &["cohere"], form: cohere };

/// The second: three of four layers slide, and positions are encoded on these alone.
pub const COHERE2: Family =
    Family { architectures: &["Cohere2ForCausalLM"], model_types: &["cohere2"], form: cohere2 };

const DEFAULTS: Defaults =
    Defaults { eps_field: "layer_norm_eps", eps: 1e-5, max_positions: 8192, tied: true, ..Defaults::LLAMA };

fn norm_kind(sizes: &Sizes) -> NormKind {
    NormKind { centers: true, gamma: Gamma::Weight, rounds_first: false, eps: sizes.eps }
}

fn cohere(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { theta: 500_000.0, ..DEFAULTS })?;
    let normed = config.text.flag("use_qk_norm")?;
    let head_norms = normed.then_some(HeadNorms {
        kind: norm_kind(&sizes),
        scope: NormScope::EachHead,
        after_rotation: false,
    });
    model(config, &sizes, |_, attention| attention.head_norms = head_norms)
}

fn cohere2(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&DEFAULTS)?;
    let window = config.text.count_or("sliding_window", Some(4096))?;
    let pattern = config.text.optional_count("sliding_window_pattern")?.unwrap_or(4);
    let windows = config.windows(sizes.layers, window, |layer| (layer + 1).is_multiple_of(pattern))?;
    model(config, &sizes, |layer, attention| {
        attention.window = windows[layer];
        attention.rope = windows[layer].map(|_| 0);
    })
}

fn model(
    config: &Config<'_>,
    sizes: &Sizes,
    change: impl Fn(usize, &mut crate::model::AttentionForm),
) -> Result<Form> {
    let (bias, _) = config.biases()?;
    config.activation("hidden_act", &["silu"])?;
    let norm: NormForm = norm_kind(sizes).into();
    let style = RopeStyle { interleaved: true, rounds_once: true, exact_tables: false };
    let rope = Rope::read(config, sizes, &RopeOptions { style, ..sizes.rope() })?;
    let form = sizes.model(vec![rope], |layer| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        change(layer, &mut attention);
        let mixers = vec![MixerForm::Attention(attention), MixerForm::Mlp(sizes.mlp())];
        let input = Some((norm, "input_layernorm"));
        Ok(LayerForm::of(vec![BlockForm { input, mixers, output: None, scale: None }]))
    })?;
    let multiplier = config.text.number("logit_scale")?.unwrap_or(0.0625) as f32;
    Ok(Form { norm: (norm, "norm"), head: HeadForm { multiplier, ..form.head }, ..form })
}
