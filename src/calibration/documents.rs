//! Where documents come from: JSON lines, plain text, Parquet, or the set inside the binary.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::Value;

use super::conversation::Conversation;
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

/// Where documents come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The set inside the binary.
    Builtin,
    /// A `.jsonl`, `.txt` or `.parquet` file.
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

/// Keys and columns that hold a document, in order of preference.
const KEYS: [&str; 3] = ["text", "article", "prompt"];

/// The documents of a source, in its order.
pub type Documents = Box<dyn Iterator<Item = Result<Document>>>;

impl Source {
    /// Opens the source; documents are read as they are asked for.
    ///
    /// # Errors
    /// Exit code 3: a file that can't be read or whose kind is unknown. Bad lines and rows are errors of the
    /// iterator, naming their number.
    pub fn documents(&self) -> Result<Documents> {
        let path = match self {
            Source::Builtin => {
                let texts = BUILTIN.split("\n%\n").map(|text| Ok(Document::Text(text.trim().to_string())));
                return Ok(Box::new(texts));
            }
            Source::File(path) => path,
        };
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "json") => json_lines(path),
            Some("txt" | "md") => plain_text(path),
            Some("parquet") => parquet_rows(path),
            _ => {
                Err(unreadable(path, "the file's kind is unknown").fix("use a .jsonl, .txt or .parquet file"))
            }
        }
    }
}

fn unreadable(path: &Path, what: impl fmt::Display) -> Error {
    Error::input(format!("calibration data: {what}")).file(path)
}

fn open(path: &Path) -> Result<File> {
    File::open(path)
        .map_err(|e| unreadable(path, format!("can't open: {e}")).fix("check the path given to --calib"))
}

fn json_lines(path: &Path) -> Result<Documents> {
    let lines = BufReader::new(open(path)?).lines();
    let path = path.to_path_buf();
    Ok(Box::new(lines.enumerate().filter_map(move |(number, line)| {
        let bad = |what: String| {
            unreadable(&path, format!("line {}: {what}", number + 1))
                .fix("each line is a JSON object with text, article, prompt, messages or input_ids")
        };
        match line {
            Ok(line) if line.trim().is_empty() => None,
            Ok(line) => Some(match serde_json::from_str::<Value>(&line) {
                Ok(value) => from_json(&value).map_err(bad),
                Err(e) => Err(bad(format!("not valid JSON: {e}"))),
            }),
            Err(e) => Some(Err(bad(e.to_string()))),
        }
    })))
}

/// The document of a row; the error is what keeps it from being one.
fn from_json(row: &Value) -> Result<Document, String> {
    let present = |key: &str| row.get(key).filter(|value| !value.is_null());
    let none = || "no document in it".to_string();
    if let Some(ids) = present("input_ids") {
        let ids = ids.as_array().ok_or_else(none)?.iter();
        let ids = ids.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        return ids.collect::<Option<Vec<u32>>>().map(Document::Ids).ok_or_else(none);
    }
    if let Some(messages) = present("messages") {
        return Conversation::of_row(messages, row).map(Document::Conversation);
    }
    let text = KEYS.iter().find_map(|key| row.get(key)?.as_str());
    text.map(|text| Document::Text(text.to_string())).ok_or_else(none)
}

fn plain_text(path: &Path) -> Result<Documents> {
    open(path)?;
    let text = std::fs::read_to_string(path)
        .map_err(|e| unreadable(path, e).fix("save the file as UTF-8 text"))?
        .replace("\r\n", "\n");
    let mut documents: Vec<String> = vec![String::new()];
    for line in text.lines() {
        let last = documents.last_mut().expect("starts with one");
        if line.trim().is_empty() {
            if !last.is_empty() {
                documents.push(String::new());
            }
        } else {
            if !last.is_empty() {
                last.push('\n');
            }
            last.push_str(line);
        }
    }
    documents.retain(|document| !document.is_empty());
    Ok(Box::new(documents.into_iter().map(|text| Ok(Document::Text(text)))))
}

