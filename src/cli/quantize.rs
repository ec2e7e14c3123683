//! `distq quantize`

use std::path::PathBuf;

use distq::backend::DeviceChoice;
use distq::calibration::{CalibOptions, Source};
use distq::checkpoint::{Existing, Layout, Scheme};
use distq::cluster::Cluster;
use distq::error::{Error, Result};
use distq::job::{Options, PlanOptions};
use distq::methods::Method;
use distq::quantize::quantize;
use distq::units::parse_bytes;

/// How a checkpoint is split over ranks; shared with `distq plan`.
#[derive(clap::Args)]
pub struct PlanArgs {
    /// The source: the directory of a Hugging Face checkpoint in BF16, F16, F32 or FP8.
    pub model: PathBuf,
    /// The layout of the output: how tensors are named and described.
    #[arg(long, default_value = "compressed-tensors")]
    pub layout: Layout,
    /// What is quantized.
    #[arg(long, default_value = "nvfp4")]
    pub scheme: Scheme,
    /// How codes and scales are chosen: best, or one of max, sweep, wsweep, gptq and gptq+guard, with smooth+ in front
    /// or +headroom behind where wanted.
    #[arg(long, default_value = "best", value_name = "NAME")]
    pub method: Method,
    /// Leave modules as they are: their full names, with * for any part, or re: and a regular expression. May be
    /// repeated.
    #[arg(long, value_name = "PATTERN")]
    pub ignore: Vec<String>,
    /// The number of layers of each rank, such as 41,41,6. Without it the planner chooses.
    #[arg(long, value_delimiter = ',', value_name = "N,N,...")]
    pub layers_per_rank: Option<Vec<usize>>,
    /// The memory that each rank may use, such as 118GiB,115GiB,22GiB, or one value for all. Without it, what is free.
    #[arg(long, value_delimiter = ',', value_parser = parse_bytes, value_name = "SIZE,...")]
    pub memory_per_rank: Vec<u64>,
    /// Where to compute.
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Keep hidden states in this directory, which must exist on each host: a resumed run then begins where the one
    /// before ended, and what has no room in memory is kept here too.
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
    /// The file of calibration documents (JSON lines, JSON, text or Parquet), or builtin for the set inside the program.
    #[arg(long, default_value = "builtin", value_name = "FILE|builtin")]
    pub calib: Source,
    /// The number of documents to use.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = super::positive)]
    pub calib_samples: u64,
    /// Skip documents with fewer tokens than this.
    #[arg(long, default_value_t = 150, value_name = "N")]
    pub calib_min_tokens: usize,
    /// Cut documents after so many tokens.
    #[arg(long, default_value_t = 1200, value_name = "N")]
    pub calib_max_tokens: usize,
    /// Shuffle the documents with this number; 0 takes them in their order.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
}

impl CalibArgs {
    /// As the calibration room takes them.
    pub fn options(&self) -> Result<CalibOptions> {
        if self.calib_max_tokens < self.calib_min_tokens.max(1) {
            return Err(Error::usage(format!(
                "no document can have at least {} tokens (--calib-min-tokens) when documents are cut after {} \
                 (--calib-max-tokens)",
                self.calib_min_tokens, self.calib_max_tokens
            ))
            .fix("give a --calib-max-tokens that is at least as large as --calib-min-tokens, and at least 1"));
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
    /// The output directory. It appears when it is complete and verified.
    out: PathBuf,
    #[command(flatten)]
    calib: CalibArgs,
    /// The largest size of an output file.
    #[arg(long, default_value = "5GB", value_parser = parse_bytes, value_name = "SIZE")]
    max_shard_size: u64,
    /// Have rank 0 write everything, even where other ranks see the output directory and could write to it.
    #[arg(long)]
    gather: bool,
    /// Continue an unfinished run, with the same options.
    #[arg(long, conflicts_with = "overwrite")]
    resume: bool,
    /// Replace OUT, and start again where an earlier run did not finish.
    #[arg(long)]
    overwrite: bool,
    /// Write a report to this file: a page with plots where its name ends in .html, else JSON. May be repeated.
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
    let options = Options {
        plan: args.plan.options(cluster),
        out: args.out.clone(),
        calib,
        max_shard: args.max_shard_size,
        existing,
        gather: args.gather,
        reports: args.report.clone(),
        quiet,
    };
    quantize(cluster, &options)
}
