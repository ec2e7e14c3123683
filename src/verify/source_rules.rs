//! Rules against the source.

use serde_json::Value;

use super::folds::LayerFolds;
use super::scheme::LinearScheme;
use super::subject::Subject;
use super::{Concerns, Findings, Rule};
use crate::checkpoint::{SourceTensor, widen};
use crate::model::Site;

const SOURCE: Concerns = Concerns::Source;

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "S1",
        title: "every source tensor is quantized or copied byte for byte",
        concerns: SOURCE,
        check: accounted,
    },
    Rule { id: "S2", title: "dequantized weights are close to the source", concerns: SOURCE, check: close },
    Rule { id: "S3", title: "config.json differs by its quantization only", concerns: SOURCE, check: config },
    Rule { id: "S4", title: "max calibration gives these bytes again", concerns: SOURCE, check: same_bytes },
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
        let (there, here) = (source.tensor(name).ok(), subject.map(name));
        match (there, here) {
            (Some(there), Some(here)) if there.bytes() == &here[..] => {}
            (_, None) => findings.error(format!("{name} is missing")),
            (Some(there), Some(here)) if explained(subject, &there, &here) => {}
            _ => findings.error(format!("{name} differs from the source")),
        }
    }
}

/// Whether a changed tensor is a norm or a bias with a fold in it. That the weights which read it make up for a
/// norm's fold is seen in their distance to the source, where its factors are undone.
fn explained(subject: &Subject, there: &SourceTensor, here: &[u8]) -> bool {
    let Ok(model) = &subject.model else { return false };
    let Ok(here) = SourceTensor::from_bytes(&there.name, there.dtype, &there.shape, here) else {
        return false;
    };
    let (Ok(there_values), Ok(here)) = (widen(there), widen(&here)) else { return false };
    if !subject.folds() || there_values.len() != here.len() {
        return false;
    }
    (0..model.layers).any(|layer| {
        if model.layer_norms(layer).iter().any(|norm| norm.name == there.name) {
            let pairs = here.iter().zip(&there_values);
            return pairs
                .clone()
                .all(|(h, t)| if *t == 0.0 { *h == 0.0 } else { (h / t).is_normal() && h / t > 0.0 });
        }
        let groups = model.groups(layer);
        let is_bias = |site: Site, member: usize| {
            groups[site as usize].members[member].bias().is_some_and(|name| name == there.name)
        };
        let folds = || LayerFolds::of(subject, model, layer);
        let factors = match (is_bias(Site::Qkv, 2), is_bias(Site::GateUp, 1)) {
            (true, _) => folds().v,
            (_, true) => folds().up,
            _ => return false,
        };
        let Some(factors) = factors else { return false };
        // The factors are estimates, within a few percent.
        here.iter()
            .zip(&there_values)
            .zip(&factors)
            .all(|((h, t), f)| (h - t * f).abs() <= 0.1 * (t * f).abs())
    })
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

/// A field of another model left in config.json is another model.
fn config(subject: &Subject, findings: &mut Findings) {
    let (Some(source), Ok(config)) = (&subject.source, &subject.config) else { return };
    let null = Value::Null;
    let keys = source.config.keys().chain(config.keys());
    let keys: std::collections::BTreeSet<&String> =
        keys.filter(|key| *key != "quantization_config").collect();
    for key in keys {
        let (here, there) = (config.get(key).unwrap_or(&null), source.config.get(key).unwrap_or(&null));
        if here != there {
            findings.error(format!("{key} is {here}, the source says {there}"));
        }
    }
}

/// Where the files say that they hold max calibration, the source determines every byte.
fn same_bytes(subject: &Subject, findings: &mut Findings) {
    if subject.method.as_deref() != Some("max") {
        return;
    }
    for scan in subject.linears.iter().filter(|scan| scan.differing.is_some_and(|bytes| bytes > 0)) {
        let bytes = scan.differing.unwrap_or(0);
        findings.error(format!("{}: {bytes} bytes of codes and scales differ", scan.module));
    }
}
