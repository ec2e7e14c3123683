//! The tensors of the source and of the output. Every source tensor is checked against the model, and every output
//! tensor gets a name, a size and the part of the model that it belongs to. Reads headers alone.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::operations::operations;
use crate::backend::Compute;
use crate::calibration::Sampling;
use crate::checkpoint::{Checkpoint, Entry, Layout, OutTensor, Scheme};
use crate::error::{Error, Result};
use crate::forward::features;
use crate::methods::Method;
use crate::model::{Group, Layer, Model, TensorSpec, is_dispensable};
use crate::nvfp4::BLOCK;
use crate::planner::ModelCost;
use crate::record::PartId;

/// The tensors of one part of the model: the embedding, a layer, or what follows the layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// Source tensors that are copied byte for byte.
    pub copied: Vec<String>,
    /// The number of the layer's sites.
    pub sites: usize,
    /// Linears to quantize, by site.
    pub quantized: Vec<Group>,
    /// Bytes of all source tensors.
    pub source_bytes: u64,
    /// All output tensors.
    pub outputs: Vec<OutTensor>,
}

impl Part {
    /// Adds a tensor that is copied.
    fn add_copy(&mut self, name: &str, entry: &Entry) {
        self.source_bytes += entry.bytes;
        self.outputs.push(OutTensor::new(name, entry.dtype, &entry.shape));
        self.copied.push(name.to_string());
    }

    /// Bytes of all output tensors.
    pub fn output_bytes(&self) -> u64 {
        self.outputs.iter().map(OutTensor::bytes).sum()
    }
}

/// The whole model's tensors, by part.
#[derive(Clone, Debug, PartialEq)]
pub struct Inventory {
    /// The embedding, which the first stage owns.
    pub head: Part,
    /// The decoder layers.
    pub layers: Vec<Part>,
    /// The final norm and lm_head, which the last stage owns.
    pub tail: Part,
    /// Modules that are not quantized, as config.json of the output lists them.
    pub ignored: Vec<String>,
    /// The dtype in which activations are computed.
    pub compute: Compute,
}

impl Inventory {
    /// Checks the source against the model and lists the output.
    ///
    /// # Errors
    /// Exit code 3: an already quantized source, a missing or unexpected tensor, a wrong shape or dtype,
    /// in-features that are not a multiple of 16. Exit code 2: ignore patterns that match nothing or
    /// split a fused group.
    pub fn new(
        checkpoint: &Checkpoint,
        model: &Model,
        layout: Layout,
        scheme: Scheme,
        ignore: &[String],
    ) -> Result<Inventory> {
        checkpoint.full_precision()?;
        // First of all: a tensor that is missing is found before so much as a name is made of those behind it.
        let seen = check(checkpoint, model)?;
        let names = checkpoint.tensors.keys().map(String::as_str);
        let carried: BTreeSet<&str> = names.filter(|name| model.is_carried(name)).collect();
        let ignored = super::ignore::ignored_modules(model, &carried, ignore)?;
        let builder = Builder { checkpoint, layout, scheme, ignored: &ignored };
        let head = builder.part(std::slice::from_ref(&model.embedding), vec![])?;
        let layer = |layer: &Layer| builder.part(&layer.tensors(), layer.groups());
        let layers = model.layers.iter().map(layer).collect::<Result<Vec<_>>>()?;
        let mut tail = builder.part(&model.tail_tensors(), vec![])?;
        for name in &carried {
            tail.add_copy(name, checkpoint.entry(name)?);
        }
        let all_bf16 = seen
            .iter()
            .filter_map(|name| checkpoint.tensors.get(name))
            .all(|entry| entry.shape.len() < 2 || entry.dtype == Dtype::BF16);
        let compute = if all_bf16 { Compute::Bf16 } else { Compute::F32 };
        let ignored = super::ignore::entries(model, &carried, &ignored, layout);
        Ok(Inventory { head, layers, tail, ignored, compute })
    }

    /// The tensors of a part.
    pub fn part(&self, part: PartId) -> &Part {
        match part {
            PartId::Head => &self.head,
            PartId::Layer(layer) => &self.layers[layer],
            PartId::Tail => &self.tail,
        }
    }

    /// Every output tensor in model order.
    pub fn outputs(&self) -> impl Iterator<Item = &OutTensor> {
        self.parts().flat_map(|part| &part.outputs)
    }

