//! `digests.json`: what every byte of the output should be, so that damage is found without the source.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::placement::Placement;
use super::writer::failed;
use crate::error::{Error, Result};

/// The file's name in the output.
pub const DIGESTS: &str = "digests.json";

/// blake3 of some bytes, as hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    blake3::Hasher::new().update_rayon(bytes).finalize().to_hex().to_string()
}

/// Writes the digests of a finished output in `dir`: of every tensor (as they were when it was made, by name), of every
/// safetensors file's header, and of the files of these names beside them, which are read.
///
/// # Errors
/// Exit code 5 where a tensor has no digest or the file system refuses.
pub fn write_digests(
    dir: &Path,
    placement: &Placement,
    tensors: &HashMap<String, String>,
    others: &[String],
) -> Result<()> {
    let mut files = Map::new();
    for (number, shard) in placement.shards.iter().enumerate() {
        let mut digests = Map::new();
        for name in placement.tensors_in(number) {
            let digest = tensors.get(name);
            let digest = digest.ok_or_else(|| Error::run("the tensor was never placed").tensor(name))?;
            digests.insert(name.to_string(), json!(digest));
        }
        digests.sort_keys();
        files.insert(shard.file_name.clone(), json!({"header": digest(&shard.header), "tensors": digests}));
    }
    for name in others {
        let path = dir.join(name);
        let bytes = std::fs::read(&path).map_err(|e| failed("can't read", &path, e))?;
        files.insert(name.clone(), json!(digest(&bytes)));
    }
    files.sort_keys();
    let value: Value = json!({"algorithm": "blake3", "files": files});
    let text = serde_json::to_string_pretty(&value).expect("JSON values serialize") + "\n";
    let path = dir.join(DIGESTS);
    std::fs::write(&path, text).map_err(|e| failed("can't write", &path, e))
}
