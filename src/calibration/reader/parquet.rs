//! Parquet: rows become JSON values, so that they mean what JSON lines with the same names mean.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use parquet::schema::types::Type;
use serde_json::Value;

use super::super::documents::{Place, Row, Rows};
use super::super::row::{HOLD_A_DOCUMENT, document_of, is_known, names};
use super::unreadable;
use crate::error::{Error, Result};

/// Values of a column that are held at a time. A document may be large, so these are few.
const BATCH: usize = 64;

/// The rows of a Parquet file. Only columns that may hold a document are decoded.
///
/// # Errors
/// Exit code 3: a damaged file, or one without such a column.
pub fn rows(path: &Path, file: File) -> Result<Rows> {
    let bad = |e: ParquetError| damaged(path, &e);
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema();
    let fields = schema.get_fields();
    let known: Vec<_> = fields.iter().filter(|field| is_known(field.name())).cloned().collect();
    if known.is_empty() {
        let all: Vec<String> = fields.iter().map(|field| field.name().to_string()).collect();
        return Err(unreadable(path, format!("the columns are {}", names(all.iter())))
            .fix(format!("rename the column of documents to one of {HOLD_A_DOCUMENT}")));
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(known).build().map_err(bad)?;
    let records = RowIter::from_file_into(Box::new(reader))
        .with_batch_size(BATCH)
        .project(Some(projection))
        .map_err(bad)?;
    Ok(Box::new(Records { path: path.into(), records, number: 0 }))
}

struct Records {
    path: PathBuf,
    records: RowIter<'static>,
    number: usize,
}

impl Iterator for Records {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        self.number += 1;
        let place = Place("row", self.number);
        Some(match self.records.next()? {
            Ok(record) => Ok(Row { place, document: document_of(value_of(&record)) }),
            Err(e) => Err(damaged(&self.path, &e)),
        })
    }
}

fn damaged(path: &Path, error: &ParquetError) -> Error {
    unreadable(path, format!("not a readable Parquet file: {error}"))
        .fix("download or write the file again (Snappy, gzip, Zstandard, LZ4 and Brotli are read)")
}

fn value_of(record: &Record) -> Value {
    record.get_column_iter().map(|(name, field)| (name.clone(), json_of(field))).collect()
}

/// A struct. What is null in it is left out, because each struct of a column has the fields of all.
fn struct_of(record: &Record) -> Value {
    let fields = record.get_column_iter().map(|(name, field)| (name.clone(), json_of(field)));
    fields.filter(|(name, value)| !value.is_null() || name == "content").collect()
}

fn json_of(field: &Field) -> Value {
    match field {
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => f32::from(*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // Text that was written without saying that it is text.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(record) => struct_of(record),
        Field::ListInternal(list) => list.elements().iter().map(json_of).collect(),
        Field::MapInternal(map) => {
            let key = |key: &Field| json_of(key).as_str().map_or_else(|| key.to_string(), str::to_string);
            map.entries().iter().map(|(name, value)| (key(name), json_of(value))).collect()
        }
        Field::Null
        | Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => Value::Null,
    }
}
