//! `distq plan`

use distq::calibration::Calibration;
use distq::cluster::Cluster;
use distq::error::Result;
use distq::pipeline::survey;

use super::quantize::{CalibArgs, PlanArgs};

/// Arguments of `distq plan`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    calib: CalibArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args, cluster: &Cluster) -> Result<()> {
    let options = args.plan.options();
    let calib = cluster.agree(args.calib.options())?;
    let surveyed = survey(cluster, &options, |model| {
        if !options.scheme.quantizes_activations() {
            return Ok(vec![]);
        }
        cluster.from_root(|| Calibration::load(&calib, &options.model, model.vocab).map(|data| data.lengths))
    })?;
    if cluster.is_root() {
        super::show(&surveyed.plan, args.json);
    }
    Ok(())
}
