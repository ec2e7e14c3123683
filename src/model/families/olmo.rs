//! OLMo 2 and 3 and EXAONE 4: mixers read the residual stream itself, and their outputs are normed.

use super::Family;
use crate::backend::{Gamma, NormKind};
use crate::error::Result;
use crate::model::attention::{AttentionForm, HeadNorms, NormScope};
use crate::model::config::sizes::{Defaults, KvHeads, Sizes};
use crate::model::config::{Config, FULL, SLIDING};
use crate::model::form::{BlockForm, Form, LayerForm, MixerForm};
use crate::model::layer::NormForm;
use crate::model::rope::{Rope, RopeOptions, RopeStyle};

/// Queries and keys are normed over all heads together.
pub const OLMO2: Family =
    Family { architectures: &["Olmo2ForCausalLM"], model_types: &["olmo2"], form: olmo2 };

/// The same with three of four layers that slide, and have a rotary embedding of their own.
pub const OLMO3: Family =
    Family { architectures: &["Olmo3ForCausalLM"], model_types: &["olmo3"], form: olmo3 };

/// Queries and keys are normed by head; layers that see everything have no positions.
pub const EXAONE4: Family =
    Family { architectures: &["Exaone4ForCausalLM"], model_types: &["exaone4"], form: exaone4 };

/// OLMo's rotary embedding: F32 tables, one rounding.
const STYLE: RopeStyle = RopeStyle { interleaved: false, rounds_once: true, exact_tables: true };

const OLMO: Defaults = Defaults { eps: 1e-5, max_positions: 2048, ..Defaults::LLAMA };

/// A layer whose mixers' outputs are normed, and their inputs are not.
fn layer(sizes: &Sizes, norm: NormForm, attention: AttentionForm) -> LayerForm {
    let block = |mixer: MixerForm, name: &'static str| BlockForm {
        input: None,
        mixers: vec![mixer],
        output: Some((norm, name)),
        scale: None,
    };
    LayerForm::of(vec![
        block(MixerForm::Attention(attention), "post_attention_layernorm"),
        block(MixerForm::Mlp(sizes.mlp()), "post_feedforward_layernorm"),
    ])
}

/// OLMo's model, each layer's attention completed by `change`.
fn olmo(
    config: &Config<'_>,
    sizes: &Sizes,
    ropes: Vec<Rope>,
    change: impl Fn(usize, &mut AttentionForm),
) -> Result<Form> {
    let (bias, _) = config.biases()?;
    config.activation("hidden_act", &["silu"])?;
    let kind = NormKind { centers: false, gamma: Gamma::Weight, rounds_first: false, eps: sizes.eps };
    let form = sizes.model(ropes, |number| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        attention.head_norms = Some(HeadNorms { kind, scope: NormScope::Row, after_rotation: false });
        change(number, &mut attention);
        Ok(layer(sizes, kind.into(), attention))
    })?;
    Ok(Form { norm: (kind.into(), "norm"), ..form })
}

fn olmo2(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&OLMO)?;
    let rope = Rope::read(config, &sizes, &RopeOptions { style: STYLE, ..sizes.rope() })?;
    olmo(config, &sizes, vec![rope], |_, _| {})
}

fn olmo3(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { theta: 500_000.0, ..OLMO })?;
    let window = config.text.count_or("sliding_window", Some(4096))?;
    let of_pattern = |layer: usize| if (layer + 1).is_multiple_of(4) { FULL } else { SLIDING };
    let types = config.layer_types(sizes.layers, of_pattern)?;
    let options = RopeOptions { style: STYLE, ..sizes.rope() };
    // In the older spelling the one theta is that of layers that see everything.
    let ropes = vec![
        Rope::of_kind(config, &sizes, (FULL, "rope_theta"), &options)?,
        Rope::of_kind(config, &sizes, (SLIDING, ""), &options)?,
    ];
    olmo(config, &sizes, ropes, |layer, attention| {
        let slides = types[layer] == SLIDING;
        attention.window = window.filter(|_| slides);
        attention.rope = Some(usize::from(slides));
    })
}

fn exaone4(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { eps: 1e-5, kv_heads: KvHeads::Count(32), ..Defaults::LLAMA })?;
    config.activation("hidden_act", &["silu"])?;
    let window = config.text.count_or("sliding_window", Some(4096))?;
    // A text such as "LLLG" stands for its length.
    let pattern = match config.text.get("sliding_window_pattern") {
        Some(serde_json::Value::String(pattern)) => pattern.len().max(1),
        _ => config.text.optional_count("sliding_window_pattern")?.unwrap_or(4),
    };
    let slides = |layer: usize| window.is_some() && !(layer + 1).is_multiple_of(pattern);
    let types = config.layer_types(sizes.layers, |layer| if slides(layer) { SLIDING } else { FULL })?;
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    let kind = NormKind::llama(sizes.eps);
    sizes.model(vec![rope], |number| {
        let slides = types[number] == SLIDING;
        let mut attention = sizes.attention();
        attention.window = window.filter(|_| slides);
        attention.rope = (slides || window.is_none()).then_some(0);
        attention.head_norms = Some(HeadNorms { kind, scope: NormScope::Head, after_rotation: false });
        Ok(layer(&sizes, kind.into(), attention))
    })
}
