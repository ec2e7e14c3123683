//! The dense MLP over one micro-batch.

use super::attention::linear;
use super::workspace::MlpBuffers;
use super::{Decoder, LayerWeights, Observe, Workspace};
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Mlp;

/// From the normed input to the output, both in `work`.
pub(super) fn forward<B: Backend>(
    decoder: &Decoder<'_, B>,
    mlp: &Mlp,
    weights: &LayerWeights<B::Tensor>,
    work: &mut Workspace<B::Tensor>,
    observe: Observe<'_, B::Tensor>,
) -> Result<()> {
    let b = decoder.backend;
    let (normed, MlpBuffers { gate, up, fused }, branch) = work.mlp(&mlp.form);
    match (up, fused) {
        (None, _) => {
            linear(b, normed, weights, mlp.inputs[0], gate)?;
            b.activate(gate, weights.activation)?;
        }
        (Some(up), None) => {
            linear(b, normed, weights, mlp.inputs[0], gate)?;
            linear(b, normed, weights, mlp.inputs[1], up)?;
            b.activate_mul(gate, up, weights.activation)?;
        }
        (Some(up), Some(fused)) => {
            linear(b, normed, weights, mlp.inputs[0], fused)?;
            b.copy_columns(fused, 0, gate)?;
            b.copy_columns(fused, mlp.form.features, up)?;
            b.activate_mul(gate, up, weights.activation)?;
        }
    }
    observe(mlp.output_site, gate)?;
    linear(b, gate, weights, mlp.output, branch)
}
