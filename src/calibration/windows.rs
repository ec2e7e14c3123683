//! Text to evaluate on: one long string, cut into windows.

use std::path::{Path, PathBuf};

use super::tokenize::Tokenize;
use crate::confined::{self, Limits};
use crate::error::{Error, Result};
use crate::units::counted;

/// How a file of text is cut.
pub struct Windows<'a> {
    /// The file.
    pub file: &'a Path,
    /// Tokens of a window.
    pub length: usize,
    /// How many; as many as there are where none is given.
    pub count: Option<usize>,
}

/// Files that hold a tokenizer.
const TOKENIZERS: [&str; 3] = ["tokenizer.json", "tokenizer.model", "tekken.json"];

impl Windows<'_> {
    /// Tokenizes the file as one string, without special tokens, and cuts it into consecutive windows. Checkpoints that
    /// have a tokenizer must agree on the tokens; one that has none sees the others'.
    ///
    /// # Errors
    /// Exit code 3: no such file, no tokenizer, tokenizers that disagree, text shorter than what is asked for.
    pub fn of(&self, checkpoints: &[PathBuf]) -> Result<Vec<Vec<u32>>> {
        let content = std::fs::read_to_string(self.file).map_err(|e| {
            Error::input(format!("can't read: {e}")).file(self.file).fix("give --text a file of UTF-8 text")
        })?;
        let mut found: Option<(&PathBuf, Vec<Vec<u32>>)> = None;
        for dir in checkpoints.iter().filter(|dir| TOKENIZERS.iter().any(|name| dir.join(name).exists())) {
            let windows = self.cut(self.tokens(dir, &content)?)?;
            match &found {
                None => found = Some((dir, windows)),
                Some((_, first)) if *first == windows => {}
                Some((first, _)) => {
                    return Err(Error::input(format!(
                        "its tokenizer makes other tokens of the text than that of {}, so they can't be compared",
                        first.display()
                    ))
                    .file(dir)
                    .fix("evaluate each of them in a run of its own"));
                }
            }
        }
        found.map(|(_, windows)| windows).ok_or_else(|| {
            Error::input("there is no tokenizer in any of the checkpoints")
                .file(&checkpoints[0])
                .fix("copy tokenizer.json from the model that the checkpoint was made of into its directory")
        })
    }

    fn tokens(&self, dir: &Path, content: &str) -> Result<Vec<u32>> {
        let enough = self.count.map_or(usize::MAX, |count| count.saturating_mul(self.length));
        let (dir, text) = (dir.to_path_buf(), content.to_string());
        confined::run(Limits::for_text(content.len()), move || Tokenize::new(&dir).plain(&text, enough))
            .map_err(|error| {
                error.fix(
                    "put the tokenizer files of the model that the checkpoint was made of into its directory",
                )
            })
    }

    fn cut(&self, ids: Vec<u32>) -> Result<Vec<Vec<u32>>> {
        let there = ids.len() / self.length;
        let wanted = self.count.unwrap_or(there.max(1));
        if there < wanted {
            return Err(Error::input(format!(
                "the text has {}, which is {there} windows of {}, and {wanted} are needed",
                counted(ids.len(), "token", "tokens"),
                self.length
            ))
            .file(self.file)
            .fix("give a longer text, or fewer --windows, or smaller --window-tokens"));
        }
        Ok(ids.chunks_exact(self.length).take(wanted).map(<[u32]>::to_vec).collect())
    }
}
