//! Text to evaluate on: one long string, cut into windows.

use std::path::Path;

use super::tokenize::Tokenize;
use crate::confined::{self, Limits};
use crate::error::{Error, Result};

/// Tokenizes the file `text` as one string, without special tokens, with the tokenizer of `model`, and cuts it
/// into consecutive windows of `length` tokens: `windows` of them, or as many as there are.
///
/// # Errors
/// Exit code 3: no such file, no tokenizer, text shorter than what is asked for.
pub fn windows(model: &Path, text: &Path, length: usize, windows: Option<usize>) -> Result<Vec<Vec<u32>>> {
    let content = std::fs::read_to_string(text).map_err(|e| {
        Error::input(format!("can't read: {e}")).file(text).fix("give --text a file of UTF-8 text")
    })?;
    let enough = windows.map_or(usize::MAX, |windows| windows.saturating_mul(length));
    let (model, limits) = (model.to_path_buf(), Limits::for_text(content.len()));
    let ids = confined::run(limits, move || Tokenize::new(&model).plain(&content, enough))?;
    let there = ids.len() / length;
    let wanted = windows.unwrap_or(there.max(1));
    if there < wanted {
        return Err(Error::input(format!(
            "{} tokens are {there} windows of {length}, {wanted} are needed",
            ids.len()
        ))
        .file(text)
        .fix("give a longer text, or fewer --windows, or smaller --window-tokens"));
    }
    Ok(ids.chunks_exact(length).take(wanted).map(<[u32]>::to_vec).collect())
}
