//! `distq plan`

use distq::calibration::Calibration;
use distq::cluster::Cluster;
use distq::error::Result;
use distq::job::{foresee, survey};
use distq::model::Model;
use distq::planner::AssumedMachine;
use distq::units::parse_link;

use super::quantize::{CalibArgs, PlanArgs};

/// Arguments of `distq plan`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    calib: CalibArgs,
    /// Plan for these machines instead of those at hand: memory and kind of each (uma: a GPU in the host's memory; gpu: a
    /// card; cpu: no GPU), and for a card also the memory of its host. For example
    /// 128GiB:uma,24GiB:gpu,24GiB:gpu:64GiB,64GiB:cpu
    #[arg(long, value_delimiter = ',', value_name = "SIZE:KIND,...")]
    nodes: Vec<AssumedMachine>,
    /// The links of these machines, one value for all or one for each, such as 2.5Gbit. Two machines exchange hidden
    /// states at the lower of their rates. Without it, 10Gbit is assumed.
    #[arg(long, value_delimiter = ',', value_parser = parse_link, value_name = "RATE,...", requires = "nodes")]
    link: Vec<f64>,
    /// Print the plan as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args, cluster: &Cluster) -> Result<()> {
    let options = args.plan.options(cluster);
    let calib = cluster.agree(args.calib.options())?;
    let lengths = |model: &Model| match options.calibrates() {
        true => {
            let data = Calibration::load(&calib, &options.model, model.vocab)?;
            data.summary.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            Ok(data.lengths)
        }
        false => Ok(vec![]),
    };
    let plan = if args.nodes.is_empty() {
        survey(cluster, &options, |model| cluster.from_root(|| lengths(model)))?.plan
    } else {
        cluster.from_root(|| foresee(&options, &args.nodes, &args.link, lengths))?
    };
    if cluster.is_root() { super::show(&plan, args.json) } else { Ok(()) }
}
