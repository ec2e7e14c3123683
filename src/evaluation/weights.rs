//! A checkpoint's weights, dequantized where they are NVFP4.

use std::path::Path;

use safetensors::Dtype;

use crate::backend::Compute;
use crate::checkpoint::{Checkpoint, Layout, SourceTensor, narrow, widen};
use crate::error::{Error, Result};
use crate::model::{ModelConfig, Site};
use crate::nvfp4::{BLOCK, GlobalScale, dequantize};

/// A checkpoint to evaluate.
pub struct Weights {
    checkpoint: Checkpoint,
    /// The model.
    pub model: ModelConfig,
    /// The dtype of activations.
    pub compute: Compute,
    layout: Option<Layout>,
}

impl Weights {
    /// Opens a BF16, F16 or F32 checkpoint, or an NVFP4 one in either layout, to be computed with in `compute`.
    ///
    /// # Errors
    /// Exit code 3: anything that is not such a checkpoint.
    pub fn open(dir: &Path, compute: Compute) -> Result<Weights> {
        let checkpoint = Checkpoint::open(dir)?;
        let model = ModelConfig::parse(&checkpoint.config)?;
        let ends_with = |suffix: &str| checkpoint.tensors.keys().any(|name| name.ends_with(suffix));
        let layout = match (ends_with(".weight_packed"), ends_with(".weight_scale_2")) {
            (true, _) => Some(Layout::CompressedTensors),
            (_, true) => Some(Layout::Modelopt),
            _ if checkpoint.is_quantized() => {
                return Err(Error::input("the checkpoint is quantized, and not to NVFP4")
                    .file(dir)
                    .fix("evaluate BF16, F16, F32 or NVFP4 checkpoints"));
            }
            _ => None,
        };
        Ok(Weights { checkpoint, model, compute, layout })
    }

    /// A tensor as the forward pass wants it: rounded to BF16 where that is what is computed in, exact in F32.
    ///
    /// # Errors
    /// Exit code 3 where it is missing or of another shape than its scales say.
    pub fn tensor(&self, name: &str) -> Result<SourceTensor> {
        let Some((layout, module)) = self.layout.zip(name.strip_suffix(".weight")) else {
            return self.stored(name);
        };
        let names = layout.linear_names(module);
        if !self.checkpoint.tensors.contains_key(&names.scales) {
            return self.stored(name);
        }
        let (codes, scales) = (self.checkpoint.tensor(&names.codes)?, self.checkpoint.tensor(&names.scales)?);
        let global = self.global(layout, &names.weight_global)?;
        let [rows, packed] = codes.shape[..] else {
            return Err(Error::input(format!("codes of shape {:?}", codes.shape)).tensor(&codes.name));
        };
        let elements = rows * packed * 2;
        if codes.dtype != Dtype::U8
            || scales.dtype != Dtype::F8_E4M3
            || scales.bytes().len() * BLOCK != elements
        {
            return Err(Error::input("codes and block scales do not fit each other")
                .tensor(&codes.name)
                .fix("check the checkpoint with distq verify"));
        }
        let mut values = vec![0.0; elements];
        dequantize(codes.bytes(), scales.bytes(), global, &mut values);
        let dtype = if self.compute == Compute::Bf16 { Dtype::BF16 } else { Dtype::F32 };
        SourceTensor::from_bytes(name, dtype, &[rows, packed * 2], &narrow(dtype, &values))
    }

    /// A tensor that is not NVFP4.
    fn stored(&self, name: &str) -> Result<SourceTensor> {
        let tensor = self.checkpoint.tensor(name)?;
        if self.compute == Compute::F32 || tensor.dtype == Dtype::BF16 {
            return Ok(tensor);
        }
        let bytes = narrow(Dtype::BF16, &widen(&tensor)?);
        SourceTensor::from_bytes(name, Dtype::BF16, &tensor.shape, &bytes)
    }

    /// The static input scale of a site of a layer; none where its inputs are not quantized.
    ///
    /// # Errors
    /// Exit code 3 where the scalar is malformed.
    pub fn input_scale(&self, layer: usize, site: Site) -> Result<Option<GlobalScale>> {
        let Some(layout) = self.layout else { return Ok(None) };
        // Fused members share their scale.
        let name = layout.linear_names(&self.model.groups(layer)[site as usize].members[0].name).input_global;
        if !self.checkpoint.tensors.contains_key(&name) {
            return Ok(None);
        }
        self.global(layout, &name).map(Some)
    }

    fn global(&self, layout: Layout, name: &str) -> Result<GlobalScale> {
        let tensor = self.checkpoint.tensor(name)?;
        let bytes: [u8; 4] = tensor.bytes().try_into().map_err(|_| {
            Error::input("a global scale is one F32")
                .tensor(name)
                .fix("check the checkpoint with distq verify")
        })?;
        Ok(layout.global(f32::from_le_bytes(bytes)))
    }

    /// The matrix that turns hidden states into logits.
    pub fn lm_head(&self) -> Result<SourceTensor> {
        if self.model.tie_embeddings {
            return self.tensor(&self.model.embedding().name);
        }
        self.tensor("lm_head.weight")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_the_precision_that_was_asked_for_whatever_the_checkpoint() {
        let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
        let name = "model.layers.0.mlp.up_proj.weight";
        for (family, dtype) in [("llama_f32", Dtype::F32), ("llama_f16", Dtype::F16), ("llama", Dtype::BF16)]
        {
            let weights = |compute| Weights::open(&families.join(family), compute).unwrap();
            let (wide, narrowed) = (weights(Compute::F32), weights(Compute::Bf16));
            let (exact, rounded) = (wide.tensor(name).unwrap(), narrowed.tensor(name).unwrap());
            assert_eq!((exact.dtype, rounded.dtype), (dtype, Dtype::BF16));
            assert_eq!(rounded.bytes(), narrow(Dtype::BF16, &widen(&exact).unwrap()), "{family}");
        }
    }
}
