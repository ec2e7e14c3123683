//! Rules about values: block scales, global scales, codes.

use crate::checkpoint::Layout;
use crate::verify::scan::LinearScan;
use crate::verify::subject::Subject;
use crate::verify::{Concerns, Findings, Rule};

const ANY: Concerns = Concerns::Values(None);
const CT: Concerns = Concerns::Values(Some(Layout::CompressedTensors));
const MODELOPT: Concerns = Concerns::Values(Some(Layout::Modelopt));

pub(in crate::verify) const RULES: &[Rule] = &[
    Rule {
        id: "A6",
        title: "global scales are usable divisors",
        concerns: CT,
        about: has_linears,
        check: divisors,
    },
    Rule {
        id: "A7",
        title: "block scales are valid",
        concerns: ANY,
        about: has_linears,
        check: block_scales,
    },
    Rule {
        id: "A8",
        title: "the largest block scale uses the format's range",
        concerns: ANY,
        about: has_linears,
        check: range,
    },
    Rule {
        id: "A9",
        title: "fused linears share their global scales",
        concerns: CT,
        about: has_fused,
        check: shared,
    },
    Rule {
        id: "A17",
        title: "codes and scales are not degenerate",
        concerns: ANY,
        about: has_linears,
        check: content,
    },
    Rule { id: "A18", title: "input scales were measured", concerns: CT, about: has_inputs, check: measured },
    Rule {
        id: "B4",
        title: "global scales are usable multipliers",
        concerns: MODELOPT,
        about: has_linears,
        check: multipliers,
    },
    Rule {
        id: "B5",
        title: "fused linears share their global scales",
        concerns: MODELOPT,
        about: has_fused,
        check: shared,
    },
];

/// Whether there are NVFP4 linears.
pub(in crate::verify) fn has_linears(subject: &Subject) -> bool {
    !subject.linears.is_empty() || !subject.unread.is_empty()
}

fn has_inputs(subject: &Subject) -> bool {
    subject.linears.iter().any(|scan| scan.input_global.is_some())
}

/// Whether two linears that engines merge are quantized.
fn has_fused(subject: &Subject) -> bool {
    subject.linears.windows(2).any(|pair| pair[0].fused == pair[1].fused)
}

/// The global scales of the weights and of the input, as stored.
fn scales(scan: &LinearScan) -> (u32, Option<u32>) {
    (scan.weight_global.to_bits(), scan.input_global.map(f32::to_bits))
}

/// Weights this large in half of the blocks are no model's: their global scale was taken for its reciprocal.
const BEYOND_WEIGHTS: f32 = 1e6;

/// What the largest weight of a typical block is at most, as the block scales and the global scale say.
fn typical_weight(subject: &Subject, scan: &LinearScan) -> f32 {
    let mut blocks = 0;
    let half = scan.content.exponents.iter().sum::<u64>() / 2;
    let median = scan.content.exponents.iter().position(|count| {
        blocks += count;
        blocks > half
    });
    let layout = subject.layout.unwrap_or(Layout::CompressedTensors);
    // E4M3's exponents are biased by 7, and E2M1's largest value is 6.
    6.0 * 2f32.powi(median.unwrap_or(0) as i32 - 6) * layout.global(scan.weight_global).multiplier()
}

/// A zero or infinite divisor makes every output of the layer NaN; a multiplier in its place loads without
/// an error and is garbage.
fn divisors(subject: &Subject, findings: &mut Findings) {
    for scan in &subject.linears {
        let weight = scan.weight_global;
        let typical = typical_weight(subject, scan);
        if !usable(weight) {
            findings.error(format!("{}: weight_global_scale {weight:e} is no divisor", scan.module));
        } else if typical > BEYOND_WEIGHTS {
            findings.error(format!(
                "{}: weight_global_scale {weight:e} is no divisor: weights would reach {typical:.1e} in most blocks; is it a multiplier?",
                scan.module
            ));
        } else if !(1e1..=1e8).contains(&weight) {
            findings.warn(format!("{}: weight_global_scale {weight:e} is unusual", scan.module));
        }
        match scan.input_global {
            Some(input) if !usable(input) => {
                findings.error(format!("{}: input_global_scale {input:e} is no divisor", scan.module))
            }
            Some(input) if !(1e-1..=1e6).contains(&input) => {
                findings.warn(format!("{}: input_global_scale {input:e} is unusual", scan.module))
            }
            _ => {}
        }
    }
}

