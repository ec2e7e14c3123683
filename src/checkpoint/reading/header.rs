//! The header of a safetensors file, checked against the file's length.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::directory::{is_pointer, pointer};
use crate::error::{Error, LONGEST_NAME, Result, printable};

/// One tensor as a header describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderTensor {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A file's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// In the order of their data.
    pub tensors: Vec<HeaderTensor>,
    /// The `__metadata__` entries.
    pub metadata: HashMap<String, String>,
    /// Length of the whole file.
    pub file_bytes: u64,
}

/// Larger headers are refused by the format's own library.
const LARGEST_HEADER: u64 = 100_000_000;

/// Reads and checks the header of `file`. `path` is for messages.
///
/// # Errors
/// Exit code 3: no valid header, offsets with holes or overlaps, sizes that contradict shapes, a file that
/// is shorter or longer than its header says.
pub fn read_header(file: &File, path: &Path) -> Result<Header> {
    let broken = |what: String| {
        Error::input(what)
            .file(path)
            .fix("download the file again: it is damaged or was not copied completely")
    };
    let file_bytes = file.metadata().map_err(|e| broken(format!("can't read: {e}")))?.len();
    let mut start = [0; 64];
    if file.read_at(&mut start, 0).is_ok() && is_pointer(&start) {
        return Err(pointer(path));
    }
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 0)
        .map_err(|_| broken(format!("the file has {file_bytes} bytes, too few for a header")))?;
    let size = u64::from_le_bytes(size);
    if size > LARGEST_HEADER || size + 8 > file_bytes {
        return Err(broken(format!("the header claims {size} bytes in a file of {file_bytes}")));
    }
    let mut buffer = vec![0; size as usize + 8];
    file.read_exact_at(&mut buffer, 0).map_err(|e| broken(format!("can't read the header: {e}")))?;
    let Entries { tensors: entries, metadata } =
        serde_json::from_slice(&buffer[8..]).map_err(|e| broken(format!("the header is not valid: {e}")))?;
    drop(buffer);
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, info) in entries {
        // Offsets beyond the file are reported below; here they must only not wrap around.
        tensors.push(HeaderTensor {
            name,
            dtype: info.dtype,
            shape: info.shape,
            offset: (size + 8).saturating_add(info.data_offsets.0 as u64),
            bytes: info.data_offsets.1.saturating_sub(info.data_offsets.0) as u64,
        });
    }
    let mut seen = HashSet::new();
    if let Some(twice) = tensors.iter().find(|tensor| !seen.insert(&tensor.name)) {
        return Err(broken("the header lists the tensor twice".into()).tensor(&twice.name));
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    let mut end = size + 8;
    for tensor in &tensors {
        let needed = tensor
            .shape
            .iter()
            .try_fold(tensor.dtype.bitsize() as u64, |bits, &n| bits.checked_mul(n as u64));
        if needed != tensor.bytes.checked_mul(8) {
            let what = format!("{} bytes do not hold {:?} of {:?}", tensor.bytes, tensor.dtype, tensor.shape);
            return Err(broken(what).tensor(&tensor.name));
        }
        if tensor.offset != end {
            return Err(broken("the data of two tensors overlap, or there is a hole between them".into())
                .tensor(&tensor.name));
        }
        end = end.saturating_add(tensor.bytes);
        if end > file_bytes {
            let what = format!("the file is truncated: it has {file_bytes} bytes, the tensor ends at {end}");
            return Err(broken(what).tensor(&tensor.name));
        }
    }
    if end != file_bytes {
        return Err(broken(format!(
            "the file is oversized: it has {file_bytes} bytes, its header describes {end}"
        )));
    }
    Ok(Header { tensors, metadata, file_bytes })
}

/// The header's entries as they stand: a map would hide a name that is there twice, and the library's own
/// reader does not say which tensor it refuses. Read as what they must be, so that a strange header is refused before
/// it has taken much memory.
struct Entries {
    tensors: Vec<(String, TensorInfo)>,
    metadata: HashMap<String, String>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Entries { tensors: vec![], metadata: HashMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        entries.metadata = map.next_value()?;
                        continue;
                    }
                    let name_it =
                        |e| A::Error::custom(format!("tensor {}: {e}", printable(&name, LONGEST_NAME)));
                    let info = map.next_value().map_err(name_it)?;
                    entries.tensors.push((name, info));
                }
                Ok(entries)
            }
        }

        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str, data: usize) -> Result<Header> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        read_header(&File::open(&path).unwrap(), &path)
    }

    const A: &str = r#""a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}"#;

    #[test]
    fn a_good_header_keeps_order_and_metadata() {
        let w = r#""w":{"dtype":"F32","shape":[],"data_offsets":[8,12]}"#;
        let header = read(&format!(r#"{{"__metadata__":{{"format":"pt"}},{w},{A}}}"#), 12).unwrap();
        assert_eq!(header.metadata["format"], "pt");
        let names: Vec<&str> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "w"]);
        assert_eq!(header.tensors[1].offset + header.tensors[1].bytes, header.file_bytes);
    }

    #[test]
    fn each_damage_is_named_with_its_tensor() {
        let huge = u64::MAX;
        for (second, data, words) in [
            (r#""w":{"dtype":"F32","shape":[4],"data_offsets":[8,16]}"#.to_string(), 16, "do not hold"),
            (r#""w":{"dtype":"BF16","shape":[4],"data_offsets":[4,12]}"#.into(), 12, "overlap"),
            (r#""w":{"dtype":"BF16","shape":[4],"data_offsets":[10,18]}"#.into(), 18, "hole"),
            (r#""w":{"dtype":"BF16","shape":[4],"data_offsets":[8,16]}"#.into(), 12, "truncated"),
            (r#""w":{"dtype":"Q9","shape":[4],"data_offsets":[8,16]}"#.into(), 16, "Q9"),
            (r#""w":{"dtype":"BF16","shape":[4],"data_offsets":[16,8]}"#.into(), 16, "do not hold"),
            (format!(r#""w":{{"dtype":"U8","shape":[1],"data_offsets":[{},{huge}]}}"#, huge - 1), 9, "overlap"),
            (r#""w":{"dtype":"U8","shape":[8],"data_offsets":[8,16]},"w":{"dtype":"I8","shape":[8],"data_offsets":[8,16]}"#.into(), 16, "twice"),
        ] {
            let error = read(&format!("{{{A},{second}}}"), data).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(words) && text.contains("tensor w") && text.contains("model.safetensors"), "{text}");
        }
    }

    #[test]
    fn a_file_that_is_no_tensor_file_is_refused() {
        for (header, data, words) in [("[1]", 0, "not valid"), ("{", 0, "not valid")] {
            let text = read(header, data).unwrap_err().to_string();
            assert!(text.contains(words), "{text}");
        }
        let text = read(&format!("{{{A}}}"), 9).unwrap_err().to_string();
        assert!(text.contains("oversized"), "{text}");
    }
}
