//! `distq eval`

use std::path::PathBuf;

use distq::backend::{Compute, DeviceChoice};
use distq::cluster::Cluster;
use distq::error::Result;
use distq::evaluation::{self, evaluate};

/// Arguments of `distq eval`.
#[derive(clap::Args)]
pub struct Args {
    /// Checkpoints: BF16, F16, F32, FP8, or NVFP4 in either layout. Several stand side by side.
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// Text to predict, which should not have calibrated anything.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Compare predictions with this checkpoint's.
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Windows to read. Default: the whole text.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    windows: Option<u64>,
    /// Tokens of a window.
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u64).range(2..))]
    window_tokens: u64,
    /// Compute in f32, or in bf16 with the roundings of an engine.
    #[arg(long, default_value = "f32", value_name = "DTYPE")]
    compute: Compute,
    /// Where to compute: auto (a GPU for each rank that finds one), cpu or cuda.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args, quiet: bool, cluster: &Cluster) -> Result<()> {
    let evaluation = evaluate(
        cluster,
        &evaluation::Options {
            models: args.models.clone(),
            reference: args.reference.clone(),
            text: args.text.clone(),
            windows: args.windows.map(|windows| windows as usize),
            window_tokens: args.window_tokens as usize,
            compute: args.compute,
            device: args.device,
            quiet,
        },
    )?;
    if cluster.is_root() { super::show(&evaluation, args.json) } else { Ok(()) }
}
