//! Files of documents: what kind a file is, and one module for each kind.

mod json;
mod open;
mod parquet;
mod text;

use std::fmt::Display;
use std::path::Path;

use self::open::Opened;
use super::documents::Rows;
use crate::confined;
use crate::error::{Error, Result};

/// Bytes that one document may have in a file. More than that is a file of another kind, or was made to fill memory.
const LARGEST: usize = 64 << 20;

/// The rows of the file at `path`.
///
/// # Errors
/// Exit code 3: a file that can't be read or whose kind is unknown.
pub fn rows(path: &Path) -> Result<Rows> {
    let suspect = |path: &Path| confined::suspect("the calibration data", path, "use another file");
    suspect(path);
    let mut rows = match open::open(path)? {
        Opened::Parquet(file) => parquet::rows(path, file)?,
        Opened::Text { head, stream } if is_json(path, &head)? => json::rows(path, &head, stream),
        Opened::Text { stream, .. } => text::rows(path, stream),
    };
    let path = path.to_path_buf();
    Ok(Box::new(std::iter::from_fn(move || {
        suspect(&path);
        rows.next()
    })))
}

fn unreadable(path: &Path, what: impl Display) -> Error {
    Error::input(format!("calibration data: {what}")).file(path)
}

/// A file that ends or breaks in the middle.
fn damaged(path: &Path, error: &std::io::Error) -> Error {
    unreadable(path, format!("can't read on: {error}"))
        .fix("the file is damaged or incomplete: download or make it again")
}

/// Whether text is JSON: by the file's name, and where that says nothing, by its beginning.
fn is_json(path: &Path, head: &[u8]) -> Result<bool> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = [".gz", ".zst", ".zstd"].iter().fold(name.as_str(), |name, end| name.trim_end_matches(end));
    match name.rsplit_once('.').map(|(_, extension)| extension) {
        Some("jsonl" | "ndjson" | "json") => Ok(true),
        Some("txt" | "text" | "md") => Ok(false),
        Some(kind @ ("csv" | "tsv")) => {
            let separator = if kind == "csv" { "," } else { "\\t" };
            Err(unreadable(path, format!("it is a table in text form ({kind})")).fix(format!(
                "make JSON lines of it: python3 -c \"import pandas; pandas.read_csv('{0}', sep='{separator}')\
                 .to_json('{0}.jsonl', orient='records', lines=True)\"",
                path.display()
            )))
        }
        _ => Ok(json::begins(head)),
    }
}

#[cfg(test)]
mod tests;
