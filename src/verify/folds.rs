//! Folds that an output shows: by how much each input channel was scaled, and what must make up for it.
//!
//! A fold multiplies what produces a channel and divides the weights that read it. Nothing the writer believed
//! is needed to undo it: where a norm or a bias produces the channel, its own weights tell the factor; elsewhere
//! the reading weights do, in the sense of least squares, and the producing rows are held to it.

use rayon::prelude::*;
use safetensors::Dtype;

use super::scan::widen as read_range;
use super::subject::Subject;
use crate::checkpoint::{SourceTensor, widen};
use crate::model::{LinearSpec, ModelConfig, Site};
use crate::nvfp4::{BLOCK, dequantize};

/// Factors by channel of a layer's sites; none where nothing was folded.
#[derive(Debug, Default)]
pub struct LayerFolds {
    /// What the columns of a site's weights were divided by.
    columns: [Option<Vec<f32>>; 4],
    /// What the rows of v were multiplied by.
    pub v: Option<Vec<f32>>,
    /// What the rows of up were multiplied by.
    pub up: Option<Vec<f32>>,
}

impl LayerFolds {
    /// Reads the folds of a layer; none where the files do not say that there are any.
    pub fn of(subject: &Subject, model: &ModelConfig, layer: usize) -> LayerFolds {
        let mut folds = LayerFolds::default();
        if !subject.folds() {
            return folds;
        }
        for (site, norm) in [Site::Qkv, Site::GateUp].into_iter().zip(model.layer_norms(layer)) {
            folds.columns[site as usize] = stored_factors(subject, &norm.name);
        }
        let groups = model.groups(layer);
        for site in [Site::O, Site::Down] {
            folds.columns[site as usize] = read_factors(subject, &groups[site as usize].members[0]);
        }
        // Query heads that share a value head share its factors; their mean is less noisy than one.
        let (repeats, width) = (model.heads / model.kv_heads, model.head_dim);
        folds.v = folds.columns[Site::O as usize].as_ref().map(|factors| {
            let heads = factors.chunks_exact(repeats * width);
            let mean = |head: &[f32], i: usize| (0..repeats).map(|r| head[r * width + i]).sum::<f32>();
            heads.flat_map(|head| (0..width).map(move |i| mean(head, i) / repeats as f32)).collect()
        });
        folds.up = folds.columns[Site::Down as usize].clone();
        // A producer's bias holds its factors as exactly as a norm does.
        let bias = |site: Site, member: usize| {
            groups[site as usize].members[member].bias().and_then(|name| stored_factors(subject, &name))
        };
        folds.v = bias(Site::Qkv, 2).or(folds.v);
        folds.up = bias(Site::GateUp, 1).or(folds.up);
        folds.columns[Site::Down as usize].clone_from(&folds.up);
        folds.columns[Site::O as usize] = folds.v.as_ref().map(|factors| {
            let heads = factors.chunks_exact(width);
            heads.flat_map(|head| std::iter::repeat_n(head, repeats).flatten()).copied().collect()
        });
        folds
    }

    /// Applies what was folded to elements `first..` of a member's source weight.
    pub fn apply(&self, site: Site, member: usize, cols: usize, first: usize, w: &mut [f32]) {
        let rows = match (site, member) {
            (Site::Qkv, 2) => self.v.as_ref(),
            (Site::GateUp, 1) => self.up.as_ref(),
            _ => None,
        };
        let columns = self.columns[site as usize].as_ref();
        if rows.is_none() && columns.is_none() {
            return;
        }
        for (i, w) in w.iter_mut().enumerate() {
            let (row, column) = ((first + i) / cols, (first + i) % cols);
            *w = *w * rows.map_or(1.0, |f| f[row]) / columns.map_or(1.0, |f| f[column]);
        }
    }
}

/// The ratio of a vector to the source's; 1 where that is zero.
fn stored_factors(subject: &Subject, name: &str) -> Option<Vec<f32>> {
    let source = subject.source.as_ref()?.tensor(name).ok()?;
    let here = SourceTensor::from_bytes(name, source.dtype, &source.shape, &subject.map(name)?).ok()?;
    let (there, here) = (widen(&source).ok()?, widen(&here).ok()?);
    let ratio = |(here, there): (&f32, &f32)| if *there == 0.0 { 1.0 } else { here / there };
    (here.len() == there.len()).then(|| here.iter().zip(&there).map(ratio).collect())
}

/// `Σ_rows w² / Σ_rows ŵ·w` of each column.
fn read_factors(subject: &Subject, linear: &LinearSpec) -> Option<Vec<f32>> {
    let source = subject.source.as_ref()?.tensor(&linear.weight()).ok()?;
    let known = matches!(source.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
    if !known || source.shape != [linear.rows, linear.cols] {
        return None;
    }
    let names = subject.names(&linear.name);
    let global = subject.layout?.global(subject.scalar(&names.weight_global)?);
    let n = linear.cols;
    // Read part by part: layers are looked at side by side, and none should be in memory whole.
    const ROWS: usize = 64;
    let part = |part: usize| -> Option<Vec<[f64; 2]>> {
        let elements = part * ROWS * n..linear.rows.min((part + 1) * ROWS) * n;
        let (mut codes, mut scales) = (vec![0; elements.len() / 2], vec![0; elements.len() / BLOCK]);
        subject.read(&names.codes, elements.start / 2, &mut codes)?;
        subject.read(&names.scales, elements.start / BLOCK, &mut scales)?;
        let (mut w, mut back) = (Vec::new(), vec![0.0; elements.len()]);
        read_range(&source, elements, &mut Vec::new(), &mut w)?;
        dequantize(&codes, &scales, global, &mut back);
        let mut sums = vec![[0.0; 2]; n];
        for (w, q) in w.chunks_exact(n).zip(back.chunks_exact(n)) {
            for ([squares, products], (w, q)) in sums.iter_mut().zip(w.iter().zip(q)) {
                *squares += *w as f64 * *w as f64;
                *products += *w as f64 * *q as f64;
            }
        }
        Some(sums)
    };
    let parts = (0..linear.rows.div_ceil(ROWS)).into_par_iter().map(part).collect::<Option<Vec<_>>>()?;
    let total = |column: usize, of: usize| parts.iter().map(|sums| sums[column][of]).sum::<f64>();
    let factor = |column: usize| (total(column, 0) / total(column, 1)) as f32;
    // A column of zeros, in the source or after rounding, tells nothing.
    Some((0..n).map(factor).map(|f| if f.is_normal() && f > 0.0 { f } else { 1.0 }).collect())
}
