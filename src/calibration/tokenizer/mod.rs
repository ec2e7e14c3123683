//! The checkpoint's own tokenizer, whatever file it comes in.

mod added;
mod merges;
mod sentencepiece;
mod tekken;

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer as Library;

use crate::confined;
use crate::error::{Error, Result};

/// A tokenizer, ready for text.
pub struct Tokenizer {
    library: Library,
    path: PathBuf,
    /// Characters that are removed at the beginning of a text.
    removed_in_front: &'static [char],
}

/// Bytes of text that surely hold a token, for the first try.
const BYTES_A_TOKEN: usize = 64;

/// Tokens before the end of a text that was cut which the cut may have changed.
const SPOILED: usize = 64;

impl Tokenizer {
    /// The tokenizer in `model`: tokenizer.json, or what Transformers would make of tekken.json or tokenizer.model.
    ///
    /// # Errors
    /// Exit code 3: none of them is there, or the one that is can't be used.
    pub fn of(model: &Path) -> Result<Tokenizer> {
        let names = ["tokenizer.json", "tekken.json", "tokenizer.model"];
        let Some(name) = names.into_iter().find(|name| model.join(name).exists()) else {
            return Err(Error::input(
                "there is no tokenizer.json, tekken.json or tokenizer.model to tokenize text with",
            )
            .file(model)
            .fix(format!("{}, or give --calib a file with input_ids", make_json(model))));
        };
        let path = model.join(name);
        let remedy = match name {
            "tokenizer.json" => "download tokenizer.json again".to_string(),
            _ => make_json(model),
        };
        confined::suspect("the tokenizer", &path, &remedy);
        let bad =
            |e: String| Error::input(format!("the tokenizer can't be used: {e}")).file(&path).fix(&*remedy);
        let read = || std::fs::read(&path).map_err(|e| format!("can't read it: {e}"));
        let mut removed_in_front: &[char] = &[];
        let library = match name {
            "tokenizer.json" => read().and_then(|bytes| loaded(&bytes)),
            "tekken.json" => {
                read().and_then(|bytes| loaded(tekken::converted(&bytes)?.to_string().as_bytes()))
            }
            _ => read().and_then(|bytes| {
                let (converted, removed) = sentencepiece::converted(&bytes, &config(model))?;
                removed_in_front = removed;
                loaded(converted.to_string().as_bytes())
            }),
        };
        let mut library = library.map_err(bad)?;
        added::add(&mut library, model, &config(model)).map_err(|e| {
            Error::input(format!("the added tokens can't be used: {e}"))
                .file(model.join("tokenizer_config.json"))
                .fix("download the file again")
        })?;
        Ok(Tokenizer { library, path, removed_in_front })
    }

    /// The first `enough` token ids of a text, and perhaps more. Special tokens that the tokenizer adds by itself, such
    /// as a first BOS, are there where `special` is true.
    ///
    /// # Errors
    /// Exit code 3: the tokenizer can't tokenize it.
    pub fn encode(&self, text: &str, special: bool, enough: usize) -> Result<Vec<u32>> {
        confined::suspect("the tokenizer", &self.path, "download the tokenizer again");
        let text = text.trim_start_matches(self.removed_in_front);
        let mut bytes = enough.saturating_add(SPOILED).saturating_mul(BYTES_A_TOKEN);
        loop {
            // Only the beginning of a long text is tokenized, because only that is used.
            let beginning = beginning(text, bytes);
            let encoding = self.library.encode_fast(beginning, special).map_err(|e| {
                Error::input(format!("the tokenizer can't tokenize a document: {e}"))
                    .file(&self.path)
                    .fix("download the tokenizer again")
            })?;
            let ids = encoding.get_ids();
            if beginning.len() == text.len() || ids.len() >= enough.saturating_add(SPOILED) {
                return Ok(ids.to_vec());
            }
            bytes = bytes.saturating_mul(4);
        }
    }
}

/// As much of a text as fits into so many bytes.
fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// The command that makes tokenizer.json of what else there is.
fn make_json(model: &Path) -> String {
    format!(
        "make tokenizer.json with Transformers: python3 -c \"from transformers import AutoTokenizer; \
         AutoTokenizer.from_pretrained('{0}').save_pretrained('{0}')\"",
        model.display()
    )
}

fn loaded(json: &[u8]) -> Result<Library, String> {
    let mut library = Library::from_bytes(json).map_err(|e| e.to_string())?;
    // Some checkpoints ship with truncation or padding switched on, which would change the documents.
    library.with_truncation(None).map_err(|e| e.to_string())?;
    library.with_padding(None);
    Ok(library)
}

/// tokenizer_config.json, or null.
fn config(model: &Path) -> Value {
    json_in(&model.join("tokenizer_config.json"))
}

fn json_in(path: &Path) -> Value {
    std::fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests;
