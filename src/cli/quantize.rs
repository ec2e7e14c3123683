//! `distq quantize`

use std::path::PathBuf;

use distq::backend::DeviceChoice;
use distq::calibration::{CalibOptions, Source};
use distq::checkpoint::{Existing, Layout, Scheme};
use distq::cluster::Cluster;
use distq::error::{Error, Result};
use distq::methods::Method;
use distq::pipeline::{self, PlanOptions};
use distq::units::parse_bytes;

/// How a checkpoint is split over ranks; shared with `distq plan`.
#[derive(clap::Args)]
pub struct PlanArgs {
    /// Source: a Hugging Face directory in BF16, F16 or F32.
    pub model: PathBuf,
    /// Layout of the output: compressed-tensors or modelopt.
    #[arg(long, default_value = "compressed-tensors")]
    pub layout: Layout,
    /// What is quantized: nvfp4 (weights and activations) or nvfp4a16 (weights only).
    #[arg(long, default_value = "nvfp4")]
    pub scheme: Scheme,
    /// How codes and scales are chosen: best, or pieces joined by +: [smooth+] max, sweep, wsweep, gptq or gptq+guard
    /// [+headroom].
    #[arg(long, default_value = "best", value_name = "NAME")]
    pub method: Method,
    /// Leave these modules in their dtype: full names with `*` for any part, or re:EXPRESSION. Repeatable.
    #[arg(long, value_name = "PATTERN")]
    pub ignore: Vec<String>,
    /// Layers by rank, e.g. 41,41,6. Default: what the planner finds.
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    pub layers_per_rank: Option<Vec<usize>>,
    /// Memory by rank, or one value for all, e.g. 118GiB,115GiB,22GiB. Default: what each host has.
    #[arg(long, value_delimiter = ',', value_parser = parse_bytes, value_name = "SIZE,...")]
    pub memory_per_rank: Vec<u64>,
    /// Where to compute: auto (a GPU for each rank that finds one), cpu or cuda.
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// A directory on each host, on a disk of its own or a shared one, for hidden states: so that a resumed run begins
    /// where the one before ended, and for those that have no room in memory.
    #[arg(long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
}

/// A host whose copy of the model lies elsewhere says so in its environment.
const MODEL_HERE: &str = "DISTQ_MODEL";

impl PlanArgs {
    /// As the pipeline takes them.
    pub fn options(&self, cluster: &Cluster) -> PlanOptions {
        let elsewhere = std::env::var_os(MODEL_HERE).filter(|path| !path.is_empty()).map(PathBuf::from);
        if let (Some(path), 0) = (&elsewhere, cluster.local_rank()) {
            tracing::info!(
                "{MODEL_HERE} is set in this host's environment: the model is read from {}, not from {}",
                path.display(),
                self.model.display()
            );
        }
        PlanOptions {
            model: elsewhere.unwrap_or_else(|| self.model.clone()),
            layout: self.layout,
            scheme: self.scheme,
            method: self.method,
            ignore: self.ignore.clone(),
            layers_per_rank: self.layers_per_rank.clone(),
            memory_per_rank: self.memory_per_rank.clone(),
            device: self.device,
            work_dir: self.work_dir.clone(),
        }
    }
}

/// Which documents calibrate; shared with `distq plan`.
#[derive(clap::Args)]
pub struct CalibArgs {
    /// Calibration documents: a .jsonl, .txt or .parquet file, or builtin.
    #[arg(long, default_value = "builtin", value_name = "FILE|builtin")]
    pub calib: Source,
    /// Documents to use.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub calib_samples: u64,
    /// Skip documents with fewer tokens.
    #[arg(long, default_value_t = 150, value_name = "N")]
    pub calib_min_tokens: usize,
    /// Cut documents with more tokens.
    #[arg(long, default_value_t = 1200, value_name = "N")]
    pub calib_max_tokens: usize,
    /// 0 takes documents in their order, any other number shuffles them.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
}

impl CalibArgs {
    /// As the calibration room takes them.
    pub fn options(&self) -> Result<CalibOptions> {
        if self.calib_max_tokens < self.calib_min_tokens.max(1) {
            return Err(Error::usage(format!(
                "--calib-max-tokens {} is less than --calib-min-tokens {}",
                self.calib_max_tokens, self.calib_min_tokens
            ))
            .fix("raise the one or lower the other"));
        }
        Ok(CalibOptions {
            source: self.calib.clone(),
            samples: self.calib_samples as usize,
            min_tokens: self.calib_min_tokens,
            max_tokens: self.calib_max_tokens,
            seed: self.seed,
        })
    }
}

/// Arguments of `distq quantize`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    plan: PlanArgs,
    /// Output directory; appears only when it is complete and proven.
    out: PathBuf,
    #[command(flatten)]
    calib: CalibArgs,
    /// Largest output file.
    #[arg(long, default_value = "5GB", value_parser = parse_bytes, value_name = "SIZE")]
    max_shard_size: u64,
    /// Send every tensor through rank 0, even where ranks could write in place.
    #[arg(long)]
    gather: bool,
    /// Continue an unfinished run.
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace OUT and whatever an unfinished run left.
    #[arg(long)]
    overwrite: bool,
    /// Write a report: JSON, or a page with plots where the name ends in .html. Repeatable.
    #[arg(long, value_name = "FILE")]
    report: Vec<PathBuf>,
}

/// Runs it.
pub fn run(args: &Args, quiet: bool, cluster: &Cluster) -> Result<()> {
    let existing = match (args.resume, args.overwrite) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    let calib = cluster.agree(args.calib.options())?;
    let options = pipeline::Options {
        plan: args.plan.options(cluster),
        out: args.out.clone(),
        calib,
        max_shard: args.max_shard_size,
        existing,
        gather: args.gather,
        reports: args.report.clone(),
        quiet,
    };
    pipeline::quantize(cluster, &options)
}
