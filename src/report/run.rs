//! The report of a run: what was planned, what happened, what came out.
//!
//! `--report FILE.json` writes a [`RunReport`]; its field names are stable.

use std::collections::BTreeMap;
use std::fmt;

use crate::backend::Device;
use crate::calibration;
use crate::checkpoint::some;
use crate::cluster::{Cluster, Machine, own_memory};
use crate::job::Options;
use crate::methods::Codes;
use crate::planner::Plan;
use crate::progress::{Bar, Phases};
use crate::record::{PartId, PartRecord};
use crate::units::{binary, duration};
use crate::verify;

/// The whole report.
#[derive(Clone, Debug, serde::Serialize)]
pub struct RunReport {
    /// Version of distq.
    pub version: String,
    /// The MPI library, where there was one.
    pub mpi: Option<String>,
    /// The source directory.
    pub model: String,
    /// The output directory.
    pub out: String,
    /// Layout of the output.
    pub layout: String,
    /// What was quantized.
    pub scheme: String,
    /// How codes and scales were chosen.
    pub method: String,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the output's safetensors files.
    pub output_bytes: u64,
    /// Files carried over beside the weights.
    pub side_files: Vec<String>,
    /// What else is beside the weights, and was not carried over.
    pub left_behind: Vec<String>,
    /// Wall time by phase.
    pub seconds: Seconds,
    /// What was planned.
    pub plan: Plan,
    /// What each rank did.
    pub ranks: Vec<RankReport>,
    /// Calibration data; absent where the scheme needs none.
    pub calibration: Option<calibration::Summary>,
    /// Maxima by part, in model order.
    pub parts: Vec<PartRecord>,
    /// Maxima by rank: usable, zero, NaN or infinite.
    pub health: BTreeMap<usize, Health>,
    /// The proof.
    pub verification: verify::Report,
}

/// Wall time in seconds.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Seconds {
    /// Headers, calibration data, plan, output files.
    pub prepare: f64,
    /// Forward pass, quantizing, writing.
    pub walk: f64,
    /// What the plan expected of the walk, were there nothing to resume.
    pub walk_expected: f64,
    /// Verification.
    pub prove: f64,
    /// From start to published output.
    pub total: f64,
}

/// What one rank did.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RankReport {
    /// The rank.
    pub rank: usize,
    /// Its machine.
    pub machine: Machine,
    /// Its matrix kernel.
    pub kernel: String,
    /// Where its time went.
    pub phases: Phases,
    /// Bytes of the distinct source tensors that it mapped.
    pub bytes_read: u64,
    /// Its peak resident memory in bytes, mapped files included.
    pub peak_resident: u64,
    /// The most bytes of its card that were in use at a time; absent on a CPU.
    pub peak_device: Option<u64>,
    /// When it computed what.
    pub timeline: Vec<Bar>,
}

/// How many maxima can be turned into scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Health {
    /// Usable maxima of weights.
    pub weights_good: usize,
    /// Usable maxima of inputs.
    pub inputs_good: usize,
    /// Maxima that are zero.
    pub zero: usize,
    /// Maxima that are NaN or infinite.
    pub nan: usize,
}

impl Health {
    fn count(&mut self, amax: f32, good: fn(&mut Health) -> &mut usize) {
        *if !amax.is_finite() {
            &mut self.nan
        } else if amax == 0.0 {
            &mut self.zero
        } else {
            good(self)
        } += 1;
    }
}

impl RankReport {
    /// The report of this rank.
    pub fn new(
        cluster: &Cluster,
        machine: &Machine,
        device: &Device,
        phases: Phases,
        bytes_read: u64,
        timeline: Vec<Bar>,
    ) -> RankReport {
        RankReport {
            rank: cluster.rank(),
            machine: machine.clone(),
            kernel: device.name().to_string(),
            phases,
            bytes_read,
            peak_resident: own_memory("VmHWM"),
            peak_device: device.peak_memory(),
            timeline,
        }
    }
}

/// How often codes were chosen otherwise than the method asks.
#[derive(Clone, Copy, Debug, Default)]
struct Fallbacks {
    /// Linears.
    linears: usize,
    /// Of them, those that kept max scales because everything else lost to them or was too far from the source.
    max: usize,
    /// Groups.
    groups: usize,
    /// Of them, those that give a reason.
    reasons: usize,
}

