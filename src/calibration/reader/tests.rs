use std::io::Write;

use super::super::documents::{Document, Row};
use super::*;
use crate::confined::Limits;

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    rows(&path)?.collect()
}

/// The documents of rows that all hold text.
fn texts(name: &str, content: impl AsRef<[u8]>) -> Vec<String> {
    let text = |row: Row| match row.document {
        Ok(Document::Text(text)) => text,
        other => panic!("{name}: {}: {other:?}", row.place),
    };
    read(name, content).unwrap().into_iter().map(text).collect()
}

/// (place, document or reason) of every row.
fn all(name: &str, content: impl AsRef<[u8]>) -> Vec<(String, String)> {
    let shown = |row: Row| (row.place.to_string(), format!("{:?}", row.document));
    read(name, content).unwrap().into_iter().map(shown).collect()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

const LINES: &str = "{\"text\": \"a\"}\r\n\n{\"article\": \"b\", \"highlights\": \"x\"}\n\"c\"\n";

#[test]
fn lines_of_json_under_any_name() {
    for name in
        ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a", "a.data", "a.jsonl.gz", "c4.json.gz", "a.zst"]
    {
        assert_eq!(texts(name, LINES), ["a", "b", "c"], "{name}");
        assert_eq!(texts(name, gzip(LINES.as_bytes())), ["a", "b", "c"], "{name} packed with gzip");
        let packed = zstd::encode_all(LINES.as_bytes(), 1).unwrap();
        assert_eq!(texts(name, packed), ["a", "b", "c"], "{name} packed with zstd");
        assert_eq!(texts(name, format!("\u{FEFF}{LINES}")), ["a", "b", "c"], "{name} with a mark");
    }
    let two = [gzip(b"{\"text\": \"a\"}\n"), gzip(b"{\"text\": \"b\"}\n")].concat();
    assert_eq!(texts("a.jsonl.gz", two), ["a", "b"], "packed in two parts");
}

#[test]
fn arrays_and_values_over_several_lines() {
    let pretty = "[\n {\n  \"text\": \"a ] } , \\\" [\"\n },\n {\"text\": \"b\"}\n]\n";
    for (content, expected) in [
        (pretty, vec!["a ] } , \" [", "b"]),
        ("[{\"text\": \"a\"}, \"b\"]", vec!["a", "b"]),
        ("  [{\"text\": \"a\"}, {\"text\": \"b\"},]", vec!["a", "b"]),
        ("{\n\"text\": \"a\"\n}\n{\n\"text\": \"b\"\n}\n", vec!["a", "b"]),
        ("[]", vec![]),
        ("", vec![]),
        (" \n\n", vec![]),
    ] {
        assert_eq!(texts("a.json", content), expected, "{content}");
    }
    // Longer than what the kind is told by.
    let long: Vec<String> = (0..3000).map(|i| format!("document {i} of many")).collect();
    let rows: Vec<_> = long.iter().map(|text| serde_json::json!({"text": text})).collect();
    assert_eq!(texts("a.json", serde_json::to_string(&rows).unwrap()), long);
    assert_eq!(texts("a.json", serde_json::to_string_pretty(&rows).unwrap()), long);
    let large = serde_json::json!({"text": "x ".repeat(100_000)});
    assert_eq!(texts("a.jsonl", format!("{large}\n{{\"text\": \"b\"}}\n"))[1], "b");
}

#[test]
fn lines_that_are_lists() {
    let rows = read("a.jsonl", "[1, 2]\n[{\"role\": \"user\", \"content\": \"a\"}]\n").unwrap();
    assert_eq!(rows[0].document, Ok(Document::Ids(vec![1, 2])));
    assert!(matches!(rows[1].document, Ok(Document::Conversation(_))));
}

#[test]
fn numbers_that_json_does_not_have() {
    let lines = "{\"score\": NaN, \"text\": \"NaN \\\" -Infinity\", \"a\": [Infinity, -Infinity]}\n{\"text\": \"b\"}\n";
    assert_eq!(texts("a.jsonl", lines), ["NaN \" -Infinity", "b"]);
    assert_eq!(texts("a", lines), ["NaN \" -Infinity", "b"]);
    assert_eq!(texts("a.json", "[{\"score\": NaN, \"text\": \"a\"}]"), ["a"]);
}

#[test]
fn a_broken_row_spoils_no_other() {
    let rows = all(
        "a.jsonl",
        b"{oops\n{\"text\": \"a\xFF\"}\n{\"text\": \"\\ud83d\"}\n{\"text\": \"b\"}\n{\"text\": \"c",
    );
    let expected = [
        ("line 1", "not valid JSON"),
        ("line 2", "UTF-8"),
        ("line 3", "not valid JSON"),
        ("line 4", "Text(\"b\")"),
        ("line 5", "not valid JSON"),
    ];
    assert_eq!(rows.len(), expected.len());
    for ((place, document), (at, words)) in rows.iter().zip(expected) {
        assert!(place == at && document.contains(words), "{place}: {document}");
    }
    let rows = all("a.json", "[{\"text\": \"a\"}, {oops}, {\"text\": \"b\"}, {\"text\": ");
    let places: Vec<&str> = rows.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(places, ["entry 1", "entry 2", "entry 3", "entry 4"]);
    assert!(rows[1].1.contains("not valid JSON") && rows[3].1.contains("ends in the middle"), "{rows:?}");
}

#[test]
fn blank_lines_separate_plain_documents() {
    for name in ["a.txt", "a.TXT", "a.md", "notes", "a.txt.gz"] {
        let content = "\n\none\ntwo\r\n  \n\nthree\n";
        assert_eq!(texts(name, content), ["one\ntwo", "three"], "{name}");
        assert_eq!(
            texts(name, gzip(format!("\u{FEFF}{content}").as_bytes())),
            ["one\ntwo", "three"],
            "{name}"
        );
    }
    assert_eq!(
        texts("a", "[Music] plays\n\n{not json}\n\n\"Yes,\" he said."),
        ["[Music] plays", "{not json}", "\"Yes,\" he said."]
    );
    let rows = all("a.txt", b"\none\n\ncaf\xE9\n\ntwo");
    assert_eq!(rows[1].0, "line 4");
    assert!(rows[1].1.contains("UTF-8") && rows[2].1.contains("two"), "{rows:?}");
}

#[test]
fn files_of_other_kinds_are_named_with_what_to_do() {
    let packed_parquet = gzip(b"PAR1xxxx");
    let cases: [(&str, &[u8], [&str; 2]); 13] = [
        ("a.csv", b"text\nx\n", ["table", "read_csv"]),
        ("a.tsv.gz", b"text\nx\n", ["table", "\\t"]),
        ("a.jsonl.bz2", b"BZh91AY", ["bzip2", "bunzip2"]),
        ("a.jsonl.xz", &[0xFD, b'7', b'z', b'X', b'Z', 0], ["xz", "unxz"]),
        ("a.zip", b"PK\x03\x04", ["zip", "unzip"]),
        ("a.parquet.gz", &packed_parquet, ["compressed Parquet", "unpack"]),
        ("a.arrow", b"ARROW1\0\0", ["Arrow", "pyarrow"]),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS", "git lfs pull"]),
        ("a.txt", b"\xFF\xFEa\0", ["UTF-16", "iconv"]),
        ("a.jsonl", b"\xFE\xFF\0a", ["UTF-16", "iconv"]),
        ("a.bin", b"\x01\0\0\0", ["binary", "JSON lines"]),
        ("a.parquet", b"PAR1xPAR1", ["not a readable Parquet file", "again"]),
        ("a.jsonl.gz", &gzip(LINES.as_bytes())[..20], ["can't read on", "download"]),
    ];
    for (name, content, words) in cases {
        let error = read(name, content).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.contains(name), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    for (path, words) in
        [(dir.path(), "directory"), (Path::new("/dev/zero"), "device"), (Path::new("no/such"), "--calib")]
    {
        let error = rows(path).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_document_has_a_largest_size() {
    let line = |n: usize| "x".repeat(n);
    let lines = format!("{{\"text\": \"{}\"}}\n{{\"text\": \"b\"}}\n", line(LARGEST));
    let rows = all("a.jsonl.gz", gzip(lines.as_bytes()));
    assert!(rows[0].1.contains("longer than 64 MiB") && rows[1].1.contains("\"b\""));
    let rows = all("a.txt", format!("{}\n{}\n\nb", line(LARGEST / 2), line(LARGEST / 2)));
    assert!(rows[0].1.contains("more than 64 MiB") && rows[1].1.contains("\"b\""));
}

/// The rows of a file that tests/fixtures/make_parquet.py wrote.
fn parquet(name: &str) -> Vec<Result<Document, String>> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet").join(format!("{name}.parquet"));
    rows(&path).unwrap().map(|row| row.unwrap().document).collect()
}

#[test]
fn parquet_in_every_compression_and_type_of_text() {
    let third = Ok(Document::Text("third ".repeat(40)));
    for name in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"].map(|codec| format!("codec-{codec}")) {
        let expected =
            [Ok(Document::Text("first".into())), Err("text is null".into()), third.clone(), third.clone()];
        assert_eq!(parquet(&name), expected, "{name}");
    }
    for name in ["large-string", "categories", "binary"] {
        let rows = parquet(name);
        assert_eq!(rows[0], Ok(Document::Text("first".into())), "{name}");
        assert!(rows[1].as_ref().unwrap_err().contains("null"), "{name}");
        assert_eq!(rows[2..], [third.clone(), third.clone()], "{name}");
    }
}

#[test]
fn parquet_with_conversations_and_ids() {
    let messages = |row: &Result<Document, String>| match row {
        Ok(Document::Conversation(conversation)) => conversation.messages.clone(),
        other => panic!("{other:?}"),
    };
    let rows = parquet("messages");
    let call = serde_json::json!([{"id": "1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]);
    let expected = serde_json::json!([
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": null, "tool_calls": call},
        {"role": "tool", "content": "noon"},
    ]);
    assert_eq!(messages(&rows[0]).to_string(), expected.to_string());
    assert_eq!(rows[1], Ok(Document::Text("b".into())));
    assert!(rows[2].as_ref().unwrap_err().contains("empty"));
    let expected = serde_json::json!([
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    ]);
    assert_eq!(messages(&parquet("conversations")[0]), expected);
    assert_eq!(messages(&parquet("prompt-list")[0]).as_array().unwrap(), &expected.as_array().unwrap()[1..]);
    let rows = parquet("ids");
    assert_eq!(rows[..2], [Ok(Document::Ids(vec![5, 6])), Ok(Document::Ids(vec![7, 8, 9]))]);
    assert!(rows[2].as_ref().unwrap_err().contains("input_ids is null"));
    assert_eq!(parquet("ids-fixed")[1], Ok(Document::Ids(vec![7, 8])));
}

#[test]
fn parquet_that_is_damaged_or_has_other_columns() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet");
    let error = rows(&fixtures.join("other-columns.parquet")).err().unwrap().to_string();
    assert!(error.contains("the columns are id, body") && error.contains("messages"), "{error}");
    let whole = std::fs::read(fixtures.join("categories.parquet")).unwrap();
    let read_damaged = |at: usize| {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        confined::run(Limits::USUAL, move || read("a.parquet", damaged)).map_err(|error| error.to_string())
    };
    // Pages have checksums, so that each damaged byte of the data is found.
    let found: Vec<_> = (4..whole.len() - 8).map(read_damaged).collect();
    assert!(found.iter().filter(|found| found.is_err()).count() > 60);
    for error in found.into_iter().filter_map(Result::err) {
        assert!(error.contains("a.parquet"), "{error}");
    }
}
