//! A layer's tensors on a backend.

use super::rounded;
use crate::backend::{Activation, Backend, Compute};
use crate::checkpoint::{SourceTensor, widen};
use crate::error::Result;
use crate::model::{Function, Layer, Mixer};

/// A linear's weight `[rows, cols]` and bias `[rows]` on a backend.
pub struct Linear<T> {
    /// The weight.
    pub weight: T,
    /// The bias, where the model has one.
    pub bias: Option<T>,
}

/// A norm's tensors on a backend.
pub(super) struct NormWeights<T> {
    pub weight: Option<T>,
    pub bias: Option<T>,
}

/// One decoder layer's tensors on a backend, by their numbers in the layer.
pub struct LayerWeights<T> {
    /// The linears.
    pub linears: Vec<Linear<T>>,
    pub(super) norms: Vec<NormWeights<T>>,
    pub(super) vectors: Vec<T>,
    /// What the layer's output is multiplied by.
    pub(super) scalar: Option<f32>,
    /// The function of the layer's MLP, with its parameters.
    pub(super) activation: Activation,
}

impl<T> LayerWeights<T> {
    /// Loads a layer, taking each tensor by name from `source`.
    ///
    /// # Errors
    /// What `source` or the backend returns.
    pub fn load<B: Backend<Tensor = T>>(
        backend: &B,
        layer: &Layer,
        source: &dyn Fn(&str) -> Result<SourceTensor>,
    ) -> Result<LayerWeights<T>> {
        let load = |name: &str| backend.load(&source(name)?);
        let maybe = |name: Option<&str>| name.map(load).transpose();
        let mut norms = vec![];
        for norm in &layer.norms {
            let name = |spec: &Option<crate::model::TensorSpec>| spec.as_ref().map(|spec| spec.name.clone());
            norms.push(NormWeights {
                weight: maybe(name(&norm.weight).as_deref())?,
                bias: maybe(name(&norm.bias).as_deref())?,
            });
        }
        let mut linears = vec![];
        for linear in &layer.linears {
            let (bias, weight) = (maybe(linear.bias().as_deref())?, load(&linear.weight())?);
            linears.push(Linear { weight, bias });
        }
        let vectors = layer.vectors.iter().map(|spec| load(&spec.name)).collect::<Result<_>>()?;
        let number = |vector: usize| Ok(widen(&source(&layer.vectors[vector].name)?)?[0]);
        let scalar = layer.scalar.map(number).transpose()?;
        let activation = activation(layer, backend.compute(), &number)?;
        Ok(LayerWeights { linears, norms, vectors, scalar, activation })
    }
}

/// The function of a layer's MLP, with the parameters that the layer stores.
fn activation(layer: &Layer, compute: Compute, number: &dyn Fn(usize) -> Result<f32>) -> Result<Activation> {
    let mixers = layer.blocks.iter().flat_map(|block| &block.mixers);
    let mlp = mixers.into_iter().find_map(|mixer| match mixer {
        Mixer::Mlp(mlp) => Some(mlp),
        Mixer::Attention(_) => None,
    });
    let Some(mlp) = mlp else { return Ok(Activation::Silu) };
    Ok(match (mlp.form.function, mlp.parameters) {
        (Function::Of(activation), _) => activation,
        (Function::Xielu, Some([p, n])) => xielu(compute, number(p)?, number(n)?),
        (Function::Xielu, None) => unreachable!("the description gives xIELU its parameters"),
    })
}

/// xIELU (<https://arxiv.org/abs/2411.13010>) by its stored parameters; each step is rounded to what is computed in.
fn xielu(compute: Compute, p: f32, n: f32) -> Activation {
    let softplus = |x: f32| rounded(compute, if x > 20.0 { x } else { x.exp().ln_1p() });
    Activation::Xielu { alpha_p: softplus(p), alpha_n: rounded(compute, 0.5 + softplus(n)) }
}
