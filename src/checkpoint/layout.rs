//! The two layouts in which engines read NVFP4: the same codes and block scales under other names, with
//! global scales as multipliers (ModelOpt) or divisors (compressed-tensors).

use std::fmt;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::writing::placement::OutTensor;
use crate::nvfp4::{BLOCK, GlobalScale};
use crate::units::write_name;

/// How the output names its tensors and describes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// The format nvfp4-pack-quantized, which vLLM, SGLang and Transformers load.
    CompressedTensors,
    /// The format of nvidia-modelopt, which vLLM, SGLang and TensorRT-LLM load.
    Modelopt,
}

/// What is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// Weights and activations (W4A4).
    Nvfp4,
    /// Weights only (W4A16).
    Nvfp4a16,
}

impl Scheme {
    /// Whether inputs have a global scale, so that calibration is needed.
    pub fn quantizes_activations(self) -> bool {
        self == Scheme::Nvfp4
    }
}

/// The names of a quantized linear's tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearNames {
    /// U8 `[rows, cols / 2]`.
    pub codes: String,
    /// F8_E4M3 `[rows, cols / 16]`.
    pub scales: String,
    /// F32, one element.
    pub weight_global: String,
    /// F32, one element; present where activations are quantized.
    pub input_global: String,
}

impl Layout {
    /// The names for module `linear`.
    pub fn linear_names(self, linear: &str) -> LinearNames {
        let [codes, weight_global, input_global] = match self {
            Layout::CompressedTensors => ["weight_packed", "weight_global_scale", "input_global_scale"],
            Layout::Modelopt => ["weight", "weight_scale_2", "input_scale"],
        };
        let name = |suffix: &str| format!("{linear}.{suffix}");
        LinearNames {
            codes: name(codes),
            scales: name("weight_scale"),
            weight_global: name(weight_global),
            input_global: name(input_global),
        }
    }

    /// The tensors of module `linear` `[rows, cols]`.
    pub fn linear_tensors(self, linear: &str, rows: usize, cols: usize, scheme: Scheme) -> Vec<OutTensor> {
        let names = self.linear_names(linear);
        let scalar: &[usize] = match self {
            Layout::CompressedTensors => &[1],
            Layout::Modelopt => &[],
        };
        let mut tensors = vec![
            OutTensor::new(&names.codes, Dtype::U8, &[rows, cols / 2]),
            OutTensor::new(&names.scales, Dtype::F8_E4M3, &[rows, cols / BLOCK]),
            OutTensor::new(&names.weight_global, Dtype::F32, scalar),
        ];
        if scheme.quantizes_activations() {
            tensors.push(OutTensor::new(&names.input_global, Dtype::F32, scalar));
        }
        tensors
    }

    /// A global scale as this layout stores it: little-endian f32.
    pub fn scalar(self, global: GlobalScale) -> [u8; 4] {
        match self {
            Layout::CompressedTensors => global.divisor().to_le_bytes(),
            Layout::Modelopt => global.multiplier().to_le_bytes(),
        }
    }

    /// The entry of `ignore` that reaches the modules whose names end like this.
    pub fn ignoring_names_that_end(self, end: &str) -> String {
        match self {
            Layout::CompressedTensors => format!("re:.*{}$", regex::escape(end)),
            Layout::Modelopt => format!("*{end}"),
        }
    }

    /// The entry of `ignore` that reaches the modules whose names have this part.
    pub fn ignoring_names_with(self, part: &str) -> String {
        match self {
            Layout::CompressedTensors => format!("re:.*{}.*", regex::escape(part)),
            Layout::Modelopt => format!("*{part}*"),
        }
    }

    /// What a global scale stored in this layout says.
    pub fn global(self, stored: f32) -> GlobalScale {
        match self {
            Layout::CompressedTensors => GlobalScale::from_divisor(stored),
            Layout::Modelopt => GlobalScale::from_multiplier(stored),
        }
    }
}

