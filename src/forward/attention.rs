//! Grouped-query attention over one micro-batch.

use super::workspace::AttentionBuffers;
use super::{Batch, Decoder, LayerWeights, Observe, Workspace};
use crate::backend::{AttentionShape, Backend, Rotation};
use crate::error::Result;
use crate::model::{Attention, Layer, NormScope, Projections};

/// From the normed input to the output, both in `work`.
pub(super) fn forward<B: Backend>(
    decoder: &Decoder<'_, B>,
    layer: &Layer,
    attention: &Attention,
    weights: &LayerWeights<B::Tensor>,
    batch: &Batch<B>,
    work: &mut Workspace<B::Tensor>,
    observe: Observe<'_, B::Tensor>,
) -> Result<()> {
    let (b, form) = (decoder.backend, &attention.form);
    let (normed, buffers, branch) = work.attention(form);
    project(b, attention, weights, normed, buffers)?;
    let AttentionBuffers { q, k, v, attended, gate, .. } = buffers;
    if let Some(kind) = &form.value_norm {
        b.norm_heads(v, form.heads.dim, kind, None)?;
    }
    let norm = |q: &mut B::Tensor, k: &mut B::Tensor| -> Result<()> {
        let (Some(norms), Some(numbers)) = (&form.head_norms, &attention.head_norms) else { return Ok(()) };
        for (x, number, heads) in [(q, numbers[0], form.heads.heads), (k, numbers[1], form.heads.kv_heads)] {
            let features = match norms.scope {
                NormScope::Head | NormScope::EachHead => form.heads.dim,
                NormScope::Row => heads * form.heads.dim,
            };
            let kind = &layer.norms[number].kind;
            b.norm_heads(x, features, kind, weights.norms[number].weight.as_ref())?;
        }
        Ok(())
    };
    let after = form.head_norms.is_some_and(|norms| norms.after_rotation);
    if !after {
        norm(q, k)?;
    }
    if let Some(factor) = form.query_scale {
        b.multiply(q, factor)?;
    }
    if let Some(rope) = form.rope {
        let (table, style) = (&decoder.rotary[rope], decoder.model.ropes[rope].style);
        let rotation = Rotation {
            head_dim: form.heads.dim,
            interleaved: style.interleaved,
            rounds_once: style.rounds_once,
        };
        b.rope(q, &rotation, &table.cos, &table.sin, &batch.rope_rows[rope])?;
        b.rope(k, &rotation, &table.cos, &table.sin, &batch.rope_rows[rope])?;
    }
    if after {
        norm(q, k)?;
    }
    if let (true, Some(factors)) = (form.has_temperature, &decoder.temperature) {
        b.multiply_rows(q, factors, &batch.positions)?;
    }
    let shape =
        AttentionShape { heads: form.heads, scale: form.scale, window: form.window, softcap: form.softcap };
    let sinks = attention.sinks.map(|number| &weights.vectors[number]);
    b.attention(q, k, v, &batch.bounds, &shape, sinks, attended)?;
    if let Some(gate) = gate {
        b.gate_by_sigmoid(attended, gate)?;
    }
    observe(attention.output_site, attended)?;
    linear(b, attended, weights, attention.output, branch)
}

/// q, k, v and the gate, from the normed input.
fn project<B: Backend>(
    b: &B,
    attention: &Attention,
    weights: &LayerWeights<B::Tensor>,
    normed: &B::Tensor,
    buffers: &mut AttentionBuffers<B::Tensor>,
) -> Result<()> {
    let (form, inputs) = (&attention.form, &attention.inputs);
    let AttentionBuffers { q, k, v, fused, gate, .. } = buffers;
    match (form.projections, fused) {
        (Projections::Fused, Some(fused)) => {
            linear(b, normed, weights, inputs[0], fused)?;
            b.copy_columns(fused, 0, q)?;
            b.copy_columns(fused, form.queries(), k)?;
            b.copy_columns(fused, form.queries() + form.keys(), v)?;
        }
        (Projections::KeyIsValue, _) => {
            linear(b, normed, weights, inputs[0], q)?;
            linear(b, normed, weights, inputs[1], k)?;
            b.copy(k, v)?;
        }
        _ => {
            linear(b, normed, weights, inputs[0], q)?;
            linear(b, normed, weights, inputs[1], k)?;
            linear(b, normed, weights, inputs[2], v)?;
        }
    }
    match (attention.gate, gate) {
        (Some(number), Some(gate)) => linear(b, normed, weights, number, gate),
        _ => Ok(()),
    }
}

/// The linear with this number.
pub(super) fn linear<B: Backend>(
    b: &B,
    x: &B::Tensor,
    weights: &LayerWeights<B::Tensor>,
    number: usize,
    out: &mut B::Tensor,
) -> Result<()> {
    let linear = &weights.linears[number];
    b.linear(x, &linear.weight, linear.bias.as_ref(), out)
}
