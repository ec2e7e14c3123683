//! JSON: one value a line, or values that stand in an array or one after another.

use std::io::{self, BufRead};
use std::path::{Path, PathBuf};

use serde_json::{StreamDeserializer, Value};

use super::super::documents::{Document, Place, Row, Rows};
use super::super::row::document_of;
use super::{LARGEST, damaged};

/// How values are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// One a line: a broken line spoils no other.
    Lines,
    /// One after another, each over any number of lines.
    Sequence,
    /// Elements of an array.
    Array,
}

/// Whether text begins with a JSON value, or with as much of one as there is.
pub fn begins(head: &[u8]) -> bool {
    match head.trim_ascii_start().first() {
        Some(b'{' | b'[') => !matches!(first_value(head), First::Broken),
        // A text may begin with a quotation.
        Some(b'"') => serde_json::from_slice::<String>(first_line(head).0).is_ok(),
        _ => false,
    }
}

/// The rows of a file that begins with `head`.
pub fn rows(path: &Path, head: &[u8], stream: Box<dyn BufRead>) -> Rows {
    match layout(head) {
        Layout::Lines => Box::new(Lines { path: path.into(), stream, number: 0 }),
        layout => Box::new(Values {
            path: path.into(),
            stream,
            is_array: layout == Layout::Array,
            number: 0,
            is_done: false,
        }),
    }
}

fn layout(head: &[u8]) -> Layout {
    let (line, more) = first_line(head);
    let is_array = line.trim_ascii_start().starts_with(b"[");
    // A list of numbers is a row of token ids, however long it is and even where it is the only one.
    if is_array && line.trim_ascii_start()[1..].trim_ascii_start().first().is_some_and(u8::is_ascii_digit) {
        return Layout::Lines;
    }
    match (parsed(line).is_ok(), first_value(head)) {
        // A line of its own with others behind it, be it a list of ids or of messages.
        (true, _) if !is_array || more => Layout::Lines,
        _ if is_array => Layout::Array,
        (_, First::Whole) => Layout::Sequence,
        // An object that is longer than the head, on one line or on several.
        (_, First::Unfinished) if line.len() < head.len() => Layout::Sequence,
        _ => Layout::Lines,
    }
}

/// The first line that is not blank, and whether anything follows it.
fn first_line(head: &[u8]) -> (&[u8], bool) {
    let head = head.trim_ascii_start();
    let end = head.iter().position(|&byte| byte == b'\n').unwrap_or(head.len());
    (&head[..end], !head[end..].trim_ascii().is_empty())
}

enum First {
    Whole,
    Unfinished,
    Broken,
}

fn first_value(head: &[u8]) -> First {
    let head = without_nan(head);
    let mut values: StreamDeserializer<_, serde::de::IgnoredAny> =
        serde_json::Deserializer::from_slice(&head).into_iter();
    match values.next() {
        Some(Ok(_)) => First::Whole,
        Some(Err(e)) if !e.is_eof() => First::Broken,
        _ => First::Unfinished,
    }
}

/// JSON as it is written: Python also writes `NaN`, `Infinity` and `-Infinity`, which are read as null.
fn parsed(text: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(text).or_else(|error| {
        let other = without_nan(text);
        if other == text { Err(error) } else { serde_json::from_slice(&other) }
    })
}

/// The text with null in the place of numbers that JSON does not have.
fn without_nan(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let (mut in_string, mut at) = (false, 0);
    while let Some(&byte) = text.get(at) {
        let names: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
        let name = names.into_iter().find(|name| !in_string && text[at..].starts_with(name));
        if let Some(name) = name {
            out.extend(b"null");
            at += name.len();
            continue;
        }
        let taken = if in_string && byte == b'\\' { 2 } else { 1 };
        in_string ^= byte == b'"';
        out.extend(&text[at..text.len().min(at + taken)]);
        at += taken;
    }
    out
}

fn row(place: Place, text: &[u8]) -> Row {
    let document = match parsed(text) {
        Ok(value) => document_of(value),
        Err(_) if std::str::from_utf8(text).is_err() => Err("not UTF-8 text".into()),
        Err(e) => Err(format!("not valid JSON: {e}")),
    };
    Row { place, document }
}

fn too_long() -> Result<Document, String> {
    Err(format!("longer than {} MiB", LARGEST >> 20))
}

/// One value a line.
struct Lines {
    path: PathBuf,
    stream: Box<dyn BufRead>,
    number: usize,
}

