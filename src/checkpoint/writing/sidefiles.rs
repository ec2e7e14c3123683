//! Files beside the weights that the output needs to be usable.

use std::path::Path;

use super::writer::failed;
use crate::checkpoint::reading::directory;
use crate::error::Result;

/// Files that a tokenizer, a processor or a chat template of some model is read from. What begins with `tokenizer` or
/// `chat_template` needs no entry.
const NAMES: [&str; 18] = [
    "SYSTEM_PROMPT.txt",
    "added_tokens.json",
    "audio_preprocessor_config.json",
    "chat_template.json",
    "encoder.json",
    "generation_config.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "video_preprocessor_config.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
    "vocab.tiktoken",
    "vocabulary.txt",
];

/// Chat templates beside the default one, as Transformers keeps them.
pub(in crate::checkpoint) const TEMPLATES: &str = "additional_chat_templates";

/// No tokenizer is larger; weights are.
const LARGEST: u64 = 256 << 20;

/// Whether a file of the source is carried over byte for byte. Mistral's own `consolidated*` and
/// `params.json` are not: engines prefer them over the quantized files.
pub fn is_side_file(name: &str) -> bool {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| name.ends_with(suffix));
    let license = name.to_ascii_uppercase();
    match name.split_once('/') {
        Some((TEMPLATES, template)) => template.ends_with(".jinja") && !template.contains('/'),
        Some(_) => false,
        None => {
            NAMES.contains(&name)
                || (starts(&["tokenizer", "chat_template"]) && ends(&[".json", ".jinja", ".model"]))
                || starts(&["tokenizer.model.v"])
                || ends(&[".model", ".tiktoken", ".jinja", ".py"])
                || ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY"]
                    .iter()
                    .any(|prefix| license.starts_with(prefix))
        }
    }
}

/// The side files of a directory, in name order, each looked at: it can be opened, is not too large and is what it
/// seems to be.
///
/// # Errors
/// Exit code 3, naming the file that is not, or the link that leads out of the directory.
pub fn side_files(dir: &Path) -> Result<Vec<String>> {
    let list = |folder: &Path, prefix: &str| -> Vec<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        // Not `is_file`: a link to a file that is gone must be an error, not a tokenizer left out.
        entries
            .filter(|entry| !entry.path().is_dir())
            .filter_map(|entry| Some(format!("{prefix}{}", entry.file_name().to_str()?)))
            .filter(|name| is_side_file(name))
            .collect()
    };
    let mut names = list(dir, "");
    names.extend(list(&dir.join(TEMPLATES), &format!("{TEMPLATES}/")));
    names.sort();
    names.iter().try_for_each(|name| directory::check(dir, name, LARGEST))?;
    Ok(names)
}

/// What else is in the directory, and stays behind: names of files, and of folders with a slash. `used` are those that
/// hold the weights.
pub fn left_behind(dir: &Path, used: &[&str]) -> Vec<String> {
    let described = ["config.json", "model.safetensors.index.json"];
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path().is_dir())))
        .filter(|(name, folder)| match folder {
            true => name != TEMPLATES,
            false => {
                !is_side_file(name) && !used.contains(&name.as_str()) && !described.contains(&name.as_str())
            }
        })
        .filter(|(name, _)| !name.starts_with('.'))
        .map(|(name, folder)| if folder { name + "/" } else { name })
        .collect();
    names.sort();
    names
}

/// Copies the side files of `source` into `out`, in name order, and returns their names.
///
/// # Errors
/// Exit code 3 where a file can't be read, 5 where one can't be written.
pub fn copy_side_files(source: &Path, out: &Path) -> Result<Vec<String>> {
    let names = side_files(source)?;
    for name in &names {
        let (bytes, to) = (directory::read(source, name, LARGEST)?, out.join(name));
        if let Some(folder) = to.parent().filter(|_| name.contains('/')) {
            std::fs::create_dir_all(folder).map_err(|e| failed("can't make the folder", folder, e))?;
        }
        // Written rather than copied: a read-only source must not make a read-only output.
        std::fs::write(&to, bytes).map_err(|e| failed("can't write", &to, e))?;
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
    fn links_are_followed_inside_the_directory_and_its_cache_only() {
        use std::os::unix::fs::symlink;
        let place = tempfile::tempdir().unwrap();
        let (blobs, dir) = (place.path().join("blobs"), place.path().join("snapshots/abc"));
        let out = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(dir.join("kept")).unwrap();
        std::fs::write(blobs.join("1"), "blob").unwrap();
        std::fs::write(dir.join("kept/LICENSE"), "inside").unwrap();
        symlink("../../blobs/1", dir.join("tokenizer.json")).unwrap();
        symlink("kept/LICENSE", dir.join("LICENSE")).unwrap();
        assert_eq!(copy_side_files(&dir, out.path()).unwrap(), ["LICENSE", "tokenizer.json"]);
        assert_eq!(std::fs::read(out.path().join("tokenizer.json")).unwrap(), b"blob");

        std::fs::write(place.path().join("secret"), "key").unwrap();
        for target in ["../../secret", "/dev/zero", "/proc/self/environ"] {
            let link = dir.join("NOTICE");
            symlink(target, &link).unwrap();
            let error = copy_side_files(&dir, out.path()).unwrap_err();
            assert_eq!(error.exit, crate::error::ExitCode::Input);
            assert!(error.to_string().contains("NOTICE") && error.to_string().contains("out of"), "{error}");
            std::fs::remove_file(&link).unwrap();
        }
    }

    #[test]
    fn what_is_no_file_or_not_yet_one_is_refused_without_reading_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let refused = |words: &str| {
            let error = side_files(dir.path()).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("tokenizer.json"), "{error}");
            std::fs::remove_file(&path).unwrap();
        };
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        refused("no regular file");
        std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        refused("1.00 TiB");
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n";
        std::fs::write(&path, pointer).unwrap();
        refused("lfs pull");
    }

    #[test]
    fn what_stays_behind_is_known() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("original")).unwrap();
        for name in ["config.json", "model.safetensors", "optimizer.pt", "tokenizer.json", ".gitattributes"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(left_behind(dir.path(), &["model.safetensors"]), ["optimizer.pt", "original/"]);
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
            "license",
            "tokenizer.model.v7m1",
            "qwen.tiktoken",
            "SYSTEM_PROMPT.txt",
            "tekken.json",
            "chat_template.json",
            "additional_chat_templates/tool_use.jinja",
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
            "optimizer.pt",
            "training_args.bin",
            "trainer_state.json",
            "model-Q4_K_M.gguf",
            "adapter_config.json",
            "additional_chat_templates/../config.jinja/x",
            "original/tokenizer.model",
        ] {
            assert!(!is_side_file(name), "{name}");
        }
    }
}
