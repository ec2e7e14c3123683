//! `distq verify`

use std::path::PathBuf;

use distq::cluster::Cluster;
use distq::error::{Error, Result};
use distq::verify::verify;

/// Arguments of `distq verify`.
#[derive(clap::Args)]
pub struct Args {
    /// A quantized checkpoint.
    out: PathBuf,
    /// The checkpoint that it was made from: compares every tensor with it.
    #[arg(long, value_name = "MODEL")]
    source: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs it: rank 0 looks.
pub fn run(args: &Args, cluster: &Cluster) -> Result<()> {
    cluster.from_root(|| {
        let report = verify(&args.out, args.source.as_deref())?;
        super::show(&report, args.json)?;
        if report.passed() {
            return Ok(());
        }
        Err(Error::verify(format!("broken rules: {}", report.failed_rules().join(", ")))
            .file(&args.out)
            .fix(report.advice()))
    })
}
