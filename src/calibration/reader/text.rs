//! Plain text: blank lines separate documents.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use super::super::documents::{Document, Place, Row, Rows};
use super::json::{Line, next_line};
use super::{LARGEST, damaged};

/// The documents of a stream of text.
pub fn rows(path: &Path, stream: Box<dyn BufRead>) -> Rows {
    Box::new(Paragraphs { path: path.into(), stream, line: 0 })
}

struct Paragraphs {
    path: PathBuf,
    stream: Box<dyn BufRead>,
    line: usize,
}

impl Iterator for Paragraphs {
    type Item = crate::error::Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut text: Vec<u8> = Vec::new();
        let mut place = None;
        let mut is_too_long = false;
        loop {
            self.line += 1;
            match next_line(&mut *self.stream) {
                Err(e) => return Some(Err(damaged(&self.path, &e))),
                Ok(None) => break,
                Ok(Some(Line::Text(line))) if String::from_utf8_lossy(&line).trim().is_empty() => {
                    if place.is_some() {
                        break;
                    }
                }
                Ok(Some(line)) => {
                    let is_first = place.is_none();
                    place = place.or(Some(Place("line", self.line)));
                    match line {
                        Line::Text(line) if !is_too_long && text.len() + line.len() < LARGEST => {
                            if !is_first {
                                text.push(b'\n');
                            }
                            text.extend(line);
                        }
                        _ => is_too_long = true,
                    }
                }
            }
        }
        let document = match String::from_utf8(text) {
            _ if is_too_long => Err(format!(
                "a document of more than {} MiB: separate documents by blank lines",
                LARGEST >> 20
            )),
            Ok(text) => Ok(Document::Text(text)),
            Err(_) => Err("not UTF-8 text".into()),
        };
        Some(Ok(Row { place: place?, document }))
    }
}