fn parquet_rows(path: &Path) -> Result<Documents> {
    let bad = |e: parquet::errors::ParquetError| {
        unreadable(path, format!("not a readable Parquet file: {e}")).fix("download the file again")
    };
    let reader = SerializedFileReader::new(open(path)?).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
    let wanted = KEYS.iter().find(|key| columns.contains(key)).ok_or_else(|| {
        unreadable(path, format!("the columns are {}", columns.join(", ")))
            .fix("use a file with a column text, article or prompt")
    })?;
    // Only the wanted column is decoded.
    let field = schema.get_fields().iter().find(|field| field.name() == *wanted).expect("just found").clone();
    let projection = parquet::schema::types::Type::group_type_builder(schema.name())
        .with_fields(vec![field])
        .build()
        .map_err(bad)?;
    let rows = parquet::record::reader::RowIter::from_file_into(Box::new(reader))
        .project(Some(projection))
        .map_err(bad)?;
    let path = path.to_path_buf();
    Ok(Box::new(rows.enumerate().map(move |(number, row)| {
        let bad = |what: String| {
            unreadable(&path, format!("row {}: {what}", number + 1)).fix("check the column of documents")
        };
        let row = row.map_err(|e| bad(e.to_string()))?;
        match row.get_column_iter().next() {
            Some((_, Field::Str(text))) => Ok(Document::Text(text.clone())),
            _ => Err(bad("no text in it".into())),
        }
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: &[u8]) -> Result<Vec<Document>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        Source::File(path).documents()?.collect()
    }

    fn text(text: &str) -> Document {
        Document::Text(text.into())
    }

    #[test]
    fn every_kind_of_json_line() {
        let lines = br#"{"text": "a"}
{"article": "b", "highlights": "x"}

{"prompt": "c"}
{"messages": [{"role": "user", "content": "d"}]}
{"input_ids": [1, 2, 3]}
"#;
        let documents = read("a.jsonl", lines).unwrap();
        assert_eq!(documents[..3], [text("a"), text("b"), text("c")]);
        assert!(matches!(&documents[3], Document::Conversation(c) if c.messages[0]["content"] == "d"));
        assert_eq!(documents[4], Document::Ids(vec![1, 2, 3]));
        assert_eq!(read("b.jsonl", b"{\"input_ids\": null, \"text\": \"x\"}").unwrap(), [text("x")]);
    }

    #[test]
    fn bad_lines_are_named() {
        for (lines, words) in [
            ("{\"text\": \"a\"}\n{oops\n", ["line 2", "not valid JSON"]),
            ("{\"body\": \"a\"}\n", ["line 1", "no document"]),
            ("{\"input_ids\": [1, -2]}\n", ["line 1", "no document"]),
            ("{\"messages\": []}\n", ["line 1", "list of messages is empty"]),
            ("{\"messages\": [{\"content\": \"a\"}]}\n", ["line 1", "message 1 has no role"]),
        ] {
            let error = read("a.jsonl", lines.as_bytes()).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        assert!(read("a.csv", b"x").unwrap_err().to_string().contains(".parquet"));
        assert!(read("a.parquet", b"x").unwrap_err().to_string().contains("Parquet"));
        assert!(read("a.txt", &[0xFF, 0xFE]).unwrap_err().to_string().contains("UTF-8"));
        assert!(Source::File("no/such.jsonl".into()).documents().is_err());
    }

    #[test]
    fn blank_lines_separate_plain_documents() {
        let documents = read("a.txt", b"\n\none\ntwo\r\n  \n\nthree\n").unwrap();
        assert_eq!(documents, [text("one\ntwo"), text("three")]);
    }

    #[test]
    fn the_builtin_set_is_large_enough_for_the_defaults() {
        let documents: Vec<Document> = Source::Builtin.documents().unwrap().map(Result::unwrap).collect();
        let long = |document: &&Document| matches!(document, Document::Text(text) if text.len() > 1000);
        assert!(documents.iter().filter(long).count() >= 256);
    }

    #[test]
    fn parquet_columns_are_read() {
        use parquet::data_type::{ByteArray, ByteArrayType};
        use parquet::file::writer::SerializedFileWriter;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let schema = "message schema { REQUIRED INT32 id; REQUIRED BYTE_ARRAY article (UTF8); }";
        let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let mut writer =
            SerializedFileWriter::new(File::create(&path).unwrap(), schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<parquet::data_type::Int32Type>().write_batch(&[1, 2], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values = [ByteArray::from("first"), ByteArray::from("second")];
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let documents: Vec<Document> = Source::File(path).documents().unwrap().map(Result::unwrap).collect();
        assert_eq!(documents, [text("first"), text("second")]);
    }
}
