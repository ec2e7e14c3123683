//! What to do where a model does not fit: each remedy that is named has been planned with.

use std::ops::Range;

use super::{Planner, Work, in_rank_order};
use crate::error::Error;
use crate::units::binary;

/// Less than this share of the calibration documents is not worth naming.
const SMALL_PART: usize = 8;

impl Planner<'_> {
    /// Why no split fits, and what would.
    pub(super) fn too_small(&self) -> Error {
        let needs = |index: usize| {
            let one = |layer| self.least_memory(index, &(layer..layer + 1));
            (0..self.model.layers()).map(one).max().unwrap_or(0)
        };
        let short = |index: &usize| self.nodes[*index].memory as f64 / needs(*index) as f64;
        let ranks = 0..self.nodes.len();
        let tightest = ranks.min_by(|a, b| short(a).total_cmp(&short(b))).expect("a job has ranks");
        let node = &self.nodes[tightest];
        let error = Error::plan(format!(
            "no split fits: rank {} ({}) may use {}, and one layer needs up to {}",
            node.rank,
            node.host,
            binary(node.memory),
            binary(needs(tightest)),
        ));
        self.remedied(error, None, &|planner| planner.fastest().is_some())
    }

    /// Why a rank can't have the layers that it was given, and what would help.
    pub(super) fn has_no_room(&self, index: usize, layers: &Range<usize>, counts: &[usize]) -> Error {
        let node = &self.nodes[index];
        let (needed, first, end) = (self.least_memory(index, layers), layers.start, layers.end);
        let error = Error::plan(match needed > node.memory {
            true => format!(
                "rank {} ({}) needs {} for layers {first}..{end} and may use {}",
                node.rank,
                node.host,
                binary(needed),
                binary(node.memory),
            ),
            false => format!(
                "rank {} ({}) has {} of host memory beside its card, and the hidden states of layers {first}..{end} \
                 need more",
                node.rank,
                node.host,
                binary(node.host_memory),
            ),
        });
        let stages = in_rank_order(counts);
        let fits = |planner: &Planner| stages.iter().all(|(index, layers)| planner.fits(*index, layers));
        self.remedied(error, Some(counts), &fits)
    }

    /// What a rank must have for these layers at the very least, where it computes.
    fn least_memory(&self, index: usize, layers: &Range<usize>) -> u64 {
        self.model.slice(layers.clone()).least_memory(&self.nodes[index], self.model, self.work)
    }

    /// Adds to `error` every option that makes the job fit.
    fn remedied(&self, error: Error, counts: Option<&[usize]>, fits: &dyn Fn(&Planner) -> bool) -> Error {
        let with = |work: &Work| fits(&Planner { nodes: self.nodes.clone(), model: self.model, work });
        let mut remedies = Vec::new();
        if !self.work.spills
            && self.model.statistics.is_some()
            && with(&Work { spills: true, ..self.work.clone() })
        {
            remedies.push("--work-dir DIR, where hidden states wait in files".to_string());
        }
        // Fewer documents never need more. A small part of them is another job.
        let fewer = |documents: usize| with(&self.work.with_documents(documents));
        let (mut most, mut too_many) = (0, self.work.documents);
        while too_many > most + 1 {
            let middle = most + (too_many - most) / 2;
            *if fewer(middle) { &mut most } else { &mut too_many } = middle;
        }
        if most * SMALL_PART >= self.work.documents && most > 0 {
            remedies.push(format!("--calib-samples {most}"));
        }
        let lighter = self
            .model
            .lighter
            .iter()
            .find(|(_, model)| fits(&Planner { nodes: self.nodes.clone(), model, work: self.work }));
        if let Some((method, _)) = lighter {
            remedies.push(format!("--method {method}"));
        }
        if let Some(found) = counts.and_then(|_| self.fastest()) {
            let mut split = vec![0; self.nodes.len()];
            found.stages.iter().for_each(|(index, layers)| split[*index] = layers.len());
            let split: Vec<String> = split.iter().map(usize::to_string).collect();
            remedies.push(format!("no --layers-per-rank (the ranks then get {} layers)", split.join(", ")));
        }
        error.fix(match remedies.is_empty() {
            true => "raise its --memory-per-rank where the machine has more, use a machine with more memory in its \
                     place, or leave this rank out"
                .to_string(),
            false => format!("what would fit: {}", remedies.join("; or ")),
        })
    }
}
