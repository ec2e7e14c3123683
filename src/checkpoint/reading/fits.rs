//! Tensors against what the configuration says of them. From headers alone, before memory is taken by any size in
//! config.json.

use safetensors::Dtype;

use super::source::{Checkpoint, Entry};
use crate::error::{Error, Result};

/// The dtypes of weights that are not quantized.
pub const FLOATS: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

impl Checkpoint {
    /// The entry of a tensor that must have this shape and one of these dtypes.
    ///
    /// # Errors
    /// Exit code 3, naming the file, the tensor and both shapes or dtypes.
    pub fn expect(&self, name: &str, shape: &[usize], dtypes: &[Dtype]) -> Result<&Entry> {
        let entry = self.entry(name)?;
        let wrong = |what: String, fix: &str| {
            Err(Error::input(what).file(&self.files[entry.file]).tensor(name).fix(fix))
        };
        if entry.shape != shape {
            let what = format!("the shape is {:?}, config.json says {shape:?}", entry.shape);
            return wrong(what, "use the config.json that belongs to these weights");
        }
        if !dtypes.contains(&entry.dtype) {
            let known: Vec<String> = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect();
            let what = format!("the dtype is {:?}, and {} is expected", entry.dtype, known.join(" or "));
            return wrong(what, "use a checkpoint whose config.json describes its weights");
        }
        Ok(entry)
    }
}
