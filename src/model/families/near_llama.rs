//! Families that differ from Llama in one or two things.

use serde_json::{Value, json};

use super::Family;
use crate::backend::NormKind;
use crate::error::Result;
use crate::model::attention::{AttentionNames, HeadNorms, NormScope};
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, KvHeads};
use crate::model::form::{BlockForm, Form, LayerForm, MixerForm};
use crate::model::mlp::{Function, MlpForm, MlpShape};
use crate::model::rope::{Rope, RopeOptions};

/// Some layers have no positions.
pub const SMOLLM3: Family =
    Family { architectures: &["SmolLM3ForCausalLM"], model_types: &["smollm3"], form: smollm3 };

/// Biases on q, k and v.
pub const SEED_OSS: Family =
    Family { architectures: &["SeedOssForCausalLM"], model_types: &["seed_oss"], form: seed_oss };

/// An MLP without a gate, whose function has parameters in every layer; queries and keys are normed.
pub const APERTUS: Family =
    Family { architectures: &["ApertusForCausalLM"], model_types: &["apertus"], form: apertus };

/// Queries and keys are normed behind the rotation, which has a stretched base.
pub const HUNYUAN: Family = Family {
    architectures: &["HunYuanDenseV1ForCausalLM"],
    model_types: &["hunyuan_v1_dense"],
    form: hunyuan,
};

fn smollm3(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        kv_heads: KvHeads::Count(4),
        theta: 2e6,
        max_positions: 32768,
        tied: true,
        ..Defaults::LLAMA
    })?;
    let (bias, mlp_bias) = config.biases()?;
    config.activation("hidden_act", &["silu"])?;
    let interval = config.text.optional_count("no_rope_layer_interval")?.unwrap_or(4);
    let list = config.layer_numbers("no_rope_layers", sizes.layers)?;
    let rotates =
        |layer: usize| list.as_ref().map_or(!(layer + 1).is_multiple_of(interval), |list| list[layer] != 0.0);
    let window = match config.text.flag("use_sliding_window")? {
        true => config.text.count_or("sliding_window", None)?,
        false => None,
    };
    let windows = config.windows(sizes.layers, window, rotates)?;
    sizes.llama(config, |layer, attention, mlp| {
        (attention.input_bias, attention.output_bias, mlp.bias) = (bias, bias, mlp_bias);
        attention.window = windows[layer];
        attention.rope = rotates(layer).then_some(0);
    })
}

fn seed_oss(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        heads: Some(80),
        kv_heads: KvHeads::Count(8),
        head_dim: Some(128),
        max_positions: 524_288,
        ..Defaults::LLAMA
    })?;
    let bias = config.text.optional_flag("attention_bias")?.unwrap_or(true);
    let output_bias = config.text.flag("attention_out_bias")?;
    let (_, mlp_bias) = config.biases()?;
    config.activation("hidden_act", &["silu"])?;
    sizes.llama(config, |_, attention, mlp| {
        (attention.input_bias, attention.output_bias, mlp.bias) = (bias, output_bias, mlp_bias);
    })
}

fn apertus(config: &Config<'_>) -> Result<Form> {
    let sizes =
        config.sizes(&Defaults { eps: 1e-5, theta: 1.2e7, max_positions: 65536, ..Defaults::LLAMA })?;
    config.refuse("hidden_act", &json!("xielu"))?;
    config.refuse("post_norm", &json!(false))?;
    config.refuse("qk_norm", &json!(true))?;
    let (bias, mlp_bias) = config.biases()?;
    let absent = json!({
        "rope_type": "llama3", "rope_theta": 1.2e7, "factor": 8.0, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    });
    let rope = Rope::read(config, &sizes, &RopeOptions { absent, ..sizes.rope() })?;
    let norm = sizes.norm();
    let kind = NormKind::llama(sizes.eps);
    let form = sizes.model(vec![rope], |_| {
        let mut attention = sizes.attention();
        (attention.input_bias, attention.output_bias) = (bias, bias);
        attention.head_norms = Some(HeadNorms { kind, scope: NormScope::Head, after_rotation: false });
        let mlp =
            MlpForm { shape: MlpShape::Plain, function: Function::Xielu, bias: mlp_bias, ..sizes.mlp() };
        Ok(LayerForm::of(vec![
            BlockForm::new((norm, "attention_layernorm"), MixerForm::Attention(attention)),
            BlockForm::new((norm, "feedforward_layernorm"), MixerForm::Mlp(mlp)),
        ]))
    })?;
    // Files hold these constants of the function beside its parameters.
    Ok(Form { constants: &[".mlp.act_fn.beta", ".mlp.act_fn.eps"], ..form })
}

fn hunyuan(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults { eps: 1e-5, ..Defaults::LLAMA })?;
    let (bias, _) = config.biases()?;
    config.activation("hidden_act", &["silu"])?;
    config.refuse("use_qk_norm", &Value::Bool(true))?;
    let kind = NormKind::llama(sizes.eps);
    let names = AttentionNames { norms: ["query_layernorm", "key_layernorm"], ..AttentionNames::LLAMA };
    sizes.llama(config, |_, attention, _| {
        (attention.input_bias, attention.output_bias) = (bias, bias);
        attention.names = names;
        attention.head_norms = Some(HeadNorms { kind, scope: NormScope::Head, after_rotation: true });
    })
}
