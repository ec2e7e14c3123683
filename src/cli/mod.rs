//! Arguments, and which run to start. A file a subcommand.

mod alike;
mod eval;
mod inspect;
mod plan;
mod quantize;
mod verify;

use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use alike::Typed;

use distq::cluster::Cluster;
use distq::error::Result;

/// Quantizes large language models to NVFP4 over any mix of machines.
///
/// Start it alone, with mpirun or with Slurm, for example: mpirun -np 3 --hostfile hosts distq quantize MODEL OUT
#[derive(Parser)]
#[command(name = "distq", version, max_term_width = 110, args_override_self = true, after_long_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log what each rank measures and when.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Print nothing but errors and what the command is for: no plan, no progress, no warnings.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// End the job when nothing is heard of a rank for so many seconds.
    #[arg(long, global = true, default_value_t = 120, value_name = "SECONDS", value_parser = seconds)]
    link_timeout: u64,
}

#[derive(Subcommand)]
enum Command {
    /// Quantize a checkpoint.
    Quantize(Box<quantize::Args>),
    /// Show who would own which layers, and what it would cost.
    Plan(plan::Args),
    /// Say what a directory is.
    Inspect(inspect::Args),
    /// Prove that a quantized checkpoint is what loaders expect.
    Verify(verify::Args),
    /// Measure perplexity, and the distance to a reference's predictions.
    Eval(eval::Args),
}

const AFTER_HELP: &str = "\
Environment:
  DISTQ_MODEL      Read the model from this directory instead of MODEL, on a host whose copy lies elsewhere
  OMP_NUM_THREADS  Threads of a rank, instead of its share of the cores that it may use

Exit codes:
  0  Done
  2  The arguments are wrong, the output exists, or ranks were started with different options
  3  The checkpoint or the calibration data can't be used
  4  The model does not fit, or the split is impossible
  5  A rank, a device, a link or a disk failed, a signal came, or NaN or zero was found; --resume goes on where it can
  6  Verification found the output wrong";

impl Cli {
    /// Reads the command line.
    ///
    /// # Errors
    /// What is wrong with it, or the help that was asked for.
    pub fn read() -> Result<(Cli, Typed), clap::Error> {
        let mut command = Cli::command();
        command.build();
        let matches = command.try_get_matches_from_mut(std::env::args_os())?;
        let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
        Ok((cli, Typed::new(&command, &matches)))
    }

    /// How long a rank may be silent.
    pub fn silence(&self) -> Duration {
        Duration::from_secs(self.link_timeout)
    }

    /// The log level that the flags ask for.
    pub fn level(&self) -> tracing::Level {
        match (self.quiet, self.verbose) {
            (true, _) => tracing::Level::ERROR,
            (false, 0) => tracing::Level::INFO,
            (false, 1) => tracing::Level::DEBUG,
            (false, _) => tracing::Level::TRACE,
        }
    }

    /// Runs the subcommand on this rank.
    pub fn run(&self, cluster: &Cluster) -> Result<()> {
        match &self.command {
            Command::Quantize(args) => quantize::run(args, self.quiet, cluster),
            Command::Plan(args) => plan::run(args, cluster),
            Command::Inspect(args) => inspect::run(args, cluster),
            Command::Verify(args) => verify::run(args, cluster),
            Command::Eval(args) => eval::run(args, self.quiet, cluster),
        }
    }
}

/// Reads a number that is at least 1.
fn positive(text: &str) -> Result<u64, String> {
    text.parse()
        .ok()
        .filter(|&number| number > 0)
        .ok_or_else(|| "give a whole number that is at least 1".into())
}

/// The longest that a rank may be silent: a year.
const LONGEST_SILENCE: u64 = 365 * 24 * 3600;

/// Reads a time in seconds.
fn seconds(text: &str) -> Result<u64, String> {
    let number = positive(text).ok().filter(|&number| number <= LONGEST_SILENCE);
    number.ok_or_else(|| format!("give a whole number of seconds from 1 to {LONGEST_SILENCE}"))
}

/// Prints a value on rank 0: as JSON where asked for, as a table otherwise.
fn show<T: serde::Serialize + std::fmt::Display>(value: &T, json: bool) -> Result<()> {
    if json { distq::report::print_json(value) } else { distq::report::print(value) }
}
