//! The norms and biases that folds change: read from the source, and rewritten for the output.

use std::collections::HashMap;

use safetensors::Dtype;

use crate::checkpoint::{narrow, stored, widen};
use crate::error::Result;
use crate::job::Job;
use crate::methods::layer::Folds;
use crate::model::Norm;

/// The norms and biases of a layer that folds may change, as they are stored.
pub struct Stored {
    /// By the norms' numbers; none where a norm has no weight.
    pub norms: Vec<Option<(Dtype, Vec<f32>)>>,
    /// By the linears' numbers; none where a linear has no bias.
    biases: Vec<Option<(Dtype, Vec<f32>)>>,
}

impl Stored {
    /// Reads them from the source.
    pub fn of(job: &Job, layer: usize) -> Result<Stored> {
        let read = |name: Option<String>| -> Result<Option<(Dtype, Vec<f32>)>> {
            let Some(name) = name else { return Ok(None) };
            let tensor = job.checkpoint.tensor(&name)?;
            Ok(Some((tensor.dtype, widen(&tensor)?)))
        };
        let spec = &job.model.layers[layer];
        let norm = |norm: &Norm| read(norm.weight.as_ref().map(|spec| spec.name.clone()));
        Ok(Stored {
            norms: spec.norms.iter().map(norm).collect::<Result<_>>()?,
            biases: spec.linears.iter().map(|linear| read(linear.bias())).collect::<Result<_>>()?,
        })
    }

    /// The value that is read back after `x` is stored in a norm: rounded to its dtype.
    pub fn round(&self, norm: usize, x: f32) -> f32 {
        self.norms[norm].as_ref().map_or(x, |(dtype, _)| stored(*dtype, x))
    }

    /// Whether an element of a linear's bias stays finite in its dtype when it is multiplied by a factor. True where
    /// the linear has no bias.
    pub fn holds(&self, linear: usize, row: usize, factor: f32) -> bool {
        let bias = &self.biases[linear];
        bias.as_ref().is_none_or(|(dtype, bias)| stored(*dtype, bias[row] * factor).is_finite())
    }
}

/// The bytes of the norms and biases that folds change, by name, in the dtypes of the source.
pub fn rewritten(job: &Job, layer: usize, folds: &Folds) -> Result<HashMap<String, Vec<u8>>> {
    let spec = &job.model.layers[layer];
    let mut tensors = HashMap::new();
    let mut scale = |name: String, factors: &[f32]| -> Result<()> {
        let bias = job.checkpoint.tensor(&name)?;
        let values: Vec<f32> = widen(&bias)?.iter().zip(factors).map(|(bias, f)| bias * f).collect();
        tensors.insert(name, narrow(bias.dtype, &values));
        Ok(())
    };
    for (number, linear) in spec.linears.iter().enumerate() {
        if let (Some(name), Some(factors)) = (linear.bias(), folds.rows(number, linear.rows)) {
            scale(name, &factors)?;
        }
    }
    for (number, _, factors) in folds.norms() {
        if let Some(bias) = &spec.norms[number].bias {
            scale(bias.name.clone(), factors)?;
        }
    }
    for (number, weights, _) in folds.norms() {
        if let Some(weight) = &spec.norms[number].weight {
            let dtype = job.checkpoint.entry(&weight.name)?.dtype;
            tensors.insert(weight.name.clone(), narrow(dtype, weights));
        }
    }
    Ok(tensors)
}
