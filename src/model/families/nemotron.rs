//! MLPs without a gate, whose function is the square of what is positive: Nemotron, Arcee, Jais 2.

use super::Family;
use crate::backend::{Gamma, NormKind};
use crate::error::Result;
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, Sizes};
use crate::model::form::{BlockForm, Form, LayerForm, MixerForm};
use crate::model::layer::NormForm;
use crate::model::mlp::{Function, MlpForm, MlpShape};
use crate::model::rope::{Rope, RopeOptions};

/// Norms with biases, by one plus their weight; half of each head rotates.
pub const NEMOTRON: Family =
    Family { architectures: &["NemotronForCausalLM"], model_types: &["nemotron"], form: nemotron };

/// Llama's norms.
pub const ARCEE: Family =
    Family { architectures: &["ArceeForCausalLM"], model_types: &["arcee"], form: arcee };

/// Norms with biases, and biases on every linear.
pub const JAIS2: Family =
    Family { architectures: &["Jais2ForCausalLM"], model_types: &["jais2"], form: jais2 };

/// A model with this norm everywhere.
fn model(
    config: &Config<'_>,
    sizes: &Sizes,
    norm: NormForm,
    (bias, mlp_bias): (bool, bool),
    partial: f64,
) -> Result<Form> {
    let activation = config.activation("hidden_act", &["relu2"])?;
    let rope = Rope::read(config, sizes, &RopeOptions { partial, ..sizes.rope() })?;
    let form = sizes.model(vec![rope], |_| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        let mlp = MlpForm {
            shape: MlpShape::Plain,
            function: Function::Of(activation),
            bias: mlp_bias,
            ..sizes.mlp()
        };
        Ok(LayerForm::of(vec![
            BlockForm::new((norm, "input_layernorm"), MixerForm::Attention(attention)),
            BlockForm::new((norm, "post_attention_layernorm"), MixerForm::Mlp(mlp)),
        ]))
    })?;
    Ok(Form { norm: (norm, "norm"), ..form })
}

fn layer_norm(gamma: Gamma, eps: f32) -> NormForm {
    NormForm { kind: NormKind { centers: true, gamma, rounds_first: false, eps }, bias: true }
}

fn nemotron(config: &Config<'_>) -> Result<Form> {
    let defaults = Defaults { eps_field: "norm_eps", eps: 1e-5, max_positions: 4096, ..Defaults::LLAMA };
    let sizes = config.sizes(&defaults)?;
    model(config, &sizes, layer_norm(Gamma::OnePlusRounded, sizes.eps), config.biases()?, 0.5)
}

fn arcee(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { eps: 1e-5, max_positions: 4096, ..Defaults::LLAMA })?;
    model(config, &sizes, sizes.norm(), config.biases()?, 1.0)
}

fn jais2(config: &Config<'_>) -> Result<Form> {
    let defaults =
        Defaults { eps_field: "layer_norm_eps", eps: 1e-5, max_positions: 8192, ..Defaults::LLAMA };
    let sizes = config.sizes(&defaults)?;
    let flag = |name: &str| config.text.optional_flag(name).map(|flag| flag.unwrap_or(true));
    let biases = (flag("attention_bias")?, flag("mlp_bias")?);
    model(config, &sizes, layer_norm(Gamma::Weight, sizes.eps), biases, 1.0)
}
