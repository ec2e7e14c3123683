//! Folds that an output shows: by how much each input channel was scaled, and what must make up for it.
//!
//! A fold multiplies what produces a channel and divides the weights that read it. Nothing the writer believed is
//! needed to undo it. A norm's own weights tell its factors exactly, and so do the elements of a bias that are not
//! zero. Where rows of v and up alone produce the channel, its factor is measured: in the row that produces it and in
//! the columns that read it, each counting as much as it can be trusted.

use std::collections::HashMap;

use rayon::prelude::*;
use safetensors::Dtype;

use crate::backend::Gamma;
use crate::checkpoint::{SourceTensor, stored, widen};
use crate::model::{Layer, LinearSpec, Norm, Producer, Rows};
use crate::nvfp4::{BLOCK, dequantize};
use crate::verify::scan::widen as read_range;
use crate::verify::subject::Subject;

/// The factors that were folded in a layer; none where nothing was.
#[derive(Debug, Default)]
pub struct LayerFolds {
    /// What the columns of the linears that read a site were divided by.
    columns: Vec<Option<Vec<f32>>>,
    /// What the rows of a linear were multiplied by.
    rows: HashMap<usize, Vec<f32>>,
}

impl LayerFolds {
    /// Reads the folds of a layer; none where the files do not say that there are any.
    pub fn of(subject: &Subject, layer: &Layer) -> LayerFolds {
        let mut folds = LayerFolds { columns: vec![None; layer.sites.len()], rows: HashMap::new() };
        if !subject.folds() {
            return folds;
        }
        for (site, columns) in layer.sites.iter().zip(&mut folds.columns) {
            if let Producer::Norm(norm) = &site.producer {
                *columns = norm_factors(subject, &layer.norms[*norm]);
            }
        }
        for (number, site) in layer.sites.iter().enumerate() {
            let (Producer::Rows(rows), [reader]) = (&site.producer, site.members.as_slice()) else {
                continue;
            };
            let producer = &layer.linears[rows.linear];
            let columns = folds.columns[layer.site_of(rows.linear)].as_deref();
            let reader = &layer.linears[*reader];
            if let Some(factors) = row_factors(subject, rows, producer, columns, reader) {
                folds.columns[number] = Some(rows.channels(&factors));
                let all = folds.rows.entry(rows.linear).or_insert_with(|| vec![1.0; producer.rows]);
                all[rows.first..rows.first + rows.count].copy_from_slice(&factors);
            }
        }
        folds
    }

    /// Applies what was folded to elements `first..` of the source weight of a linear of a site.
    pub fn apply(&self, site: usize, linear: usize, cols: usize, first: usize, w: &mut [f32]) {
        let (rows, columns) = (self.rows.get(&linear), self.columns[site].as_ref());
        if rows.is_none() && columns.is_none() {
            return;
        }
        for (i, w) in w.iter_mut().enumerate() {
            let (row, column) = ((first + i) / cols, (first + i) % cols);
            *w = *w * rows.map_or(1.0, |f| f[row]) / columns.map_or(1.0, |f| f[column]);
        }
    }
}

/// The factors by which a norm's output was multiplied: ones where its weights tell nothing.
pub fn norm_factors(subject: &Subject, norm: &Norm) -> Option<Vec<f32>> {
    let weight = norm.weight.as_ref()?;
    let gamma = norm.kind.gamma;
    if gamma == Gamma::Weight {
        let factors = stored_factors(subject, &weight.name)?;
        return Some(factors.into_iter().map(|f| f.unwrap_or(1.0)).collect());
    }
    let (there, here) = both(subject, &weight.name)?;
    let dtype = subject.source.as_ref()?.tensors.get(&weight.name)?.dtype;
    let round = |x| stored(dtype, x);
    let ratio = |(here, there): (&f32, &f32)| {
        let ratio = gamma.of_weight(*here, round) / gamma.of_weight(*there, round);
        if ratio.is_normal() { ratio } else { 1.0 }
    };
    Some(here.iter().zip(&there).map(ratio).collect())
}

/// Whether an element of a norm or of a bias can be the source's times a factor: the sign is the same, and what was
/// not zero is zero only where the factor may have made it too small for the dtype. Of a norm that multiplies by one
/// plus its weight, the sum is what holds the factor.
pub fn holds_factor(dtype: Dtype, gamma: Gamma, here: f32, there: f32) -> bool {
    /// No fold makes an element smaller than by this.
    const LEAST: f32 = 1.0 / 64.0;
    let vanished = gamma == Gamma::Weight && here == 0.0 && (there * LEAST).abs() <= smallest_normal(dtype);
    let round = |x| stored(dtype, x);
    let (here, there) = (gamma.of_weight(here, round), gamma.of_weight(there, round));
    vanished || if there == 0.0 { here == 0.0 } else { (here / there).is_normal() && here / there > 0.0 }
}