/// As [`divisors`], for scales that are multiplied; 1.0 everywhere is the mark of a calibration that never
/// ran.
fn multipliers(subject: &Subject, findings: &mut Findings) {
    for scan in &subject.linears {
        let weight = scan.weight_global;
        let typical = typical_weight(subject, scan);
        if !usable(weight) {
            findings.error(format!("{}: weight_scale_2 {weight:e} is no multiplier", scan.module));
        } else if typical > BEYOND_WEIGHTS {
            findings.error(format!(
                "{}: weight_scale_2 {weight:e} is no multiplier: weights would reach {typical:.1e} in most blocks; is it a divisor?",
                scan.module
            ));
        }
        match scan.input_global {
            Some(input) if !usable(input) => {
                findings.error(format!("{}: input_scale {input:e} is no multiplier", scan.module))
            }
            Some(input) if input > 1e3 => {
                findings.warn(format!("{}: input_scale {input:e} is unusual", scan.module))
            }
            _ => {}
        }
    }
    let inputs: Vec<f32> = subject.linears.iter().filter_map(|scan| scan.input_global).collect();
    if !inputs.is_empty() && inputs.iter().all(|&input| input == 1.0) {
        findings.error("every input_scale is 1.0: activations were never calibrated");
    }
}

fn usable(scale: f32) -> bool {
    scale.is_normal() && scale > 0.0
}

/// Marlin drops a scale's sign, NaN spreads, and a zero scale over codes loses a block.
fn block_scales(subject: &Subject, findings: &mut Findings) {
    subject.unread.iter().for_each(|module| findings.error(format!("{module}: its tensors can't be read")));
    for scan in &subject.linears {
        let content = &scan.content;
        if content.invalid_scales > 0 {
            findings.error(format!(
                "{}: {} block scales are negative or NaN",
                scan.module, content.invalid_scales
            ));
        }
        if content.lost_blocks > 0 {
            let text =
                format!("{}: {} blocks have codes under a zero scale", scan.module, content.lost_blocks);
            if subject.ours { findings.error(text) } else { findings.warn(text) }
        }
    }
}

/// Max calibration gives the largest block the scale 448; far less means that the global scale belongs to
/// other weights, or that the largest weights read inputs which hardly matter and were clipped.
fn range(subject: &Subject, findings: &mut Findings) {
    // Linears that read one input share a scale where distq chose it; other programs may share it among those alone that
    // engines merge.
    for group in
        subject.linears.chunk_by(|a, b| a.fused == b.fused || a.group == b.group && scales(a) == scales(b))
    {
        let largest = group.iter().map(|scan| scan.content.largest_scale).max().unwrap_or(0);
        let all_zero = group.iter().all(|scan| scan.content.zero_codes == scan.content.elements);
        if largest >= 0x7F || all_zero {
            continue; // A7 and A17 judge these
        }
        let text = format!("{}: the largest block scale of its group is {largest:#04x}", group[0].module);
        if largest < 0x60 && !subject.weighs_channels() {
            findings.error(text);
        } else if largest < 0x76 {
            findings.warn(text);
        }
    }
}

/// Engines merge fused linears into one matrix with one global scale, and take the larger of two without
/// touching the block scales.
fn shared(subject: &Subject, findings: &mut Findings) {
    for group in subject.linears.chunk_by(|a, b| a.fused == b.fused) {
        if let Some(odd) = group.iter().find(|scan| scales(scan) != scales(&group[0])) {
            findings.error(format!("{} and {} have different global scales", group[0].module, odd.module));
        }
    }
}

/// Shares that real weights do not reach.
fn content(subject: &Subject, findings: &mut Findings) {
    for scan in &subject.linears {
        let content = &scan.content;
        let share = |count: u64| count as f64 / content.elements.max(1) as f64;
        let blocks = content.elements / 16;
        let checks = [
            (share(content.zero_codes), 0.5, "of codes are zero"),
            (share(content.saturated_codes), 0.25, "of codes are at the format's end"),
            (content.subnormal_scales as f64 / blocks.max(1) as f64, 0.01, "of block scales are subnormal"),
        ];
        for (share, limit, what) in checks {
            if share > limit {
                findings.warn(format!("{}: {:.0}% {what}", scan.module, share * 100.0));
            }
        }
    }
}

/// One value for all inputs, or exactly 1.0, is a stand-in for a measurement.
fn measured(subject: &Subject, findings: &mut Findings) {
    let inputs: Vec<(&str, f32)> =
        subject.linears.iter().filter_map(|scan| Some((scan.module.as_str(), scan.input_global?))).collect();
    if inputs.len() > 1 && inputs.iter().all(|(_, input)| *input == inputs[0].1) {
        findings.warn(format!("every input_global_scale is {}", inputs[0].1));
    }
    for (module, _) in inputs.iter().filter(|(_, input)| *input == 1.0) {
        findings.warn(format!("{module}: input_global_scale is exactly 1"));
    }
}
