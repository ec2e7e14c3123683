//! Rules against the source.

use rayon::prelude::*;

use super::folds::{has_factor, holds_factor, norm_factors};
use super::same_config;
use super::scales::has_linears;
use crate::backend::Gamma;
use crate::checkpoint::{Checkpoint, LinearScheme, SourceTensor, widen};
use crate::model::{Layer, Model, Producer, Site, TensorSpec, is_dispensable};
use crate::verify::scan::{LinearScan, WORTH_A_LOOK};
use crate::verify::subject::Subject;
use crate::verify::{Concerns, Findings, Rule, any};

const SOURCE: Concerns = Concerns::Source;

pub(in crate::verify) const RULES: &[Rule] = &[
    Rule {
        id: "S1",
        title: "every source tensor is quantized or copied byte for byte",
        concerns: SOURCE,
        about: any,
        check: accounted,
    },
    Rule {
        id: "S2",
        title: "dequantized weights are close to the source",
        concerns: SOURCE,
        about: has_linears,
        check: close,
    },
    Rule {
        id: "S3",
        title: "config.json differs by its quantization only",
        concerns: SOURCE,
        about: any,
        check: same_config::check,
    },
    Rule {
        id: "S4",
        title: "max calibration gives these bytes again",
        concerns: SOURCE,
        about: says_max,
        check: same_bytes,
    },
];

/// A tensor that was lost or changed on its way is a different model.
fn accounted(subject: &Subject, findings: &mut Findings) {
    let Some(source) = &subject.source else { return };
    let quantized: std::collections::BTreeSet<String> = subject
        .linears()
        .into_iter()
        .filter(|linear| subject.schemes.of_module(&linear.name) != LinearScheme::Plain)
        .map(|linear| linear.weight())
        .collect();
    for name in source.tensors.keys() {
        if quantized.contains(name) || name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        match (source.tensor(name).ok(), subject.tensors.get(name)) {
            (_, None) if is_second_copy(source, name) => {}
            (_, None) => findings.error(format!("{name} is missing")),
            (Some(there), Some(_)) if copied(subject, &there) || explained(subject, &there) => {}
            _ => findings.error(format!("{name} differs from the source")),
        }
    }
}

/// Whether a tied model stores its embedding once more, as lm_head.
fn is_second_copy(source: &Checkpoint, name: &str) -> bool {
    let same = |model: Model| is_dispensable(&model, name) && model.oddities(source).is_ok();
    Model::of(source).is_ok_and(same)
}

/// Whether a tensor is the source's, byte for byte.
fn copied(subject: &Subject, there: &SourceTensor) -> bool {
    const PART: usize = 1 << 20;
    let bytes = there.bytes().len();
    let same = |at: usize| {
        let (mut mine, mut theirs) = (vec![0; PART.min(bytes - at)], vec![0; PART.min(bytes - at)]);
        let read = subject.read(&there.name, at, &mut mine).is_some() && there.read(at, &mut theirs).is_ok();
        read && mine == theirs
    };
    let length = subject.tensors.get(&there.name).map(|found| found.bytes);
    length == Some(bytes as u64) && (0..bytes.div_ceil(PART)).into_par_iter().all(|part| same(part * PART))
}

/// Whether a changed tensor is a norm or a bias that can hold a fold. That the weights beside it make up for its
/// factors is seen in their distance to the source, where the factors are undone.
fn explained(subject: &Subject, there: &SourceTensor) -> bool {
    let Ok(model) = &subject.model else { return false };
    let layer = model.layer_of(&there.name).and_then(|layer| model.layers.get(layer));
    let Some(layer) = layer.filter(|_| subject.folds()) else { return false };
    let may_change =
        |site: &Site| layer.changed_by_fold(site).contains(&there.name) && is_folded(subject, layer, site);
    if !layer.sites.iter().any(may_change) {
        return false;
    }
    let Some(here) = subject.map(&there.name) else { return false };
    let here = SourceTensor::from_bytes(&there.name, there.dtype, &there.shape, &here);
    let here = here.and_then(|here| widen(&here));
    let (Ok(here), Ok(values)) = (here, widen(there)) else { return false };
    let mut pairs = here.iter().zip(&values);
    let is_it = |spec: &Option<TensorSpec>| spec.as_ref().is_some_and(|spec| spec.name == there.name);
    let same_length = here.len() == values.len();
    if let Some(norm) = layer.norms.iter().find(|norm| is_it(&norm.bias)) {
        let factors = norm_factors(subject, norm).unwrap_or_else(|| vec![1.0; here.len()]);
        let holds = |((h, t), f): ((&f32, &f32), &f32)| has_factor(there.dtype, *h, *t, *f);
        return same_length && pairs.zip(&factors).all(holds);
    }
    let norm = layer.norms.iter().find(|norm| is_it(&norm.weight));
    let gamma = norm.map_or(Gamma::Weight, |norm| norm.kind.gamma);
    same_length && pairs.all(|(h, t)| holds_factor(there.dtype, gamma, *h, *t))
}

