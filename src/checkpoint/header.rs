//! The header of a safetensors file, checked against the file's length.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::error::{Error, Result};

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
    pub metadata: std::collections::HashMap<String, String>,
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
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 0)
        .map_err(|_| broken(format!("the file has {file_bytes} bytes, too few for a header")))?;
    let size = u64::from_le_bytes(size);
    if size > LARGEST_HEADER || size + 8 > file_bytes {
        return Err(broken(format!("the header claims {size} bytes in a file of {file_bytes}")));
    }
    let mut buffer = vec![0; size as usize + 8];
    file.read_exact_at(&mut buffer, 0).map_err(|e| broken(format!("can't read the header: {e}")))?;
    let metadata: Metadata =
        serde_json::from_slice(&buffer[8..]).map_err(|e| broken(format!("the header is not valid: {e}")))?;
    let mut tensors: Vec<HeaderTensor> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| HeaderTensor {
            name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            offset: size + 8 + info.data_offsets.0 as u64,
            bytes: info.data_offsets.1.saturating_sub(info.data_offsets.0) as u64,
        })
        .collect();
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
        end += tensor.bytes;
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
    Ok(Header { tensors, metadata: metadata.metadata().clone().unwrap_or_default(), file_bytes })
}
