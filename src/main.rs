//! The distq command: the same on every rank.

mod cli;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use distq::cluster::{Cluster, launch};
use distq::last_words::Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Every rank finds the same fault in the same arguments; one says so.
            if launch().is_none_or(|launch| launch.rank == 0) {
                let _ = error.print();
            }
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let cluster = match Cluster::start(cli.silence()) {
        Ok(cluster) => cluster,
        Err(error) => {
            if launch().is_none_or(|launch| launch.rank == 0) {
                let _ = std::io::stderr().write_all(format!("distq: {error}\n").as_bytes());
            }
            return ExitCode::from(error.exit as u8);
        }
    };
    log(&cli, &cluster);
    let result = cli.run(&cluster);
    ExitCode::from(cluster.conclude(result) as u8)
}

/// Logs to standard error, naming rank and host where there are several.
fn log(cli: &cli::Cli, cluster: &Cluster) {
    let level = cli.level();
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // Who wants to know everything also wants to know what takes so long.
    match level >= tracing::Level::DEBUG {
        true => log.with_timer(tracing_subscriber::fmt::time::uptime()).init(),
        false => log.without_time().init(),
    }
    if cluster.size() > 1 {
        let span = tracing::info_span!("rank", rank = cluster.rank(), host = cluster.host());
        // Entered for as long as the process lives.
        std::mem::forget(span.entered());
    }
}
