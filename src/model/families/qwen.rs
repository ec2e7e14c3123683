//! Qwen2, Qwen2.5 and Qwen3, and the text side of their vision models. Three-part positions of the vision models are
//! equal for text, so their rotary embedding is the plain one.

use super::Family;
use crate::backend::NormKind;
use crate::error::Result;
use crate::model::attention::{HeadNorms, NormScope};
use crate::model::config::Config;
use crate::model::config::sizes::{Defaults, KvHeads, Sizes};
use crate::model::form::Form;

/// Biases on q, k and v; the window starts at a layer, where it is used at all.
pub const QWEN2: Family = Family {
    architectures: &["Qwen2ForCausalLM"],
    model_types: &["qwen2"],
    form: |config| qwen2(config, &DEFAULTS, 28),
};

/// Qwen2 with other defaults.
pub const QWEN2_VL: Family = Family {
    architectures: &[],
    model_types: &["qwen2_vl_text", "qwen2_5_vl_text"],
    form: |config| qwen2(config, &Defaults { eps: 1e-5, theta: 1e6, ..DEFAULTS }, 80),
};

/// Norms of queries and keys by head.
pub const QWEN3: Family = Family {
    architectures: &["Qwen3ForCausalLM"],
    model_types: &["qwen3"],
    form: |config| qwen3(config, &Defaults { head_dim: Some(128), ..DEFAULTS }),
};

/// Qwen3 without windows.
pub const QWEN3_VL: Family = Family {
    architectures: &[],
    model_types: &["qwen3_vl_text"],
    form: |config| qwen3(config, &Defaults { head_dim: Some(128), theta: 5e5, ..DEFAULTS }),
};

const DEFAULTS: Defaults = Defaults { max_positions: 32768, kv_heads: KvHeads::Count(32), ..Defaults::LLAMA };

fn qwen2(config: &Config<'_>, defaults: &Defaults, first_sliding: usize) -> Result<Form> {
    let sizes = config.sizes(defaults)?;
    let windows = windows(config, &sizes, first_sliding)?;
    config.activation("hidden_act", &["silu"])?;
    sizes.llama(config, |layer, attention, _| {
        attention.input_bias = true;
        attention.window = windows[layer];
    })
}

fn qwen3(config: &Config<'_>, defaults: &Defaults) -> Result<Form> {
    let sizes = config.sizes(defaults)?;
    let windows = windows(config, &sizes, 28)?;
    let (bias, _) = config.biases()?;
    config.activation("hidden_act", &["silu"])?;
    let norms = HeadNorms { kind: NormKind::llama(sizes.eps), scope: NormScope::Head, after_rotation: false };
    sizes.llama(config, |layer, attention, _| {
        (attention.input_bias, attention.output_bias) = (bias, bias);
        attention.window = windows[layer];
        attention.head_norms = Some(norms);
    })
}

/// The window of each layer: only where `use_sliding_window` says so, from `max_window_layers` on.
fn windows(config: &Config<'_>, sizes: &Sizes, first_sliding: usize) -> Result<Vec<Option<usize>>> {
    let window = match config.text.flag("use_sliding_window")? {
        true => config.text.count_or("sliding_window", Some(4096))?,
        false => None,
    };
    // Zero is a number of layers like any other.
    let first = config.text.get("max_window_layers").and_then(serde_json::Value::as_u64);
    let first = first.map_or(first_sliding, |first| first as usize);
    config.windows(sizes.layers, window, |layer| layer < first)
}
