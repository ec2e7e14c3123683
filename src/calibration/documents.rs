//! Where documents come from: a file, or the set inside the binary.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::chat::conversation::Conversation;
use super::reader;
use crate::error::{Error, Result};

/// One document before tokenizing.
#[derive(Clone, Debug, PartialEq)]
pub enum Document {
    /// Plain text.
    Text(String),
    /// A conversation for the chat template.
    Conversation(Conversation),
    /// Token ids, taken as they are.
    Ids(Vec<u32>),
}

/// One row of a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where it stands in the source.
    pub place: Place,
    /// Its document, or what keeps it from being one.
    pub document: Result<Document, String>,
}

/// Where a row stands: a unit that people count in, and its number from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub &'static str, pub usize);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.1)
    }
}

/// The rows of a source, in its order. An error is the file's and ends the rows.
pub type Rows = Box<dyn Iterator<Item = Result<Row>>>;

/// Where documents come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The set inside the binary.
    Builtin,
    /// A file of JSON, plain text or Parquet.
    File(PathBuf),
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Source> {
        Ok(if text == "builtin" { Source::Builtin } else { Source::File(text.into()) })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Builtin => f.write_str("builtin"),
            Source::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Public-domain prose, documents separated by lines of one `%`.
const BUILTIN: &str = include_str!("builtin.txt");

impl Source {
    /// Opens the source; rows are read as they are asked for.
    ///
    /// # Errors
    /// Exit code 3: a file that can't be read or whose kind is unknown.
    pub fn rows(&self) -> Result<Rows> {
        match self {
            Source::Builtin => Ok(Box::new(BUILTIN.split("\n%\n").enumerate().map(|(index, text)| {
                let document = Ok(Document::Text(text.trim().to_string()));
                Ok(Row { place: Place("document", index + 1), document })
            }))),
            Source::File(path) => reader::rows(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_set_is_large_enough_for_the_defaults() {
        let rows: Vec<Row> = Source::Builtin.rows().unwrap().map(Result::unwrap).collect();
        let long = |row: &&Row| matches!(&row.document, Ok(Document::Text(text)) if text.len() > 1000);
        assert!(rows.iter().filter(long).count() >= 256);
    }
}
