//! One pass over a quantized linear's bytes: what the rules about values need.

use std::ops::Range;
use std::sync::Mutex;

use half::f16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::rules::folds::{LayerFolds, Line};
use super::subject::Subject;
use crate::checkpoint::{Layout, LinearNames, LinearScheme, SourceTensor};
use crate::model::{Group, Layer, LinearSpec};
use crate::nvfp4::content::Content;
use crate::nvfp4::{self, BLOCK, Distance, GlobalScale, dequantize};

/// What was found in one linear.
pub struct LinearScan {
    /// Module name.
    pub module: String,
    /// The linears that read the same input: the name of the first.
    pub group: String,
    /// Those of them that engines merge with it: the name of the first.
    pub fused: String,
    /// Codes and block scales, counted.
    pub content: Content,
    /// The weight's global scale as stored.
    pub weight_global: f32,
    /// The input's global scale as stored.
    pub input_global: Option<f32>,
    /// The distance to the source.
    pub distance: Option<Distance>,
    /// The distance that max scales would have, where `distance` is worth a look.
    pub max_distance: Option<Distance>,
    /// Bytes of codes, of block scales and of the global scale that max calibration would have chosen
    /// otherwise.
    pub differing: Option<usize>,
    /// The input channels whose weights are off the source's by a common factor, and these factors: what produces the
    /// channel does not hold the factor that was folded into the weights.
    pub unbalanced: Vec<(usize, f64)>,
}

/// The relative error from which on a linear is compared with what max scales would have made of it.
pub const WORTH_A_LOOK: f64 = 0.15;

/// Elements that are compared at a time.
const CHUNK: usize = 1 << 18;

/// Scans the NVFP4 linears of a layer that read the same input. Distances are to the source with the folds applied.
pub fn scan_group(subject: &Subject, layer: &Layer, group: &Group, folds: &LayerFolds) -> Vec<LinearScan> {
    let members: Vec<&LinearSpec> = group
        .members
        .iter()
        .filter(|linear| matches!(subject.schemes.of_module(&linear.name), LinearScheme::Nvfp4 { .. }))
        .collect();
    let sources: Vec<Option<SourceTensor>> = members
        .iter()
        .map(|linear| subject.source.as_ref()?.tensor(&linear.weight()).ok())
        .map(|source| source.filter(|s| matches!(s.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)))
        .collect();
    // What max calibration would have chosen is asked only of files that say they hold it.
    let max = subject.method.as_deref() == Some("max");
    let amax = sources.iter().flatten().filter(|_| max).map(source_amax).fold(0.0, f32::max);
    let expected = GlobalScale::from_amax(amax);
    let first = group.members[0].name.clone();
    let scan = |(linear, source): (&&LinearSpec, &Option<SourceTensor>)| {
        let names = subject.names(&linear.name);
        let weight_global = subject.scalar(&names.weight_global)?;
        let member = group.members.iter().position(|member| member.name == linear.name).unwrap_or(0);
        let number = group.numbers[member];
        let source = source.as_ref().filter(|source| source.shape == [linear.rows, linear.cols]);
        let scan = Scan {
            subject,
            names: &names,
            elements: linear.rows * linear.cols,
            columns: subject.folds().then(|| Mutex::new(vec![Line::default(); linear.cols])),
            source,
            fold: &|first, w| folds.apply(group.site, number, linear.cols, first, w),
            global: subject.layout?.global(weight_global),
            expected: max.then_some(expected),
        };
        let found = scan.run()?;
        let stored = subject.layout.unwrap_or(Layout::Modelopt).scalar(expected);
        let distance = source.map(|_| found.distance);
        let close = distance.is_none_or(|distance| distance.relative() <= WORTH_A_LOOK);
        let differs = max && stored != weight_global.to_le_bytes();
        Some(LinearScan {
            module: linear.name.clone(),
            group: first.clone(),
            fused: fused_with(layer, number),
            content: found.content,
            weight_global,
            input_global: subject.scalar(&names.input_global),
            distance,
            max_distance: if close { None } else { scan.under_max() },
            differing: source.map(|_| found.differing + if differs { 4 } else { 0 }),
            unbalanced: scan.unbalanced(linear.rows),
        })
    };
    members.iter().zip(&sources).filter_map(scan).collect()
}

/// The first of the linears that engines merge with the one with this number.
fn fused_with(layer: &Layer, number: usize) -> String {
    let linear = &layer.linears[number];
    let merged = layer.fused().into_iter().find(|merged| merged.contains(&linear));
    merged.map_or(linear, |merged| merged[0]).name.clone()
}

/// One pass over a linear's bytes and its source's.
struct Scan<'a> {
    subject: &'a Subject,
    names: &'a LinearNames,
    elements: usize,
    /// What is found in each column, where folds are to be proven.
    columns: Option<Mutex<Vec<Line>>>,
    source: Option<&'a SourceTensor>,
    /// Applies the folds to source elements from the given one on.
    fold: &'a (dyn Fn(usize, &mut [f32]) + Sync),
    global: GlobalScale,
    /// The global scale of max calibration, where its bytes are to be compared.
    expected: Option<GlobalScale>,
}

/// What a pass has found so far.
#[derive(Default)]
struct Scanned {
    content: Content,
    distance: Distance,
    /// Bytes that max calibration would have chosen otherwise.
    differing: usize,
}

/// Buffers of one thread.
#[derive(Default)]
struct Buffers {
    codes: Vec<u8>,
    scales: Vec<u8>,
    stored: Vec<u8>,
    w: Vec<f32>,
    dequantized: Vec<f32>,
    columns: Vec<Line>,
    max_codes: Vec<u8>,
    max_scales: Vec<u8>,
}