    /// The names of the source's tensors that are used, by part in model order.
    pub fn sources(&self) -> impl Iterator<Item = Vec<String>> {
        self.parts().map(|part| {
            let linears = part.quantized.iter().flat_map(|group| &group.members);
            part.copied.iter().cloned().chain(linears.map(|linear| linear.weight())).collect()
        })
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.head).chain(&self.layers).chain(std::iter::once(&self.tail))
    }

    /// The numbers of a layer's linears that are quantized, by site.
    pub fn numbers(&self, layer: usize) -> Vec<Vec<usize>> {
        let mut numbers = vec![vec![]; self.layers[layer].sites];
        for group in &self.layers[layer].quantized {
            numbers[group.site].clone_from(&group.numbers);
        }
        numbers
    }

    /// What the planner needs to know of this model under a method.
    pub fn cost(&self, model: &Model, method: Method) -> ModelCost {
        let loaded = |specs: &[TensorSpec]| {
            let elements: usize = specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
            (elements * self.compute.bytes()) as u64
        };
        ModelCost {
            layer_source: self.layers.iter().map(|part| part.source_bytes).collect(),
            layer_loaded: model.layers.iter().map(|layer| loaded(&layer.tensors())).collect(),
            layer_output: self.layers.iter().map(Part::output_bytes).collect(),
            head: self.head.output_bytes(),
            head_loaded: loaded(std::slice::from_ref(&model.embedding)),
            tail: self.tail.output_bytes(),
            hidden_row: (model.hidden * self.compute.bytes()) as u64,
            workspace_row: (features(model) * self.compute.bytes()) as u64,
            operations: model.layers.iter().map(|layer| operations(layer, method)).collect(),
            statistics: method
                .needs_statistics()
                .then(|| model.layers.iter().map(|layer| statistics(layer, method)).collect()),
            lighter: Method::LIGHTER
                .iter()
                .skip_while(|lighter| !method.needs_products() && lighter.needs_statistics())
                .filter(|_| method.needs_statistics())
                .map(|&lighter| (lighter.to_string(), self.cost(model, lighter)))
                .collect(),
        }
    }
}

/// Bytes of a layer's statistics, and of solving for its codes: site after site, each with its factor, its f32 weights
/// (as they are, and of one member the rounding's own and those back from its codes) and sampled outputs, while the
/// products of later sites wait.
fn statistics(layer: &Layer, method: Method) -> u64 {
    let (mut waiting, mut most) = (0, 0);
    for group in layer.groups().iter().rev() {
        let n = group.members[0].cols;
        let rows = group.members.iter().map(|linear| linear.rows);
        let (all, largest) = (rows.clone().sum::<usize>(), rows.max().unwrap_or(0));
        let products = if method.needs_products() { n * n } else { n };
        let sampled = Sampling::ROWS * (n + all);
        waiting += products + sampled;
        most = most.max(waiting + products + (all + 2 * largest) * n + 3 * sampled);
    }
    4 * most as u64
}

struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    layout: Layout,
    scheme: Scheme,
    ignored: &'a BTreeSet<String>,
}

impl Builder<'_> {
    fn part(&self, tensors: &[TensorSpec], groups: Vec<Group>) -> Result<Part> {
        let mut part = Part { sites: groups.len(), ..Part::default() };
        let mut quantized_weights = BTreeSet::new();
        for mut group in groups {
            let pairs =
                std::mem::take(&mut group.numbers).into_iter().zip(std::mem::take(&mut group.members));
            (group.numbers, group.members) =
                pairs.filter(|(_, linear)| !self.ignored.contains(&linear.name)).unzip();
            if group.members.is_empty() {
                continue;
            }
            for linear in &group.members {
                if linear.cols % BLOCK != 0 {
                    return Err(Error::input(format!(
                        "{} input features are not a multiple of {BLOCK}, so blocks would cross rows",
                        linear.cols
                    ))
                    .tensor(linear.weight())
                    .fix(format!("leave it in its dtype with --ignore {:?}", linear.name)));
                }
                quantized_weights.insert(linear.weight());
            }
            part.quantized.push(group);
        }
        for spec in tensors {
            let entry = self.checkpoint.entry(&spec.name)?;
            match quantized_weights.contains(&spec.name) {
                true => part.source_bytes += entry.bytes,
                false => part.add_copy(&spec.name, entry),
            }
        }
        for linear in part.quantized.iter().flat_map(|group| &group.members) {
            let outputs = self.layout.linear_tensors(&linear.name, linear.rows, linear.cols, self.scheme);
            part.outputs.extend(outputs);
        }
        Ok(part)
    }
}

/// Checks every tensor of the model, and that the source has no other tensor, which would be missing from the output.
/// Returns their names.
fn check(checkpoint: &Checkpoint, model: &Model) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for spec in model.tensors() {
        model.stored(checkpoint, &spec)?;
        seen.insert(spec.name);
    }
    let other =
        |name: &&String| !seen.contains(*name) && !is_dispensable(model, name) && !model.is_carried(name);
    match checkpoint.tensors.keys().find(other) {
        Some(name) => Err(model.beyond(checkpoint, name)),
        None => Ok(seen),
    }
}
