//! Rules against the source.

use rayon::prelude::*;

use super::subject::Subject;
use super::{Concerns, Findings, Rule, any, same_config};
use crate::checkpoint::{LinearScheme, SourceTensor, widen};
use crate::model::Site;

const SOURCE: Concerns = Concerns::Source;

pub(super) const RULES: &[Rule] = &[
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
        about: has_distances,
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
            (_, None) => findings.error(format!("{name} is missing")),
            (Some(there), Some(_)) if copied(subject, &there) || explained(subject, &there) => {}
            _ => findings.error(format!("{name} differs from the source")),
        }
    }
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
    let holds_fold = |layer: usize| {
        let groups = model.groups(layer);
        let biases =
            [groups[Site::Qkv as usize].members[2].bias(), groups[Site::GateUp as usize].members[1].bias()];
        let norms = model.layer_norms(layer).map(|norm| norm.name);
        norms.contains(&there.name) || biases.iter().flatten().any(|name| *name == there.name)
    };
    if !subject.folds() || !(0..model.layers).any(holds_fold) {
        return false;
    }
    let Some(here) = subject.map(&there.name) else { return false };
    let here = SourceTensor::from_bytes(&there.name, there.dtype, &there.shape, &here);
    let here = here.and_then(|here| widen(&here));
    let (Ok(here), Ok(there)) = (here, widen(there)) else { return false };
    let positive =
        |(h, t): (&f32, &f32)| if *t == 0.0 { *h == 0.0 } else { (h / t).is_normal() && h / t > 0.0 };
    here.len() == there.len() && here.iter().zip(&there).all(positive)
}

fn has_distances(subject: &Subject) -> bool {
    subject.linears.iter().any(|scan| scan.distance.is_some())
}

/// NVFP4 loses about 9.5 % of a Gaussian weight's norm. Far more means swapped nibbles, a wrong scale or
/// another tensor; only a comparison with the source sees that.
fn close(subject: &Subject, findings: &mut Findings) {
    for error in subject.errors() {
        let (relative, cosine) = (error.relative_error, error.cosine);
        // Written so that NaN is an error.
        if !(relative <= 0.2 && cosine >= 0.98) {
            findings.error(format!("{}: relative error {relative:.3}, cosine {cosine:.3}", error.module));
        } else if relative > 0.15 {
            findings.warn(format!("{}: relative error {relative:.3}", error.module));
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