/// Whether an element of a norm's bias is the source's times the factor that the norm's weight holds.
pub fn has_factor(dtype: Dtype, here: f32, there: f32, factor: f32) -> bool {
    /// What storing a product may move it by: more than a rounding to BF16 does.
    const ROUNDING: f32 = 1.0 / 128.0;
    let expected = there * factor;
    (here - expected).abs() <= ROUNDING * expected.abs() + smallest_normal(dtype)
}

fn smallest_normal(dtype: Dtype) -> f32 {
    if dtype == Dtype::F16 { half::f16::MIN_POSITIVE.to_f32() } else { f32::MIN_POSITIVE }
}

/// The ratio of a vector's elements to the source's; none for those that tell nothing, because they are zero or have
/// lost digits.
fn stored_factors(subject: &Subject, name: &str) -> Option<Vec<Option<f32>>> {
    let (there, here) = both(subject, name)?;
    let least = smallest_normal(subject.source.as_ref()?.tensors.get(name)?.dtype);
    let is_exact = |x: f32| x.abs() >= least;
    let ratio = |(&here, &there): (&f32, &f32)| (is_exact(here) && is_exact(there)).then(|| here / there);
    Some(here.iter().zip(&there).map(ratio).collect())
}

/// A vector in the source and here.
fn both(subject: &Subject, name: &str) -> Option<(Vec<f32>, Vec<f32>)> {
    let source = subject.source.as_ref()?.tensor(name).ok()?;
    let here = SourceTensor::from_bytes(name, source.dtype, &source.shape, &subject.map(name)?).ok()?;
    let (there, here) = (widen(&source).ok()?, widen(&here).ok()?);
    (here.len() == there.len()).then_some((there, here))
}

/// The factors of a producer's rows: those of its bias where it has one that holds them exactly, measured ones
/// elsewhere. The producer's own columns were divided by `columns`. None where the linears can't be compared with the
/// source.
fn row_factors(
    subject: &Subject,
    rows: &Rows,
    producer: &LinearSpec,
    columns: Option<&[f32]>,
    reader: &LinearSpec,
) -> Option<Vec<f32>> {
    let range = rows.first..rows.first + rows.count;
    let stored = producer.bias().and_then(|name| stored_factors(subject, &name));
    let lines = Pair::open(subject, producer)?.rows(columns)?;
    let read = Pair::open(subject, reader)?.columns()?;
    let mut measured: Vec<[f64; 2]> =
        lines[range.clone()].iter().map(|line| line.log_ratio(producer.cols)).collect();
    for (i, line) in read.iter().enumerate() {
        let [sum, weight] = line.log_ratio(reader.rows);
        let row = &mut measured[rows.of_channel(i)];
        // A channel that is the row's square has twice its logarithm.
        *row = match rows.squared {
            false => [row[0] - sum, row[1] + weight],
            true => [row[0] - 2.0 * sum, row[1] + 4.0 * weight],
        };
    }
    // Rows and columns that are zero, in the source or after rounding, tell nothing.
    let factor = |[sum, weight]: [f64; 2]| if weight > 0.0 { (sum / weight).exp() as f32 } else { 1.0 };
    let measured = measured.into_iter().map(factor);
    Some(match stored {
        None => measured.collect(),
        Some(stored) => {
            let pairs = stored[range].iter().zip(measured);
            pairs.map(|(stored, measured)| stored.unwrap_or(measured)).collect()
        }
    })
}

/// A row or a column of the source and of what was made of it: `Σ w²`, `Σ ŵ·w` and `Σ ŵ²`.
#[derive(Clone, Copy, Default)]
pub struct Line([f64; 3]);

impl Line {
    /// Adds an element of the source, and what was made of it.
    pub fn add(&mut self, w: f32, q: f32) {
        let (w, q) = (w as f64, q as f64);
        self.0[0] += w * w;
        self.0[1] += w * q;
        self.0[2] += q * q;
    }

    /// Adds the elements of another part of the same line.
    pub fn join(&mut self, part: &Line) {
        self.0.iter_mut().zip(part.0).for_each(|(sum, part)| *sum += part);
    }