/// Whether a factor of a site's input can have been folded: all that reads it is quantized, and so are the rows that
/// produce it.
fn is_folded(subject: &Subject, layer: &Layer, site: &Site) -> bool {
    let producer = match &site.producer {
        Producer::Rows(rows) => Some(rows.linear),
        Producer::Norm(_) | Producer::Fixed => None,
    };
    let mut rewritten = site.members.iter().copied().chain(producer);
    rewritten.all(|number| subject.schemes.of_module(&layer.linears[number].name) != LinearScheme::Plain)
}

/// The relative error up to which any weights are close to the source. NVFP4 loses about 9.5 % of a Gaussian weight's
/// norm; swapped nibbles, a wrong scale or another tensor all of it.
const CLOSE: f64 = 0.25;

/// How many times the error of max scales on the same weights is close too, where NVFP4 can hardly hold them: searched
/// scales and GPTQ trade an error in one weight for another's, and distq keeps them within one and a half times.
const CLOSE_TO_MAX: f64 = 2.0;

/// Only a comparison with the source sees weights that are not the source's.
fn close(subject: &Subject, findings: &mut Findings) {
    for scan in &subject.linears {
        let Some(relative) = scan.distance.map(|distance| distance.relative()) else {
            findings
                .error(format!("{}: the source has no BF16, F16 or F32 weight of its shape", scan.module));
            continue;
        };
        let max = scan.max_distance.map_or(0.0, |distance| distance.relative());
        if relative.is_nan() || relative > CLOSE.max(CLOSE_TO_MAX * max) {
            let text = format!("{}: relative error {relative:.3}, {max:.3} under max scales", scan.module);
            findings.error(text);
        } else if relative > WORTH_A_LOOK.max(CLOSE_TO_MAX * max) {
            findings.warn(format!("{}: relative error {relative:.3}", scan.module));
        }
    }
    subject.linears.chunk_by(|a, b| a.group == b.group).for_each(|readers| balanced(readers, findings));
}

/// A norm that was changed in one channel has a factor that its readers do not make up for. Where data is degenerate,
/// chosen codes may move a column of one reader by a factor as well, and those of two by a small one: a block scale that
/// clips a column makes it smaller in all of them.
fn balanced(readers: &[LinearScan], findings: &mut Findings) {
    /// How near the factors of one channel are that two linears show.
    const ALIKE: f64 = 0.2;
    /// The logarithm beyond which a factor that two linears show is no choice of codes any more: a third.
    const BEYOND_CODES: f64 = 0.3;
    for (i, reader) in readers.iter().enumerate() {
        for &(channel, factor) in &reader.unbalanced {
            let alike = |other: &LinearScan| {
                let mut off = other.unbalanced.iter().filter(|(of, _)| *of == channel);
                off.any(|(_, there)| (there / factor).ln().abs() < ALIKE * factor.ln().abs())
            };
            let text = format!(
                "{}: the weights that read input channel {channel} are {factor:.3} times what the norm or the rows that \
                 produce it make up for",
                reader.module
            );
            let mut others = readers.iter().enumerate().filter(|(other, _)| *other != i);
            let shared = others.any(|(_, other)| alike(other));
            if shared && factor.ln().abs() > BEYOND_CODES {
                findings.error(text);
            } else if shared || readers.len() == 1 {
                findings.warn(text);
            }
        }
    }
}

/// Whether the files say that they hold max calibration.
fn says_max(subject: &Subject) -> bool {
    subject.method.as_deref() == Some("max") && subject.linears.iter().any(|scan| scan.differing.is_some())
}

/// Where the files say that they hold max calibration, the source determines every byte.
fn same_bytes(subject: &Subject, findings: &mut Findings) {
    for scan in subject.linears.iter().filter(|scan| scan.differing.is_some_and(|bytes| bytes > 0)) {
        let bytes = scan.differing.unwrap_or(0);
        findings.error(format!("{}: {bytes} bytes of codes and scales differ", scan.module));
    }
}
