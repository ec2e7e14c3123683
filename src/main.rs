//! The distq command: the same on every rank.

mod cli;

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use distq::cluster::{Cluster, launch};
use distq::error::printable;
use distq::progress::Progress;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, Uptime, uptime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Files that may be open at once: more than the shards of any model, of the source and of the output.
const OPEN_FILES: u64 = 1 << 20;

fn main() -> ExitCode {
    // Shells and batch systems begin with a low limit that every process may raise by itself. Where even the highest
    // is too low, opening a file says so.
    let _ = rlimit::increase_nofile_limit(OPEN_FILES);
    let (cli, typed) = match cli::Cli::read() {
        Ok(read) => read,
        Err(error) => return refused(&error),
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
    cluster.before_last_words(Progress::clear);
    let result = typed.agree(&cluster).and_then(|()| cli.run(&cluster));
    ExitCode::from(cluster.conclude(result) as u8)
}

/// Characters of a line about the arguments that are printed at most, and lines at the beginning and at the end of what
/// is said of them.
const LONGEST_LINE: usize = 600;
const LINES: usize = 6;

/// How long a rank waits before it says that it can't read its arguments.
const PATIENCE: Duration = Duration::from_secs(2);

/// Says what is wrong with the arguments, or shows the help. Where ranks were given the same arguments, rank 0 finds the
/// same fault and ends before the others speak, and the launcher ends them.
fn refused(error: &clap::Error) -> ExitCode {
    let rank = launch().map_or(0, |launch| launch.rank);
    let is_fault = error.exit_code() != 0;
    if rank > 0 && is_fault {
        std::thread::sleep(PATIENCE);
        let _ = std::io::stderr().write_all(format!("distq: rank {rank}: ").as_bytes());
    }
    if is_fault {
        // What was typed is repeated in the message, and may hold anything, thousands of lines as well.
        let text = error.render().to_string();
        let lines: Vec<&str> = text.lines().collect();
        let (first, rest) = lines.split_at(LINES.min(lines.len()));
        for line in first.iter().chain(&rest[rest.len().saturating_sub(LINES)..]) {
            let _ = writeln!(std::io::stderr(), "{}", printable(line, LONGEST_LINE));
        }
    } else if rank == 0 {
        let _ = error.print();
    }
    ExitCode::from(error.exit_code() as u8)
}

/// Logs to standard error, naming rank and host where there are several.
fn log(cli: &cli::Cli, cluster: &Cluster) {
    let level = cli.level();
    // Who wants to know everything also wants to know what takes so long.
    let clock = (level >= tracing::Level::DEBUG).then(uptime);
    let line = Line { place: cluster.place(""), clock };
    // Where standard error is gone, what is logged is lost, and the run goes on.
    let log = tracing_subscriber::fmt().log_internal_errors(false);
    log.with_max_level(level).with_writer(std::io::stderr).event_format(line).init();
}

/// A line of the log: the level, the rank and host where there are several, the text. All threads of a process are of
/// one rank.
struct Line {
    place: String,
    /// Since when the process runs, in front.
    clock: Option<Uptime>,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        if let Some(clock) = &self.clock {
            clock.format_time(&mut writer)?;
            writer.write_char(' ')?;
        }
        write!(writer, "{:>5} {}", event.metadata().level(), self.place)?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