    /// By which factor the line is another than the source's, where that is more than rounding explains. Rounding moves
    /// the logarithm of the factor at random, by less the more `elements` there are, and in one direction by about as
    /// much as it moves the line: small elements may all become smaller, or larger.
    pub fn is_off_by(&self, elements: usize) -> Option<f64> {
        /// What is explained in any case: a channel that is off by less changes nothing that can be seen.
        const EXPLAINED: f64 = 0.05;
        let [sum, weight] = self.log_ratio(elements);
        let (log, moved) = (sum / weight, elements as f64 / weight);
        let explained = EXPLAINED + 6.0 * (1.0 / weight).sqrt() + 2.0 * moved;
        (weight > 0.0 && log.abs() > explained).then(|| log.exp())
    }

    /// The logarithm of the factor by which the source was multiplied, in the sense of least squares, times its weight;
    /// and its weight, which is the inverse of its variance.
    fn log_ratio(&self, elements: usize) -> [f64; 2] {
        /// The least part of a line that rounding is taken to have moved.
        const ROUNDING: f64 = 1e-4;
        let [source, both, here] = self.0;
        let moved = (here * source / (both * both) - 1.0).max(ROUNDING);
        let (log, weight) = ((both / source).ln(), elements as f64 / moved);
        if both > 0.0 && log.is_finite() && weight.is_finite() { [log * weight, weight] } else { [0.0; 2] }
    }
}

/// A linear here and in the source.
struct Pair<'a> {
    subject: &'a Subject,
    linear: &'a LinearSpec,
    source: SourceTensor,
}

/// Rows that are read at a time: layers are looked at side by side, and none should be in memory whole.
const ROWS: usize = 64;

impl Pair<'_> {
    fn open<'a>(subject: &'a Subject, linear: &'a LinearSpec) -> Option<Pair<'a>> {
        let source = subject.source.as_ref()?.tensor(&linear.weight()).ok()?;
        let known = matches!(source.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        (known && source.shape == [linear.rows, linear.cols]).then_some(Pair { subject, linear, source })
    }

    /// Every row, the source's columns divided by `columns`.
    fn rows(&self, columns: Option<&[f32]>) -> Option<Vec<Line>> {
        let parts = self.parts(|w, here| {
            let row = |(w, here): (&[f32], &[f32])| {
                let mut line = Line::default();
                for (i, (w, q)) in w.iter().zip(here).enumerate() {
                    line.add(w / columns.map_or(1.0, |f| f[i]), *q);
                }
                line
            };
            w.chunks_exact(self.linear.cols).zip(here.chunks_exact(self.linear.cols)).map(row).collect()
        })?;
        Some(parts.concat())
    }

    /// Every column.
    fn columns(&self) -> Option<Vec<Line>> {
        let parts = self.parts(|w, here| {
            let mut lines = vec![Line::default(); self.linear.cols];
            for (w, here) in w.chunks_exact(self.linear.cols).zip(here.chunks_exact(self.linear.cols)) {
                lines.iter_mut().zip(w.iter().zip(here)).for_each(|(line, (w, q))| line.add(*w, *q));
            }
            lines
        })?;
        let add = |mut sum: Vec<Line>, part: Vec<Line>| {
            sum.iter_mut().zip(&part).for_each(|(sum, part)| sum.join(part));
            sum
        };
        parts.into_iter().reduce(add)
    }

    /// What `lines` makes of some rows of the source and of what is here, in parallel, in order.
    fn parts(&self, lines: impl Fn(&[f32], &[f32]) -> Vec<Line> + Sync) -> Option<Vec<Vec<Line>>> {
        let Pair { subject, linear, source } = self;
        let names = subject.names(&linear.name);
        let global = subject.layout?.global(subject.scalar(&names.weight_global)?);
        let part = |part: usize| {
            let elements = part * ROWS * linear.cols..linear.rows.min((part + 1) * ROWS) * linear.cols;
            let (mut codes, mut scales) = (vec![0; elements.len() / 2], vec![0; elements.len() / BLOCK]);
            subject.read(&names.codes, elements.start / 2, &mut codes)?;
            subject.read(&names.scales, elements.start / BLOCK, &mut scales)?;
            let (mut w, mut here) = (Vec::new(), vec![0.0; elements.len()]);
            read_range(source, elements, &mut Vec::new(), &mut w)?;
            dequantize(&codes, &scales, global, &mut here);
            Some(lines(&w, &here))
        };
        (0..linear.rows.div_ceil(ROWS)).into_par_iter().map(part).collect()
    }
}
