//! Gemma 1 to 3: norms that multiply by one plus their weight, an embedding times the root of its size and, from the
//! second generation on, norms before and behind each mixer, windows on most layers, and caps.

pub mod gemma4;
pub mod muse;

use serde_json::Value;

use super::Family;
use crate::backend::{Gamma, NormKind};
use crate::error::Result;
use crate::model::attention::{AttentionForm, HeadNorms, NormScope};
use crate::model::config::sizes::{Defaults, KvHeads, Sizes};
use crate::model::config::{Config, FULL, SLIDING};
use crate::model::form::{BlockForm, EmbeddingForm, Form, HeadForm, LayerForm, MixerForm};
use crate::model::layer::NormForm;
use crate::model::mlp::{Function, MlpForm};
use crate::model::rope::{Rope, RopeOptions};

/// The first generation.
pub const GEMMA: Family =
    Family { architectures: &["GemmaForCausalLM"], model_types: &["gemma"], form: gemma };

/// The second: four norms, every other layer slides, scores and logits have caps.
pub const GEMMA2: Family =
    Family { architectures: &["Gemma2ForCausalLM"], model_types: &["gemma2"], form: gemma2 };

/// The third: five of six layers slide, and have a rotary embedding of their own; queries and keys are normed.
pub const GEMMA3: Family =
    Family { architectures: &["Gemma3ForCausalLM"], model_types: &["gemma3_text"], form: gemma3 };

const DEFAULTS: Defaults = Defaults {
    heads: Some(8),
    kv_heads: KvHeads::Count(4),
    head_dim: Some(256),
    max_positions: 8192,
    tied: true,
    ..Defaults::LLAMA
};

fn norm_kind(eps: f32) -> NormKind {
    NormKind { centers: false, gamma: Gamma::OnePlus, rounds_first: false, eps }
}

/// The names of the four norms that Gemma's layers have from the second generation on: before and behind attention,
/// before and behind the MLP.
pub(super) const FOUR: [&str; 4] = [
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
];

/// A layer with norms before and behind each mixer; those behind may be of another kind.
pub(super) fn sandwich(
    [before, behind]: [NormForm; 2],
    names: [&'static str; 4],
    attention: AttentionForm,
    mlp: MlpForm,
) -> LayerForm {
    let block = |mixer: MixerForm, input: &'static str, output: &'static str| BlockForm {
        output: Some((behind, output)),
        ..BlockForm::new((before, input), mixer)
    };
    LayerForm::of(vec![
        block(MixerForm::Attention(attention), names[0], names[1]),
        block(MixerForm::Mlp(mlp), names[2], names[3]),
    ])
}

/// The embedding is multiplied by the root of the hidden size.
pub(super) fn root(sizes: &Sizes) -> EmbeddingForm {
    EmbeddingForm::TimesRounded((sizes.hidden as f64).sqrt() as f32)
}

fn gemma(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { kv_heads: KvHeads::Count(16), ..DEFAULTS })?;
    let (bias, _) = config.biases()?;
    // The files say "gelu" and mean its tanh form.
    config.activation("hidden_act", &["gelu_pytorch_tanh", "gelu"])?;
    let norm: NormForm = norm_kind(sizes.eps).into();
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    let form = sizes.model(vec![rope], |_| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        let mlp = MlpForm { function: Function::Of(crate::backend::Activation::GeluTanh), ..sizes.mlp() };
        Ok(LayerForm::of(vec![
            BlockForm::new((norm, "input_layernorm"), MixerForm::Attention(attention)),
            BlockForm::new((norm, "post_attention_layernorm"), MixerForm::Mlp(mlp)),
        ]))
    })?;
    Ok(Form { norm: (norm, "norm"), embedding: root(&sizes), ..form })
}

fn gemma2(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&DEFAULTS)?;
    let windows = windows(config, &sizes, 2)?;
    let softcap = config.text.number_or("attn_logit_softcapping", Some(50.0))?.map(|cap| cap as f32);
    let logits = config.text.number_or("final_logit_softcapping", Some(30.0))?;
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    layers(config, &sizes, vec![rope], logits, |layer, attention| {
        (attention.window, attention.softcap) = (windows[layer], softcap);
    })
}

fn gemma3(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        layers: Some(26),
        hidden: Some(2304),
        intermediate: Some(9216),
        vocab: Some(262_208),
        max_positions: 131_072,
        ..DEFAULTS
    })?;
    config.refuse("use_bidirectional_attention", &Value::Bool(false))?;
    let text = &config.text;
    let pattern = text.optional_count("sliding_window_pattern")?;
    let pattern = pattern.or(text.optional_count("_sliding_window_pattern")?).unwrap_or(6);
    let windows = windows(config, &sizes, pattern)?;
    // The class with a vision tower leaves logits as they are.
    let logits = match config.wrapper {
        Some(_) => None,
        None => text.number_or("final_logit_softcapping", None)?,
    };
    let options = |theta| RopeOptions { theta, ..sizes.rope() };
    let ropes = vec![
        Rope::of_kind(config, &sizes, (FULL, "rope_theta"), &options(1e6))?,
        Rope::of_kind(config, &sizes, (SLIDING, "rope_local_base_freq"), &options(1e4))?,
    ];
    let kind = norm_kind(sizes.eps);
    layers(config, &sizes, ropes, logits, |layer, attention| {
        attention.window = windows[layer];
        attention.rope = Some(usize::from(windows[layer].is_some()));
        attention.head_norms = Some(HeadNorms { kind, scope: NormScope::Head, after_rotation: false });
    })
}

/// The window of each layer, of which every `pattern`-th has none.
fn windows(config: &Config<'_>, sizes: &Sizes, pattern: usize) -> Result<Vec<Option<usize>>> {
    let window = config.text.count_or("sliding_window", Some(4096))?;
    config.windows(sizes.layers, window, |layer| (layer + 1).is_multiple_of(pattern))
}

/// The layers of the second and third generation, whose attention `change` completes.
fn layers(
    config: &Config<'_>,
    sizes: &Sizes,
    ropes: Vec<Rope>,
    softcap: Option<f64>,
    change: impl Fn(usize, &mut AttentionForm),
) -> Result<Form> {
    let (bias, _) = config.biases()?;
    let activation = config.activation("hidden_activation", &["gelu_pytorch_tanh"])?;
    let scalar = config.text.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    let norm: NormForm = norm_kind(sizes.eps).into();
    let form = sizes.model(ropes, |layer| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        attention.scale = scalar.powf(-0.5) as f32;
        change(layer, &mut attention);
        let mlp = MlpForm { function: Function::Of(activation), ..sizes.mlp() };
        Ok(sandwich([norm, norm], FOUR, attention, mlp))
    })?;
    let head = HeadForm { softcap: softcap.map(|cap| cap as f32), ..form.head };
    Ok(Form { norm: (norm, "norm"), embedding: root(sizes), head, ..form })
}
