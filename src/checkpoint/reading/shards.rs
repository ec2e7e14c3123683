//! Which files of a directory hold its weights: one file, the shards that an index names, or shards whose names count
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::directory;
use crate::error::{Error, LONGEST_NAME, Result, printable, quoted};

/// The file of a checkpoint that is not sharded.
const SINGLE: &str = "model.safetensors";
/// Where a sharded checkpoint says which tensor is in which shard.
pub const INDEX: &str = "model.safetensors.index.json";
/// A model of a trillion parameters has an index of some 20 MB.
const LARGEST_INDEX: u64 = 128 << 20;

/// The files that hold the weights.
#[derive(Debug, PartialEq)]
pub struct Shards {
    /// Their names.
    pub files: Vec<String>,
    /// The index's file for each tensor, where there is an index.
    pub listed: Option<BTreeMap<String, String>>,
    /// What a user should know of the choice.
    pub notes: Vec<String>,
}

/// Finds the weights of a directory.
///
/// # Errors
/// Exit code 3: no safetensors weights (what is there instead is named), missing shards, or two sets of weights of
/// which loaders take different ones.
pub fn find(dir: &Path) -> Result<Shards> {
    let there = names(dir);
    let safetensors: BTreeSet<&String> = there.iter().filter(|name| name.ends_with(".safetensors")).collect();
    let counted = counted(&safetensors);
    let (files, listed, mut notes) = if there.contains(INDEX) {
        let listed = read_index(dir)?;
        let files: BTreeSet<String> = listed.values().cloned().collect();
        complete(dir, &files, &there)?;
        if there.contains(SINGLE) && !files.contains(SINGLE) {
            return Err(two_sets(dir, &format!("the shards that {INDEX} names"), INDEX));
        }
        (files.into_iter().collect(), Some(listed), vec![])
    } else if there.contains(SINGLE) {
        if let Some((kind, shards)) = counted.first_key_value() {
            let first = shards.values().next().map_or("", |name| name.as_str());
            return Err(two_sets(dir, &format!("{} of {} shards ({first})", shards.len(), kind.1), first));
        }
        (vec![SINGLE.to_string()], None, vec![])
    } else {
        let files = all_counted(dir, &counted, &there)?;
        let note = format!(
            "there is no {INDEX}; the {} shards that count themselves are taken together",
            files.len()
        );
        (files, None, vec![note])
    };
    let unused: Vec<String> = safetensors.into_iter().filter(|name| !files.contains(name)).cloned().collect();
    if !unused.is_empty() {
        notes.push(format!("ignored, because they don't belong to the model's weights: {}", some(&unused)));
    }
    Ok(Shards { files, listed, notes })
}

/// Whether a directory has weights, complete or not.
pub fn any(dir: &Path) -> bool {
    names(dir).iter().any(|name| name == INDEX || name.ends_with(".safetensors"))
}

