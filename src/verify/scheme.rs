//! Which linears a configuration says are quantized, by the matching rules of its loaders.

use regex::Regex;
use serde_json::{Map, Value};

use crate::checkpoint::Layout;

/// How the configuration says that a linear is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearScheme {
    /// Not quantized.
    Plain,
    /// NVFP4.
    Nvfp4 {
        /// Whether inputs are quantized as well.
        activations: bool,
    },
    /// FP8, in a mixed checkpoint.
    Fp8,
}

/// A configuration's targets and exceptions.
#[derive(Debug, Default)]
pub struct Schemes {
    layout: Option<Layout>,
    /// Target patterns with their scheme, in the order in which they are tried.
    targets: Vec<(String, LinearScheme)>,
    /// Patterns of modules left alone.
    pub ignore: Vec<String>,
}

impl Schemes {
    /// Reads `quantization_config`.
    pub fn of(layout: Option<Layout>, config: Option<&Map<String, Value>>) -> Schemes {
        let Some(quantization) = config.and_then(|config| config.get("quantization_config")) else {
            return Schemes::default();
        };
        let mut schemes = Schemes { layout, targets: vec![], ignore: strings(&quantization["ignore"]) };
        if let Some(layers) = quantization["quantized_layers"].as_object() {
            // ModelOpt's mixed precision names every quantized module.
            for (module, how) in layers {
                schemes
                    .targets
                    .push((module.clone(), algorithm(how["quant_algo"].as_str().unwrap_or_default())));
            }
            return schemes;
        }
        for group in quantization["config_groups"].as_object().into_iter().flat_map(Map::values) {
            let activations = group.get("input_activations").is_some_and(|args| !args.is_null());
            let scheme = match group["weights"]["num_bits"].as_u64() {
                Some(4) => LinearScheme::Nvfp4 { activations },
                Some(8) => LinearScheme::Fp8,
                _ => LinearScheme::Plain,
            };
            schemes.targets.extend(strings(&group["targets"]).into_iter().map(|target| (target, scheme)));
        }
        if layout == Some(Layout::Modelopt) && schemes.targets.is_empty() {
            let algo = algorithm(quantization["quant_algo"].as_str().unwrap_or_default());
            schemes.targets.push(("Linear".into(), algo));
        }
        schemes
    }

    /// The scheme of a module.
    pub fn of_module(&self, module: &str) -> LinearScheme {
        if self.ignore.iter().any(|pattern| self.matches(pattern, module)) {
            return LinearScheme::Plain;
        }
        // A module's own name wins over a pattern, a pattern over its class.
        let exact = self.targets.iter().find(|(target, _)| target == module);
        let pattern = || self.targets.iter().find(|(t, _)| t.starts_with("re:") && self.matches(t, module));
        let class = || self.targets.iter().find(|(target, _)| target == "Linear");
        exact.or_else(pattern).or_else(class).map_or(LinearScheme::Plain, |(_, scheme)| *scheme)
    }

    /// Whether a pattern of `ignore` reaches a module: compressed-tensors takes full names and `re:`
    /// expressions; ModelOpt takes full names, wildcards, and any part of a name.
    pub fn matches(&self, pattern: &str, module: &str) -> bool {
        let compiles = |source: String| Regex::new(&source).is_ok_and(|regex| regex.is_match(module));
        match (self.layout, pattern.strip_prefix("re:")) {
            (_, Some(source)) => compiles(format!("^(?:{source})")),
            (Some(Layout::Modelopt), None) => {
                pattern == module
                    || compiles(format!(
                        "^{}$",
                        regex::escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
                    ))
                    || (!pattern.contains('*') && module.contains(pattern))
            }
            _ => pattern == module,
        }
    }
}

fn algorithm(name: &str) -> LinearScheme {
    match name {
        "NVFP4" => LinearScheme::Nvfp4 { activations: true },
        "W4A16_NVFP4" => LinearScheme::Nvfp4 { activations: false },
        "FP8" => LinearScheme::Fp8,
        _ => LinearScheme::Plain,
    }
}

/// A JSON array's strings.
pub fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patterns_reach_what_loaders_let_them_reach() {
        let of = |layout| Schemes { layout: Some(layout), ..Schemes::default() };
        let (ours, theirs) = (of(Layout::CompressedTensors), of(Layout::Modelopt));
        let module = "model.layers.10.mlp.gate_proj";
        assert!(ours.matches("re:.*gate_proj$", module) && !ours.matches("gate", module));
        assert!(theirs.matches("gate", module), "any part of a name counts");
        assert!(theirs.matches("model.layers.1", module), "layer 1 reaches layer 10");
        assert!(!theirs.matches("model.layers.1.*", module));
    }

    #[test]
    fn the_most_specific_target_wins() {
        let config = json!({"quantization_config": {"ignore": ["lm_head"], "config_groups": {
            "a": {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": null},
            "b": {"targets": ["re:.*o_proj$"], "weights": {"num_bits": 8}, "input_activations": {}},
        }}});
        let schemes = Schemes::of(Some(Layout::CompressedTensors), config.as_object());
        assert_eq!(schemes.of_module("x.q_proj"), LinearScheme::Nvfp4 { activations: false });
        assert_eq!(schemes.of_module("x.o_proj"), LinearScheme::Fp8);
        assert_eq!(schemes.of_module("lm_head"), LinearScheme::Plain);
    }
}
