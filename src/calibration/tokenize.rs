//! Documents to token ids, with the checkpoint's own tokenizer.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use super::documents::Document;
use super::template::ChatTemplate;
use crate::error::{Error, Result};

/// Turns documents into ids; loads the tokenizer when the first text asks for it.
pub struct Tokenize {
    model: PathBuf,
    tokenizer: Option<Tokenizer>,
    template: Option<Option<ChatTemplate>>,
}

impl Tokenize {
    /// For the checkpoint in `model`.
    pub fn new(model: &Path) -> Tokenize {
        Tokenize { model: model.to_path_buf(), tokenizer: None, template: None }
    }

    /// A document's token ids. Plain text gets the special tokens that the tokenizer adds by itself (such as
    /// a first BOS); a rendered conversation holds its own.
    ///
    /// # Errors
    /// Exit code 3: no usable tokenizer.json, a chat template that does not work.
    pub fn ids(&mut self, document: Document) -> Result<Vec<u32>> {
        match document {
            Document::Ids(ids) => Ok(ids),
            Document::Text(text) => self.encode(&text, true),
            Document::Conversation(conversation) => {
                if self.template.is_none() {
                    self.template = Some(ChatTemplate::of(&self.model)?);
                }
                match self.template.as_ref().and_then(Option::as_ref) {
                    Some(template) => {
                        let text = template.render(&conversation)?;
                        let text = text.map_err(|reason| {
                            Error::input(reason)
                                .fix("leave the line out, or calibrate with text instead of messages")
                        })?;
                        self.encode(&text, false)
                    }
                    None => self.encode(&joined(&conversation.messages), true),
                }
            }
        }
    }

    /// The ids of text as it stands, without special tokens.
    ///
    /// # Errors
    /// Exit code 3: no usable tokenizer.json.
    pub fn plain(&mut self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, false)
    }

    /// Whether a conversation was tokenized without a template.
    pub fn lacks_template(&self) -> bool {
        matches!(self.template, Some(None))
    }

    /// Whether conversations' tokens hold the date that templates ask for.
    pub fn holds_a_date(&self) -> bool {
        matches!(&self.template, Some(Some(template)) if template.asks_for_the_date())
    }

    fn encode(&mut self, text: &str, special: bool) -> Result<Vec<u32>> {
        let path = self.model.join("tokenizer.json");
        if self.tokenizer.is_none() {
            self.tokenizer = Some(load(&path)?);
        }
        let tokenizer = self.tokenizer.as_ref().expect("just loaded");
        let encoding = tokenizer
            .encode_fast(text, special)
            .map_err(|e| Error::input(format!("can't tokenize a document: {e}")).file(&path))?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn load(path: &Path) -> Result<Tokenizer> {
    if !path.exists() {
        return Err(Error::input("there is no tokenizer.json to tokenize text with")
            .file(path)
            .fix("add the file to the checkpoint, or give --calib a .jsonl with input_ids"));
    }
    let mut tokenizer = Tokenizer::from_file(path).map_err(|e| {
        Error::input(format!("not a usable tokenizer: {e}")).file(path).fix("download tokenizer.json again")
    })?;
    // Some checkpoints ship with truncation or padding switched on, which would change the documents.
    tokenizer.with_truncation(None).map_err(|e| Error::input(format!("tokenizer: {e}")).file(path))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// A conversation's text, one message after another.
fn joined(messages: &Value) -> String {
    let parts = |content: &Value| match content {
        Value::Array(parts) => {
            parts.iter().filter_map(|part| part["text"].as_str()).map(str::to_string).collect()
        }
        content => content.as_str().map(str::to_string).into_iter().collect::<Vec<_>>(),
    };
    let contents = messages.as_array().into_iter().flatten().flat_map(|message| parts(&message["content"]));
    contents.collect::<Vec<_>>().join("\n\n")
}
