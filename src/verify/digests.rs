//! Whether every byte is the one that was written, where the directory says so itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

use rayon::prelude::*;
use serde_json::Value;

use super::subject::Subject;
use super::{Concerns, Findings, Rule};
use crate::checkpoint::directory;

/// The file that says so: `{"algorithm": "blake3", "files": {…}}`, by name a digest, or for a safetensors file
/// `{"header": …, "tensors": {…}}`. It stands as `serde_json` prints it, with a line's end behind it.
const DIGESTS: &str = "digests.json";

pub(super) const RULES: &[Rule] = &[Rule {
    id: "A19",
    title: "every byte is the one that digests.json names",
    concerns: Concerns::Directory,
    about: |subject| subject.dir.join(DIGESTS).symlink_metadata().is_ok(),
    check: as_written,
}];

/// A digests.json of more bytes is read by nobody.
const LARGEST: u64 = 256 << 20;

/// Bytes that are read at a time.
const READ: u64 = 8 << 20;

/// A bit that flips on a disk or on its way through a network is seen by no loader.
fn as_written(subject: &Subject, findings: &mut Findings) {
    let text = match directory::read(&subject.dir, DIGESTS, LARGEST) {
        Ok(text) => text,
        Err(e) => return findings.error(e.to_string()),
    };
    let value: Value = match serde_json::from_slice(&text) {
        Ok(value) => value,
        Err(e) => return findings.error(format!("{DIGESTS}: not valid JSON: {e}")),
    };
    // A change that means the same is a change as well.
    if serde_json::to_string_pretty(&value).is_ok_and(|printed| (printed + "\n").as_bytes() != text) {
        findings.error(format!("{DIGESTS} is not as it was written"));
    }
    let files = value.get("files").and_then(Value::as_object);
    let (Some("blake3"), Some(files)) = (value.get("algorithm").and_then(Value::as_str), files) else {
        return findings.error(format!("{DIGESTS} has no digests of the kind blake3"));
    };
    let faults = files.into_iter().flat_map(|(name, expected)| match expected {
        Value::String(expected) => file(subject, name, expected).into_iter().collect(),
        expected => shard(subject, name, expected),
    });
    faults.for_each(|fault| findings.error(fault));
    for (name, _) in subject.files.iter().filter(|(name, _)| !files.contains_key(name)) {
        findings.error(format!("{name} is not named by {DIGESTS}"));
    }
}

/// What is wrong with a file beside the weights.
fn file(subject: &Subject, name: &str, expected: &str) -> Option<String> {
    if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
        return Some(format!("{DIGESTS} names {name}, which is not in this directory"));
    }
    match directory::open(&subject.dir, name) {
        Ok((file, bytes)) => compared(name, digest(&file, 0, bytes), expected),
        Err(e) => Some(e.to_string()),
    }
}

/// What is wrong with a file of weights.
fn shard(subject: &Subject, name: &str, expected: &Value) -> Vec<String> {
    let tensors = expected.get("tensors").and_then(Value::as_object);
    let (Some(header), Some(tensors)) = (expected.get("header").and_then(Value::as_str), tensors) else {
        return vec![format!("{DIGESTS} has no digests of the header and the tensors of {name}")];
    };
    let Some(number) = subject.files.iter().position(|(known, _)| known == name) else {
        return vec![format!("{name} is named by {DIGESTS} and can't be read")];
    };
    let file = &subject.files[number].1;
    let mut length = [0; 8];
    let found = file.read_exact_at(&mut length, 0).and_then(|()| {
        let bytes = u64::from_le_bytes(length).saturating_add(8);
        digest(file, 0, bytes.min(file.metadata()?.len()))
    });
    let of_header = compared(&format!("the header of {name}"), found, header);
    let mut unnamed: Vec<String> = (subject.tensors.iter())
        .filter(|(tensor, found)| found.file == number && !tensors.contains_key(*tensor))
        .map(|(tensor, _)| format!("{name}: {tensor} is not named by {DIGESTS}"))
        .collect();
    unnamed.sort();
    let tensors: Vec<(&String, &Value)> = tensors.iter().collect();
    let of_tensor = |(tensor, expected): (&String, &Value)| match subject.tensors.get(tensor) {
        Some(found) if found.file == number => {
            let expected = expected.as_str().unwrap_or_default();
            compared(&format!("{name}: {tensor}"), digest(file, found.offset, found.bytes), expected)
        }
        _ => Some(format!("{name}: {tensor} is named by {DIGESTS} and not there")),
    };
    let of_tensors: Vec<String> = tensors.into_par_iter().filter_map(of_tensor).collect();
    of_header.into_iter().chain(of_tensors).chain(unnamed).collect()
}

fn compared(what: &str, found: io::Result<String>, expected: &str) -> Option<String> {
    match found {
        Ok(found) if found == expected => None,
        Ok(_) => Some(format!("{what}: the bytes are not those that were written")),
        Err(e) => Some(format!("{what}: can't read: {e}")),
    }
}

/// blake3 of a range of a file.
fn digest(file: &File, from: u64, bytes: u64) -> io::Result<String> {
    let (mut digest, mut buffer) = (blake3::Hasher::new(), vec![0; bytes.min(READ) as usize]);
    for at in (0..bytes).step_by(READ as usize) {
        let part = &mut buffer[..(bytes - at).min(READ) as usize];
        file.read_exact_at(part, from + at)?;
        digest.update_rayon(part);
    }
    Ok(digest.finalize().to_hex().to_string())
}
