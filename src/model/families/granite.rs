//! Granite and HyperCLOVA X: Llama with a factor for the embedding, for scores, for what each mixer adds, and for logits.

use super::Family;
use crate::error::Result;
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, KvHeads, Sizes};
use crate::model::form::{EmbeddingForm, Form, HeadForm, LayerForm};
use crate::model::rope::Rope;

/// `GraniteForCausalLM`.
pub const GRANITE: Family =
    Family { architectures: &["GraniteForCausalLM"], model_types: &["granite"], form: granite };

/// Three of four layers slide, each layer has a rotary base of its own, and heads have logits without a value.
pub const GRANITE_SWA: Family =
    Family { architectures: &["GraniteSWAForCausalLM"], model_types: &["granite_swa"], form: granite_swa };

/// With norms behind the mixers, and logits multiplied instead of divided.
pub const HYPERCLOVAX: Family =
    Family { architectures: &["HyperCLOVAXForCausalLM"], model_types: &["hyperclovax"], form: hyperclovax };

/// The four factors.
struct Factors {
    embedding: f32,
    attention: Option<f32>,
    residual: f32,
    logits: f32,
}

impl Factors {
    fn of(config: &Config<'_>) -> Result<Factors> {
        let number = |name: &str| config.text.number(name).map(|x| x.map(|x| x as f32));
        Ok(Factors {
            embedding: number("embedding_multiplier")?.unwrap_or(1.0),
            attention: number("attention_multiplier")?,
            residual: number("residual_multiplier")?.unwrap_or(1.0),
            logits: number("logits_scaling")?.unwrap_or(1.0),
        })
    }

    /// The model with these factors at its ends, logits multiplied by `logits`.
    fn ends(&self, form: Form, logits: f32) -> Form {
        let head = HeadForm { multiplier: logits, ..form.head };
        Form { embedding: EmbeddingForm::Times(self.embedding), head, ..form }
    }
}

/// A Llama layer whose mixers' outputs are multiplied by the residual factor.
fn layer(config: &Config<'_>, sizes: &Sizes, factors: &Factors, scale: f32) -> Result<LayerForm> {
    let (bias, mlp_bias) = config.biases()?;
    let (mut attention, mut mlp) = (sizes.attention(), sizes.mlp());
    (attention.input_bias, attention.output_bias, mlp.bias) = (bias, bias, mlp_bias);
    attention.scale = scale;
    let mut layer = sizes.llama_layer(attention, mlp);
    layer.blocks.iter_mut().for_each(|block| block.scale = Some(factors.residual));
    Ok(layer)
}

fn granite(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults::LLAMA)?;
    let factors = Factors::of(config)?;
    config.activation("hidden_act", &["silu"])?;
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    let scale = factors.attention.unwrap_or(1.0);
    let form = sizes.model(vec![rope], |_| layer(config, &sizes, &factors, scale))?;
    Ok(factors.ends(form, 1.0 / factors.logits))
}

fn granite_swa(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults {
        kv_heads: KvHeads::Count(4),
        eps: 1e-5,
        max_positions: 8192,
        tied: true,
        ..Defaults::LLAMA
    })?;
    let factors = Factors::of(config)?;
    config.activation("hidden_act", &["silu"])?;
    let window = config.text.count_or("sliding_window", Some(128))?;
    let windows = config.windows(sizes.layers, window, |layer| layer.is_multiple_of(4))?;
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    let (ropes, of_layer) = match config.layer_numbers("layer_rope_theta", sizes.layers)? {
        None => (vec![rope], vec![Some(0); sizes.layers]),
        Some(thetas) => ropes_by_theta(&rope, &thetas),
    };
    let scale = factors.attention.unwrap_or(1.0);
    let form = sizes.model(ropes, |number| {
        let mut layer = layer(config, &sizes, &factors, scale)?;
        layer.attention_mut().for_each(|attention| {
            attention.window = windows[number];
            attention.rope = of_layer[number];
            attention.sinks = true;
        });
        Ok(layer)
    })?;
    Ok(factors.ends(form, 1.0 / factors.logits))
}

/// A rotary embedding for each base that occurs, and which of them each layer has; a base of zero is none.
fn ropes_by_theta(rope: &Rope, thetas: &[f64]) -> (Vec<Rope>, Vec<Option<usize>>) {
    let mut known: Vec<f64> = vec![];
    for &theta in thetas.iter().filter(|&&theta| theta != 0.0) {
        if !known.contains(&theta) {
            known.push(theta);
        }
    }
    let ropes = known.iter().map(|&theta| rope.with_theta(theta)).collect();
    (ropes, thetas.iter().map(|theta| known.iter().position(|other| other == theta)).collect())
}

fn hyperclovax(config: &Config<'_>) -> Result<Form> {
    let sizes = config.sizes(&Defaults::LLAMA)?;
    let factors = Factors::of(config)?;
    config.activation("hidden_act", &["silu"])?;
    let normed = config.text.optional_flag("use_post_norm")?.unwrap_or(true);
    let rope = Rope::read(config, &sizes, &sizes.rope())?;
    let scale = factors.attention.unwrap_or((sizes.heads.dim as f32).powf(-0.5));
    let form = sizes.model(vec![rope], |_| {
        let mut layer = layer(config, &sizes, &factors, scale)?;
        if normed {
            for (block, name) in layer.blocks.iter_mut().zip(["post_norm1", "post_norm2"]) {
                block.output = Some((sizes.norm(), name));
            }
        }
        Ok(layer)
    })?;
    Ok(factors.ends(form, factors.logits))
}