/// The names of a list that a message has room for.
pub fn some(names: &[String]) -> String {
    const MOST: usize = 12;
    let shown: Vec<String> = names.iter().take(MOST).map(|name| printable(name, LONGEST_NAME)).collect();
    match names.len().saturating_sub(MOST) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn two_sets(dir: &Path, shards: &str, remove: &str) -> Error {
    Error::input(format!(
        "there are two sets of weights, {SINGLE} and {shards}: Transformers loads the first, vLLM the second"
    ))
    .file(dir)
    .fix(format!("remove what does not belong to the model: {SINGLE}, or {remove} and its shards"))
}

fn complete(dir: &Path, files: &BTreeSet<String>, there: &BTreeSet<String>) -> Result<()> {
    let missing: Vec<String> = files.difference(there).cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    let verb = if missing.len() == 1 { "which is" } else { "which are" };
    let or = if there.contains(SINGLE) {
        format!(", or remove the index if {SINGLE} is the whole model")
    } else {
        String::new()
    };
    Err(Error::input(format!("the index names {}, {verb} missing", some(&missing)))
        .file(dir.join(INDEX))
        .fix(format!("download what is missing: hf download ORG/NAME --local-dir {}{or}", shell(dir))))
}

/// Shards by what their names have in common, `PREFIX-00001-of-00003.safetensors`: the prefix and the number of them,
/// and each by its number. Mistral's own `consolidated` files hold tensors of other names.
type Counted = BTreeMap<(String, u64), BTreeMap<u64, String>>;

fn counted(names: &BTreeSet<&String>) -> Counted {
    let mut counted = Counted::new();
    for name in names {
        let parts = name.strip_suffix(".safetensors").and_then(|stem| stem.rsplit_once("-of-"));
        let parts = parts.and_then(|(left, all)| Some((left.rsplit_once('-')?, all)));
        let Some(((prefix, number), all)) = parts else { continue };
        if let (Ok(number), Ok(all), false) = (number.parse(), all.parse(), prefix == "consolidated") {
            counted.entry((prefix.to_string(), all)).or_default().insert(number, name.to_string());
        }
    }
    counted
}

fn all_counted(dir: &Path, counted: &Counted, there: &BTreeSet<String>) -> Result<Vec<String>> {
    let mut sets = counted.iter();
    let (Some(((prefix, all), shards)), None) = (sets.next(), sets.next()) else {
        let firsts: Vec<String> =
            counted.values().filter_map(|shards| shards.values().next().cloned()).collect();
        return Err(match firsts.as_slice() {
            [] => no_weights(dir, there),
            _ => Error::input(format!("there is no {INDEX}, and shards of several sets: {}", some(&firsts)))
                .file(dir)
                .fix("remove the shards that don't belong to the model"),
        });
    };
    // Counting begins with 1; some tools begin with 0.
    let first = u64::from(!shards.contains_key(&0));
    if shards.len() as u64 == *all && shards.keys().last() == Some(&(first + all - 1)) {
        return Ok(shards.values().cloned().collect());
    }
    let missing = (first..).find(|number| !shards.contains_key(number)).unwrap_or_default();
    Err(Error::input(format!(
        "there is no {INDEX}, and of {all} shards only {} are there: {prefix}-{missing:05}-of-{all:05}.safetensors is missing",
        shards.len()
    ))
    .file(dir)
    .fix(format!("download what is missing: hf download ORG/NAME --local-dir {}", shell(dir))))
}

/// What is there instead of safetensors weights.
fn no_weights(dir: &Path, there: &BTreeSet<String>) -> Error {
    let find = |accept: &dyn Fn(&str) -> bool| there.iter().find(|name| accept(name));
    let path = shell(dir);
    if let Some(name) = find(&|name| name.starts_with("adapter_")) {
        return Error::input("this is an adapter (LoRA), not a model").file(dir.join(name)).fix(format!(
            "merge it into its base model first: (cd {path} && python3 -c \"from peft import AutoPeftModelForCausalLM as M; \
             M.from_pretrained('.', dtype='auto').merge_and_unload().save_pretrained('MERGED')\")"
        ));
    }
    if let Some(name) = find(&|name| name.starts_with("consolidated")) {
        return Error::input(format!("the weights are in Mistral's or Meta's own format, and there is no {SINGLE}"))
            .file(dir.join(name))
            .fix("download the files of the Hugging Face format: hf download ORG/NAME --exclude 'consolidated*' --local-dir DIR");
    }
    if let Some(name) = find(&|name| name.ends_with(".safetensors")) {
        return Error::input(format!("there is neither {SINGLE} nor {INDEX}")).file(dir.join(name)).fix(
            format!("if this file is the whole model, name it {SINGLE}: mv {path}/{name} {path}/{SINGLE}"),
        );
    }
    if let Some(name) = find(&|name| name.ends_with(".gguf")) {
        return Error::input("the weights are in GGUF, which other programs read")
            .file(dir.join(name))
            .fix("download the original checkpoint in BF16, F16 or F32 safetensors");
    }
    let pickled = [".bin", ".pt", ".pth"];
    if let Some(name) = find(&|name| pickled.iter().any(|end| name.ends_with(end))) {
        return Error::input("the weights are in PyTorch's format, which may run code when it is read")
            .file(dir.join(name))
            .fix(format!(
                "convert them to safetensors: (cd {path} && python3 -c \"from transformers import AutoModelForCausalLM as M; \
                 M.from_pretrained('.', dtype='auto').save_pretrained('CONVERTED')\")"
            ));
    }
    Error::input(format!("there are no weights: neither {SINGLE} nor {INDEX}"))
        .file(dir)
        .fix("use a directory with safetensors weights; convert .bin files first")
}

fn shell(path: &Path) -> String {
    quoted(&path.display().to_string())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn read_index(dir: &Path) -> Result<BTreeMap<String, String>> {
    let fix = "download the index again";
    let wrong = |what: String| Error::input(what).file(dir.join(INDEX)).fix(fix);
    let Index { weight_map } = serde_json::from_slice(&directory::read(dir, INDEX, LARGEST_INDEX)?)
        .map_err(|e| wrong(format!("this is no valid index: {e}")))?;
    let is_name = |file: &str| !file.contains('/') && file.ends_with(".safetensors");
    match weight_map.iter().find(|(_, file)| !is_name(file)) {
        _ if weight_map.is_empty() => Err(wrong("weight_map names no tensor".into())),
        Some((tensor, file)) => {
            Err(wrong(format!("{file:?} is not the name of a safetensors file beside the index"))
                .tensor(tensor))
        }
        None => Ok(weight_map),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[&str], index: Option<&str>) -> Result<Shards> {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|name| std::fs::write(dir.path().join(name), "").unwrap());
        if let Some(index) = index {
            std::fs::write(dir.path().join(INDEX), index).unwrap();
        }
        find(dir.path())
    }

    #[test]
    fn shards_that_count_themselves_need_no_index() {
        for files in [
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["pytorch_model-0-of-2.safetensors", "pytorch_model-1-of-2.safetensors"],
        ] {
            let shards = found(&files, None).unwrap();
            assert_eq!(shards.files, files);
            assert!(shards.notes[0].contains("no model.safetensors.index.json"), "{:?}", shards.notes);
        }
        let beside = found(&["model-1-of-1.safetensors", "consolidated-1-of-2.safetensors"], None).unwrap();
        assert_eq!(beside.files, ["model-1-of-1.safetensors"]);
        assert!(beside.notes[1].contains("consolidated-1-of-2.safetensors"), "{:?}", beside.notes);
    }

    #[test]
    fn incomplete_and_doubtful_sets_are_refused_by_name() {
        let index = r#"{"weight_map": {"a": "a-1-of-1.safetensors"}}"#;
        for (files, index, words) in [
            (
                &["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"][..],
                None,
                "model-00002-of-00003.safetensors is missing",
            ),
            (
                &["model-00002-of-99999999999999999.safetensors"],
                None,
                "model-00001-of-99999999999999999.safetensors is missing",
            ),
            (&["model-1-of-1.safetensors", "model-1-of-2.safetensors"], None, "several sets"),
            (&["model.safetensors", "model-1-of-2.safetensors"], None, "two sets of weights"),
            (&["model.safetensors", "a-1-of-1.safetensors"], Some(index), "model.safetensors.index.json"),
            (&["model.safetensors"], Some(index), "the index names a-1-of-1.safetensors, which is missing"),
            (&["consolidated.safetensors"], None, "own format"),
            (&["adapter_model.safetensors", "adapter_config.json"], None, "merge"),
            (&["weights.safetensors"], None, "mv "),
            (&["model-Q4_K_M.gguf"], None, "GGUF"),
            (&["pytorch_model.bin"], None, "convert them to safetensors"),
            (&[], None, "no weights"),
            (&[], Some(r#"{"weight_map": {"a": "../a.safetensors"}}"#), "is not the name"),
            (&[], Some(r#"{"weight_map": {"a": ".."}}"#), "is not the name"),
            (&[], Some(r#"{"weight_map": {"a": 1}}"#), "line 1"),
            (&[], Some(r#"{"weight_map": {}}"#), "names no tensor"),
            (&[], Some("{}"), "weight_map"),
        ] {
            let error = found(files, index).unwrap_err();
            assert!(error.to_string().contains(words), "{files:?}: {error}");
            assert_eq!(error.exit, crate::error::ExitCode::Input);
        }
    }

    #[test]
    fn what_the_index_does_not_name_is_ignored_and_said() {
        let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-1.safetensors"}}"#;
        let shards = found(&["m-1.safetensors", "model-00009-of-00009.safetensors"], Some(index)).unwrap();
        assert_eq!(shards.files, ["m-1.safetensors"]);
        assert!(shards.notes[0].contains("model-00009-of-00009.safetensors"), "{:?}", shards.notes);
    }
}