/// config.json of the output (the source's, field for field, and `quantization_config`), and
/// hf_quant_config.json where the layout has one. `ignored` are the names and patterns of modules left unquantized.
pub fn quantization_files(
    source: &Map<String, Value>,
    layout: Layout,
    scheme: Scheme,
    ignored: &[String],
) -> (Value, Option<Value>) {
    let (quantization, separate) = match layout {
        Layout::CompressedTensors => (compressed_tensors(scheme, ignored), None),
        Layout::Modelopt => {
            let (inner, outer) = modelopt(scheme, ignored);
            (inner, Some(outer))
        }
    };
    let mut config = source.clone();
    config.insert("quantization_config".into(), quantization);
    (Value::Object(config), separate)
}

fn compressed_tensors(scheme: Scheme, ignored: &[String]) -> Value {
    let args = |dynamic: Value| {
        json!({"num_bits": 4, "type": "float", "symmetric": true, "strategy": "tensor_group",
               "group_size": BLOCK, "dynamic": dynamic, "scale_dtype": "torch.float8_e4m3fn"})
    };
    let inputs = if scheme.quantizes_activations() { args(json!("local")) } else { Value::Null };
    json!({
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "kv_cache_scheme": null,
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "format": "nvfp4-pack-quantized",
            "output_activations": null,
            "weights": args(json!(false)),
            "input_activations": inputs,
        }},
    })
}

fn modelopt(scheme: Scheme, excluded: &[String]) -> (Value, Value) {
    let algorithm = if scheme.quantizes_activations() { "NVFP4" } else { "W4A16_NVFP4" };
    let args = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": BLOCK});
    let mut group = json!({"targets": ["Linear"], "weights": args});
    if scheme.quantizes_activations() {
        group["input_activations"] = args;
    }
    // Loaders recognise the layout by this producer; distq's own name stands in the files' metadata.
    let producer = json!({"name": "modelopt", "version": "0.47.0"});
    let inner = json!({
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": excluded,
        "config_groups": {"group_0": group},
        "producer": producer,
    });
    let outer = json!({
        "producer": producer,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": null,
            "group_size": BLOCK,
            "exclude_modules": excluded,
        },
    });
    (inner, outer)
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_name(self, f)
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_name(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(name: &str) -> Value {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config_examples").join(name);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn files(layout: Layout, scheme: Scheme) -> (Value, Option<Value>) {
        let source = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64});
        let ignored: &[&str] = match layout {
            Layout::CompressedTensors => &["lm_head"],
            Layout::Modelopt => &["lm_head", "model.embed_tokens"],
        };
        let ignored: Vec<String> = ignored.iter().map(|name| name.to_string()).collect();
        quantization_files(source.as_object().unwrap(), layout, scheme, &ignored)
    }

    #[test]
    fn the_rest_of_the_configuration_is_the_source_in_its_order() {
        let (config, _) = files(Layout::CompressedTensors, Scheme::Nvfp4);
        let keys: Vec<&String> = config.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["architectures", "hidden_size", "quantization_config"]);
    }

    #[test]
    fn compressed_tensors_is_what_was_seen_to_load() {
        for (scheme, name) in [(Scheme::Nvfp4, "minimal_w4a4.json"), (Scheme::Nvfp4a16, "minimal_w4a16.json")]
        {
            let (config, separate) = files(Layout::CompressedTensors, scheme);
            let expected = example(&format!("compressed_tensors/{name}"));
            let expected = expected.get("quantization_config").unwrap_or(&expected);
            assert_eq!(&config["quantization_config"], expected, "{name}");
            assert_eq!(separate, None);
        }
    }

    #[test]
    fn modelopt_is_what_modelopt_exports() {
        for (scheme, name) in [(Scheme::Nvfp4, "w4a4.json"), (Scheme::Nvfp4a16, "w4a16.json")] {
            let (config, separate) = files(Layout::Modelopt, scheme);
            let expected = example(&format!("modelopt/{name}"));
            assert_eq!(config["quantization_config"], expected["config.json:quantization_config"], "{name}");
            assert_eq!(separate.unwrap(), expected["hf_quant_config.json"], "{name}");
        }
    }
}
