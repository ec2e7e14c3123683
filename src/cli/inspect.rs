//! `distq inspect`

use std::path::PathBuf;

use distq::cluster::Cluster;
use distq::error::Result;
use distq::report::inspect;

/// Arguments of `distq inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of a Hugging Face checkpoint, quantized or not.
    dir: PathBuf,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it: rank 0 looks.
pub fn run(args: &Args, cluster: &Cluster) -> Result<()> {
    cluster.from_root(|| super::show(&inspect(&args.dir)?, args.json))
}
