//! One pass over a quantized linear's bytes: what the rules about values need.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use super::folds::LayerFolds;
use super::scheme::LinearScheme;
use super::subject::Subject;
use crate::checkpoint::{Layout, SourceTensor};
use crate::model::{Group, LinearSpec};
use crate::nvfp4::content::Content;
use crate::nvfp4::{self, BLOCK, Distance, GlobalScale};

/// What was found in one linear.
pub struct LinearScan {
    /// Module name.
    pub module: String,
    /// Its group: the name of the first member.
    pub group: String,
    /// Codes and block scales, counted.
    pub content: Content,
    /// The weight's global scale as stored.
    pub weight_global: f32,
    /// The input's global scale as stored.
    pub input_global: Option<f32>,
    /// The distance to the source.
    pub distance: Option<Distance>,
    /// Bytes of codes, of block scales and of the global scale that max calibration would have chosen
    /// otherwise.
    pub differing: Option<usize>,
}

/// Elements that are compared at a time.
const CHUNK: usize = 1 << 16;

/// Scans the NVFP4 members of a fused group. Distances are to the source with the folds applied.
pub fn scan_group(subject: &Subject, group: &Group, folds: &LayerFolds) -> Vec<LinearScan> {
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
    let amax = sources.iter().flatten().map(source_amax).fold(0.0, f32::max);
    let expected = GlobalScale::from_amax(amax);
    let first = group.members[0].name.clone();
    let scan = |(linear, source): (&&LinearSpec, &Option<SourceTensor>)| {
        let names = subject.names(&linear.name);
        let (codes, scales) = (subject.map(&names.codes)?, subject.map(&names.scales)?);
        let weight_global = subject.scalar(&names.weight_global)?;
        let global = multiplier(subject.layout, weight_global);
        let parts = codes.par_chunks(CHUNK / 2).zip(scales.par_chunks(CHUNK / BLOCK));
        let content =
            parts.map(|(codes, scales)| Content::of(codes, scales)).reduce(Content::default, Content::and);
        let compared = source.as_ref().filter(|s| s.shape == [linear.rows, linear.cols]).map(|source| {
            let (distance, differing) = {
                let member = group.members.iter().position(|member| member.name == linear.name).unwrap_or(0);
                let fold =
                    |first: usize, w: &mut [f32]| folds.apply(group.site, member, linear.cols, first, w);
                compare(source, &fold, &codes, &scales, global, expected)
            };
            let stored = subject.layout.unwrap_or(Layout::Modelopt).scalar(expected);
            let differs = stored != weight_global.to_le_bytes();
            (distance, differing + if differs { 4 } else { 0 })
        });
        Some(LinearScan {
            module: linear.name.clone(),
            group: first.clone(),
            content,
            weight_global,
            input_global: subject.scalar(&names.input_global),
            distance: compared.map(|(distance, _)| distance),
            differing: compared.map(|(_, differing)| differing),
        })
    };
    members.iter().zip(&sources).filter_map(scan).collect()
}

/// A stored global scale as a multiplier.
fn multiplier(layout: Option<Layout>, stored: f32) -> GlobalScale {
    GlobalScale::from_multiplier(if layout == Some(Layout::Modelopt) { stored } else { 1.0 / stored })
}

/// The distance to the source, and how many bytes max calibration would have chosen otherwise. Parts are
/// compared in parallel and added up in order.
fn compare(
    source: &SourceTensor,
    fold: &(dyn Fn(usize, &mut [f32]) + Sync),
    codes: &[u8],
    scales: &[u8],
    global: GlobalScale,
    expected: GlobalScale,
) -> (Distance, usize) {
    let parts = codes.par_chunks(CHUNK / 2).zip(scales.par_chunks(CHUNK / BLOCK)).enumerate();
    let compared: Vec<(Distance, usize)> = parts
        .map_init(
            || (Vec::with_capacity(CHUNK), vec![0; CHUNK / 2], vec![0; CHUNK / BLOCK]),
            |(w, my_codes, my_scales), (i, (codes, scales))| {
                widen(source, i * CHUNK..i * CHUNK + codes.len() * 2, w);
                fold(i * CHUNK, w);
                let (my_codes, my_scales) = (&mut my_codes[..codes.len()], &mut my_scales[..scales.len()]);
                nvfp4::quantize(w, expected, my_codes, my_scales);
                let differing = different(codes, my_codes) + different(scales, my_scales);
                (Distance::between(w, codes, scales, global), differing)
            },
        )
        .collect();
    compared.into_iter().fold((Distance::default(), 0), |(mut sum, count), (distance, differing)| {
        sum.add(distance);
        (sum, count + differing)
    })
}

fn different(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

/// A range of the source's elements as f32, which is exact.
fn widen(source: &SourceTensor, range: std::ops::Range<usize>, out: &mut Vec<f32>) {
    let bytes = source.bytes();
    let halves =
        || bytes[range.start * 2..range.end * 2].chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    out.clear();
    match source.dtype {
        Dtype::BF16 => out.extend(halves().map(|bits| bf16::from_bits(bits).to_f32())),
        Dtype::F16 => out.extend(halves().map(|bits| f16::from_bits(bits).to_f32())),
        _ => {
            let words = bytes[range.start * 4..range.end * 4].chunks_exact(4);
            out.extend(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
    }
}

fn source_amax(source: &SourceTensor) -> f32 {
    let elements: usize = source.shape.iter().product();
    let chunks = (0..elements.div_ceil(CHUNK)).into_par_iter().map_init(
        || Vec::with_capacity(CHUNK),
        |w, i| {
            widen(source, i * CHUNK..elements.min((i + 1) * CHUNK), w);
            nvfp4::amax(w)
        },
    );
    chunks.reduce(|| 0.0, f32::max)
}