impl Fallbacks {
    fn of(parts: &[PartRecord]) -> Fallbacks {
        let mut count = Fallbacks::default();
        for chosen in parts.iter().flat_map(|part| &part.groups).filter_map(|group| group.chosen.as_ref()) {
            count.groups += 1;
            count.reasons += chosen.fallback.is_some() as usize;
            count.linears += chosen.verdicts.len();
            count.max += chosen.verdicts.iter().filter(|verdict| verdict.codes == Codes::Max.name()).count();
        }
        count
    }
}

impl fmt::Display for Fallbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fallbacks { linears, max, groups, reasons } = self;
        if *max > 0 && max < linears {
            writeln!(f, "{max} of {linears} linears keep max scales: nothing else was as good for them")?;
        }
        if *reasons > 0 {
            writeln!(
                f,
                "{reasons} of {groups} inputs were treated otherwise than the method asks: the warnings and --report say why"
            )?;
        }
        Ok(())
    }
}

/// Maxima by rank. A linear has one of its weight and one of its input.
fn health(plan: &Plan, parts: &[PartRecord]) -> BTreeMap<usize, Health> {
    let mut by_rank: BTreeMap<usize, Health> =
        plan.stages.iter().map(|stage| (stage.rank, Health::default())).collect();
    for record in parts {
        let PartId::Layer(layer) = record.part else { continue };
        let health = by_rank.entry(plan.owner(layer)).or_default();
        for group in &record.groups {
            for (_, amax) in &group.members {
                health.count(*amax, |health| &mut health.weights_good);
                if let Some(amax) = group.input_amax {
                    health.count(amax, |health| &mut health.inputs_good);
                }
            }
        }
    }
    by_rank
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>4}  {:<16} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>11}  good / zero / NaN",
            "rank", "host", "threads", "forward", "wait", "transfer", "quantize", "write", "read", "peak"
        )?;
        for rank in &self.ranks {
            let health = self.health.get(&rank.rank).copied().unwrap_or_default();
            writeln!(
                f,
                "{:>4}  {:<16} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>11}  {} / {} / {}",
                rank.rank,
                rank.machine.host,
                rank.machine.threads,
                duration(rank.phases.forward),
                duration(rank.phases.wait),
                duration(rank.phases.transfer),
                duration(rank.phases.quantize),
                duration(rank.phases.write),
                binary(rank.bytes_read),
                binary(rank.peak_resident),
                health.weights_good + health.inputs_good,
                health.zero,
                health.nan,
            )?;
        }
        let verified = &self.verification.summary;
        if let (Some(mean), Some(largest)) = (verified.mean_relative_error, verified.max_relative_error) {
            writeln!(f, "relative error of weights: mean {mean:.4}, largest {largest:.4}")?;
        }
        write!(f, "{}", Fallbacks::of(&self.parts))?;
        writeln!(
            f,
            "{} to {} ({:.1}%) in {} ({} preparing, {} walking of {} expected, {} proving); verified, {}",
            binary(self.source_bytes),
            binary(self.output_bytes),
            100.0 * self.output_bytes as f64 / self.source_bytes as f64,
            duration(self.seconds.total),
            duration(self.seconds.prepare),
            duration(self.seconds.walk),
            duration(self.seconds.walk_expected),
            duration(self.seconds.prove),
            verified,
        )?;
        for (what, names) in [("carried over", &self.side_files), ("left behind", &self.left_behind)] {
            if !names.is_empty() {
                writeln!(f, "{what}: {}", some(names))?;
            }
        }
        write!(f, "written to {}", self.out)
    }
}

impl RunReport {
    /// A report with what the options, the plan and the parts say.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        options: &Options,
        mpi: Option<String>,
        plan: Plan,
        ranks: Vec<RankReport>,
        parts: Vec<PartRecord>,
        verification: verify::Report,
    ) -> RunReport {
        RunReport {
            version: env!("CARGO_PKG_VERSION").to_string(),
            mpi,
            model: options.plan.model.display().to_string(),
            out: options.out.display().to_string(),
            layout: options.plan.layout.to_string(),
            scheme: options.plan.scheme.to_string(),
            method: options.plan.method.to_string(),
            source_bytes: 0,
            output_bytes: 0,
            side_files: vec![],
            left_behind: vec![],
            seconds: Seconds { walk_expected: plan.seconds, ..Seconds::default() },
            health: health(&plan, &parts),
            plan,
            ranks,
            calibration: None,
            parts,
            verification,
        }
    }
}