impl Iterator for Lines {
    type Item = crate::error::Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.number += 1;
            let place = Place("line", self.number);
            match next_line(&mut *self.stream) {
                Ok(None) => return None,
                Ok(Some(Line::Text(line))) if line.trim_ascii().is_empty() => {}
                Ok(Some(Line::Text(line))) => return Some(Ok(row(place, &line))),
                Ok(Some(Line::TooLong)) => return Some(Ok(Row { place, document: too_long() })),
                Err(e) => return Some(Err(damaged(&self.path, &e))),
            }
        }
    }
}

/// A line without its end.
pub enum Line {
    /// The line.
    Text(Vec<u8>),
    /// A line of more bytes than a document may have.
    TooLong,
}

/// The next line, or none at the end.
pub fn next_line(stream: &mut dyn BufRead) -> io::Result<Option<Line>> {
    let mut line = Vec::new();
    let mut any = false;
    loop {
        let part = stream.fill_buf()?;
        if part.is_empty() {
            break;
        }
        any = true;
        let end = part.iter().position(|&byte| byte == b'\n');
        if line.len() <= LARGEST {
            line.extend_from_slice(&part[..end.unwrap_or(part.len())]);
        }
        let used = end.map_or(part.len(), |end| end + 1);
        stream.consume(used);
        if end.is_some() {
            break;
        }
    }
    if line.len() > LARGEST {
        return Ok(Some(Line::TooLong));
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(any.then_some(Line::Text(line)))
}

/// Values in an array, or one after another.
struct Values {
    path: PathBuf,
    stream: Box<dyn BufRead>,
    is_array: bool,
    number: usize,
    is_done: bool,
}

impl Iterator for Values {
    type Item = crate::error::Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        self.number += 1;
        let place = Place("entry", self.number);
        let mut scan = Scan::new(self.is_array && self.number > 1);
        match scan.value(&mut *self.stream, self.is_array) {
            Err(e) => {
                self.is_done = true;
                Some(Err(damaged(&self.path, &e)))
            }
            Ok(Ended::File) => {
                self.is_done = true;
                let rest = scan.value.trim_ascii();
                (!rest.is_empty() || self.is_array)
                    .then(|| Ok(Row { place, document: Err("the file ends in the middle of it".into()) }))
            }
            Ok(ended) => {
                self.is_done = ended == Ended::Array;
                match scan.is_too_long {
                    true => Some(Ok(Row { place, document: too_long() })),
                    // An empty array.
                    false if self.is_done && scan.value.trim_ascii().is_empty() => None,
                    false => Some(Ok(row(place, &scan.value))),
                }
            }
        }
    }
}

/// What ended a value.
#[derive(PartialEq, Eq)]
enum Ended {
    /// The value itself, or the comma behind it.
    Value,
    /// The end of the array.
    Array,
    /// The end of the file.
    File,
}

/// Finds a value's end by counting brackets, so that the value need not be valid.
struct Scan {
    value: Vec<u8>,
    is_too_long: bool,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    is_opened: bool,
}

impl Scan {
    /// `is_opened`: the array's bracket has been read.
    fn new(is_opened: bool) -> Scan {
        Scan {
            value: Vec::new(),
            is_too_long: false,
            depth: 0,
            in_string: false,
            is_escaped: false,
            is_opened,
        }
    }

    fn value(&mut self, stream: &mut dyn BufRead, in_array: bool) -> io::Result<Ended> {
        loop {
            let part = stream.fill_buf()?;
            if part.is_empty() {
                return Ok(Ended::File);
            }
            let mut used = 0;
            let mut ended = None;
            for &byte in part {
                used += 1;
                ended = self.step(byte, in_array);
                if ended.is_some() {
                    break;
                }
            }
            stream.consume(used);
            if let Some(ended) = ended {
                return Ok(ended);
            }
        }
    }

    fn step(&mut self, byte: u8, in_array: bool) -> Option<Ended> {
        if self.in_string {
            self.in_string = self.is_escaped || byte != b'"';
            self.is_escaped = !self.is_escaped && byte == b'\\';
        } else {
            match byte {
                b'[' if in_array && !self.is_opened => {
                    self.is_opened = true;
                    return None;
                }
                b',' if in_array && self.depth == 0 => return Some(Ended::Value),
                b']' if in_array && self.depth == 0 => return Some(Ended::Array),
                b'[' | b'{' => self.depth += 1,
                b']' | b'}' => self.depth = self.depth.saturating_sub(1),
                b'"' => self.in_string = true,
                _ => {}
            }
        }
        if self.value.len() < LARGEST {
            self.value.push(byte);
        } else {
            self.is_too_long = true;
        }
        (!in_array && self.depth == 0 && byte == b'}' && !self.in_string).then_some(Ended::Value)
    }
}
