//! Documents to token ids, with the checkpoint's own tokenizer and chat template.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::chat::template::ChatTemplate;
use super::documents::Document;
use super::tokenizer::Tokenizer;
use crate::confined;
use crate::error::Result;

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

    /// A document's first `enough` token ids, and perhaps more; or why this document has none. Plain text gets the
    /// special tokens that the tokenizer adds by itself (such as a first BOS); a rendered conversation holds its own.
    ///
    /// # Errors
    /// Exit code 3: no usable tokenizer, a chat template that does not work.
    pub fn ids(&mut self, document: Document, enough: usize) -> Result<Result<Vec<u32>, String>> {
        match document {
            Document::Ids(ids) => Ok(Ok(ids)),
            Document::Text(text) => self.encode(&text, true, enough).map(Ok),
            Document::Conversation(conversation) => {
                if self.template.is_none() {
                    self.template = Some(ChatTemplate::of(&self.model)?);
                }
                match self.template.as_ref().and_then(Option::as_ref) {
                    Some(template) => {
                        confined::suspect(
                            "the chat template",
                            &self.model,
                            "calibrate with text instead of messages",
                        );
                        match template.render(&conversation)? {
                            Ok(text) => self.encode(&text, false, enough).map(Ok),
                            Err(reason) => Ok(Err(reason)),
                        }
                    }
                    None => self.encode(&joined(&conversation.messages), true, enough).map(Ok),
                }
            }
        }
    }

    /// The first `enough` ids of text as it stands, and perhaps more, without special tokens.
    ///
    /// # Errors
    /// Exit code 3: no usable tokenizer.
    pub fn plain(&mut self, text: &str, enough: usize) -> Result<Vec<u32>> {
        self.encode(text, false, enough)
    }

    /// Whether a conversation was tokenized without a template.
    pub fn lacks_template(&self) -> bool {
        matches!(self.template, Some(None))
    }

    /// Whether conversations' tokens hold the date that templates ask for.
    pub fn holds_a_date(&self) -> bool {
        matches!(&self.template, Some(Some(template)) if template.asks_for_the_date())
    }

    fn encode(&mut self, text: &str, special: bool, enough: usize) -> Result<Vec<u32>> {
        if self.tokenizer.is_none() {
            self.tokenizer = Some(Tokenizer::of(&self.model)?);
        }
        self.tokenizer.as_ref().expect("just loaded").encode(text, special, enough)
    }
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
