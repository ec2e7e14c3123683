//! Which linears stay in their source dtype.

use std::collections::BTreeSet;

use regex::Regex;

use crate::error::{Error, Result};
use crate::model::Model;

/// The modules that `patterns` leave unquantized, lm_head always among them.
///
/// A pattern is a module name in which `*` stands for anything, or `re:` and a regular expression that
/// matches from the start, as in compressed-tensors.
///
/// # Errors
/// Exit code 2: a bad expression, a pattern that matches nothing, a fused group matched in part.
pub fn ignored_modules(model: &Model, patterns: &[String]) -> Result<BTreeSet<String>> {
    let modules: Vec<&str> =
        model.linears().map(|linear| linear.name.as_str()).chain([model.head.as_str()]).collect();
    let mut ignored = BTreeSet::from([model.head.clone()]);
    for pattern in patterns {
        let expression = expression(pattern)?;
        let matched: Vec<&&str> = modules.iter().filter(|name| expression.is_match(name)).collect();
        if matched.is_empty() {
            return Err(Error::usage(format!("--ignore {pattern:?} matches no linear"))
                .fix("write full module names like model.layers.0.mlp.down_proj, with * for any part"));
        }
        ignored.extend(matched.into_iter().map(|name| name.to_string()));
    }
    for fused in model.layers.iter().flat_map(|layer| layer.fused()) {
        let names: Vec<&str> = fused.iter().map(|linear| linear.name.as_str()).collect();
        let hit = names.iter().filter(|name| ignored.contains(**name)).count();
        if hit != 0 && hit != names.len() {
            return Err(Error::usage(format!("--ignore leaves out a part of {}", names.join(", ")))
                .fix("ignore all of them or none: engines merge them into one matrix"));
        }
    }
    Ok(ignored)
}

fn expression(pattern: &str) -> Result<Regex> {
    let source = match pattern.strip_prefix("re:") {
        Some(source) => format!("^(?:{source})"),
        None => format!("^{}$", regex::escape(pattern).replace(r"\*", ".*")),
    };
    Regex::new(&source).map_err(|error| {
        Error::usage(format!("--ignore {pattern:?}: {error}"))
            .fix("write a valid regular expression after re:")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ignored(patterns: &[&str]) -> Result<BTreeSet<String>> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_hidden_layers": 12, "vocab_size": 100
        });
        let model = Model::parse(config.as_object().unwrap(), &|_| false).unwrap();
        ignored_modules(&model, &patterns.iter().map(|p| p.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn lm_head_is_always_left_alone() {
        assert_eq!(ignored(&[]).unwrap().into_iter().collect::<Vec<_>>(), ["lm_head"]);
        assert_eq!(ignored(&["lm_head"]).unwrap().len(), 1);
    }

    #[test]
    fn a_layer_pattern_does_not_reach_other_layers() {
        let names = ignored(&["model.layers.1.self_attn.*"]).unwrap();
        assert_eq!(names.len(), 5);
        assert!(names.iter().all(|name| name == "lm_head" || name.starts_with("model.layers.1.")));
    }

    #[test]
    fn expressions_match_from_the_start() {
        assert_eq!(ignored(&[r"re:.*\.down_proj"]).unwrap().len(), 13);
        assert!(ignored(&["re:down_proj"]).is_err());
    }

    #[test]
    fn bad_patterns_are_named() {
        for pattern in ["*.q_proj", "re:*", "model.layers.99.*", "gate"] {
            let error = ignored(&[pattern]).unwrap_err();
            assert_eq!(error.exit, crate::error::ExitCode::Usage);
            assert!(error.to_string().contains("--ignore"), "{error}");
        }
    }
}