impl Scan<'_> {
    /// Parts in parallel, added up in order.
    fn run(&self) -> Option<Scanned> {
        let parts: Vec<Option<Scanned>> = (0..self.elements.div_ceil(CHUNK))
            .into_par_iter()
            .map_init(Buffers::default, |buffers, part| {
                self.part(part * CHUNK..self.elements.min((part + 1) * CHUNK), buffers)
            })
            .collect();
        parts.into_iter().try_fold(Scanned::default(), |mut sum, part| {
            let part = part?;
            sum.content = sum.content.and(part.content);
            sum.distance.add(part.distance);
            sum.differing += part.differing;
            Some(sum)
        })
    }

    /// The distance of the same weights under max scales. The global scale is the stored one, which may be a larger
    /// member's, but no smaller than these weights need: a scale that is too small would excuse itself.
    fn under_max(&self) -> Option<Distance> {
        let largest = self.folded(|w, _| Some(nvfp4::amax(w)))?.into_iter().fold(0.0, f32::max);
        let needed = GlobalScale::from_amax(largest);
        let global = if needed.multiplier() > self.global.multiplier() { needed } else { self.global };
        let parts = self.folded(|w, Buffers { max_codes, max_scales, .. }| {
            max_codes.resize(w.len() / 2, 0);
            max_scales.resize(w.len() / BLOCK, 0);
            nvfp4::quantize(w, global, max_codes, max_scales);
            Some(Distance::between(w, max_codes, max_scales, global))
        })?;
        parts.into_iter().reduce(|mut sum, part| {
            sum.add(part);
            sum
        })
    }

    /// What `look` makes of each part of the folded source, in order.
    fn folded<T: Send>(&self, look: impl Fn(&[f32], &mut Buffers) -> Option<T> + Sync) -> Option<Vec<T>> {
        let part = |buffers: &mut Buffers, part: usize| {
            let range = part * CHUNK..self.elements.min((part + 1) * CHUNK);
            let mut w = std::mem::take(&mut buffers.w);
            widen(self.source?, range.clone(), &mut buffers.stored, &mut w)?;
            (self.fold)(range.start, &mut w);
            let found = look(&w, buffers);
            buffers.w = w;
            found
        };
        (0..self.elements.div_ceil(CHUNK)).into_par_iter().map_init(Buffers::default, part).collect()
    }

    /// The channels that are further from the source than rounding explains.
    fn unbalanced(&self, rows: usize) -> Vec<(usize, f64)> {
        let Some(columns) = &self.columns else { return vec![] };
        let columns = columns.lock().expect("no thread panicked");
        columns.iter().enumerate().filter_map(|(i, line)| Some((i, line.is_off_by(rows)?))).collect()
    }

    fn part(&self, range: Range<usize>, buffers: &mut Buffers) -> Option<Scanned> {
        let Buffers { codes, scales, stored, w, dequantized, columns, max_codes, max_scales } = buffers;
        codes.resize(range.len() / 2, 0);
        scales.resize(range.len() / BLOCK, 0);
        self.subject.read(&self.names.codes, range.start / 2, codes)?;
        self.subject.read(&self.names.scales, range.start / BLOCK, scales)?;
        let mut found = Scanned { content: Content::of(codes, scales), ..Scanned::default() };
        let Some(source) = self.source else { return Some(found) };
        widen(source, range.clone(), stored, w)?;
        (self.fold)(range.start, w);
        found.distance = Distance::between(w, codes, scales, self.global);
        if let Some(all) = &self.columns {
            dequantized.resize(w.len(), 0.0);
            dequantize(codes, scales, self.global, dequantized);
            columns.clear();
            columns.resize(all.lock().expect("no thread panicked").len(), Line::default());
            let first = range.start % columns.len();
            for (i, (w, here)) in w.iter().zip(&*dequantized).enumerate() {
                let column = (first + i) % columns.len();
                columns[column].add(*w, *here);
            }
            let mut all = all.lock().expect("no thread panicked");
            all.iter_mut().zip(&*columns).for_each(|(sum, part)| sum.join(part));
        }
        if let Some(expected) = self.expected {
            max_codes.resize(codes.len(), 0);
            max_scales.resize(scales.len(), 0);
            nvfp4::quantize(w, expected, max_codes, max_scales);
            found.differing = different(codes, max_codes) + different(scales, max_scales);
        }
        Some(found)
    }
}

fn different(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

/// A range of the source's elements as f32, which is exact; none where it can't be read. `stored` is scratch.
pub fn widen(
    source: &SourceTensor,
    range: Range<usize>,
    stored: &mut Vec<u8>,
    out: &mut Vec<f32>,
) -> Option<()> {
    let bytes = if source.dtype == Dtype::F32 { 4 } else { 2 };
    stored.resize(range.len() * bytes, 0);
    source.read(range.start * bytes, stored).ok()?;
    let halves = || stored.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    out.clear();
    match source.dtype {
        Dtype::BF16 => out.extend(halves().map(|bits| f32::from_bits((bits as u32) << 16))),
        Dtype::F16 => out.extend(halves().map(|bits| f16::from_bits(bits).to_f32())),
        _ => out.extend(stored.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
    }
    Some(())
}

fn source_amax(source: &SourceTensor) -> f32 {
    let elements: usize = source.shape.iter().product();
    let chunks = (0..elements.div_ceil(CHUNK)).into_par_iter().map_init(Buffers::default, |buffers, i| {
        let range = i * CHUNK..elements.min((i + 1) * CHUNK);
        let read = widen(source, range, &mut buffers.stored, &mut buffers.w);
        read.map_or(f32::NAN, |()| nvfp4::amax(&buffers.w))
    });
    chunks.reduce(|| 0.0, |a, b| if a.is_nan() || a > b { a } else { b })
}
