//! What every rank knows of the job before the first layer.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::inventory::{Inventory, Part};
use crate::calibration::{MicroBatch, Sampling};
use crate::checkpoint::{Checkpoint, Layout};
use crate::methods::Method;
use crate::model::Model;
use crate::record::{Observed, PartId};

/// The job. It is the same on every rank, except for the path of the checkpoint.
pub struct Job {
    /// The model.
    pub model: Model,
    /// The source on this host.
    pub checkpoint: Checkpoint,
    /// The tensors of the source and of the output.
    pub inventory: Inventory,
    /// How the output is written.
    pub layout: Layout,
    /// Whether engines quantize the inputs of linears when they run the model.
    pub quantized_inputs: bool,
    /// How codes and scales are chosen.
    pub method: Method,
    /// Which calibration tokens are used to choose codes and scales, and which to judge the choice.
    pub sampling: Sampling,
    /// Tokens of each calibration document.
    pub lengths: Vec<usize>,
    /// The documents' token ids, one after another.
    pub ids: Vec<u32>,
    /// The documents, packed into micro-batches.
    pub micro_batches: Vec<MicroBatch>,
    /// Parts that an earlier process of this run finished.
    pub done: HashSet<PartId>,
    /// By layer, the running maxima that an earlier process of this run recorded; for methods that need only maxima.
    pub observed: HashMap<usize, Observed>,
    /// Whether the forward pass is needed at all.
    pub calibrates: bool,
}

impl Job {
    /// Whether an earlier process finished this part.
    pub fn is_finished(&self, part: PartId) -> bool {
        self.done.contains(&part)
    }

    /// Whether a micro-batch must still pass a layer.
    pub fn needs(&self, layer: usize, micro_batch: usize) -> bool {
        let seen = self.observed.get(&layer).map_or(0, |observed| observed.documents);
        let open = self.method.needs_statistics() || seen < self.micro_batches[micro_batch].samples.end;
        self.calibrates && open && !self.is_finished(PartId::Layer(layer))
    }

    /// The tensors of a part.
    pub fn part(&self, part: PartId) -> &Part {
        self.inventory.part(part)
    }

    /// The token ids of a micro-batch.
    pub fn ids_of(&self, micro_batch: usize) -> &[u32] {
        let samples: &Range<usize> = &self.micro_batches[micro_batch].samples;
        let start: usize = self.lengths[..samples.start].iter().sum();
        let length: usize = self.lengths[samples.clone()].iter().sum();
        &self.ids[start..start + length]
    }
}
