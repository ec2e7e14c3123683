//! Files beside the weights that the output needs to be usable.

use std::path::Path;

use super::writer::failed;
use crate::error::{Error, Result};

const NAMES: [&str; 14] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.model.v3",
    "vocab.json",
    "vocab.txt",
];

/// Whether a file of the source is carried over byte for byte. Mistral's own `consolidated*` and
/// `params.json` are not: engines prefer them over the quantized files.
pub fn is_side_file(name: &str) -> bool {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
    NAMES.contains(&name)
        || (starts(&["tokenizer", "chat_template"]) && ends(&[".json", ".jinja", ".model"]))
        || ends(&[".model", ".py"])
        || starts(&["LICENSE", "NOTICE", "USE_POLICY"])
}

/// Copies the side files of `source` into `out`, in name order, and returns their names.
///
/// # Errors
/// Exit code 3 where a file can't be read, 5 where one can't be written.
pub fn copy_side_files(source: &Path, out: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(source).map_err(|e| failed("can't list", source, e))?;
    let mut names: Vec<String> = entries
        .flatten()
        // Not `is_file`: a link to a file that is gone must be an error, not a tokenizer left out.
        .filter(|entry| !entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_side_file(name))
        .collect();
    names.sort();
    for name in &names {
        let path = source.join(name);
        let bytes = std::fs::read(&path).map_err(|e| {
            Error::input(format!("can't read: {e}"))
                .file(&path)
                .fix("download the file again, then use --resume")
        })?;
        // Written rather than copied: a read-only source must not make a read-only output.
        std::fs::write(out.join(name), bytes).map_err(|e| failed("can't write", &out.join(name), e))?;
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_nothing_is_an_error() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink("/nowhere", source.path().join("tokenizer.json")).unwrap();
        let error = copy_side_files(source.path(), out.path()).unwrap_err();
        assert_eq!(error.exit, crate::error::ExitCode::Input);
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn what_loaders_need_is_carried_over_and_weights_are_not() {
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "chat_template.jinja",
            "generation_config.json",
            "vocab.json",
            "merges.txt",
            "modeling_custom.py",
            "LICENSE.txt",
        ] {
            assert!(is_side_file(name), "{name}");
        }
        for name in [
            "config.json",
            "params.json",
            "consolidated.safetensors",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "README.md",
            "hf_quant_config.json",
        ] {
            assert!(!is_side_file(name), "{name}");
        }
    }
}
