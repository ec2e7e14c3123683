//! SIGINT and SIGTERM (Ctrl-C, a batch system's time limit, preemption) end the whole job at once. What is in
//! `OUT.partial/` can be resumed at any moment, so there is nothing to tidy up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::fail::{abort, remedy, say};
use crate::cluster::Cluster;
use crate::error::{Error, ExitCode, Result};
use crate::threads;

/// A launcher passes a signal on to every rank; the others let rank 0 speak.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether the job has ended in order and signals no longer matter.
static LEAVING: AtomicBool = AtomicBool::new(false);

/// From here on signals are nobody's business: the job's end has been told, and a launcher that sees one rank leave
/// with a failure sends the others a SIGTERM, which must not become a second message with another exit code.
pub(in crate::cluster) fn disregard() {
    LEAVING.store(true, Ordering::SeqCst);
}

/// Ends the job with exit code 5 when a signal asks for it.
///
/// # Errors
/// Exit code 5 where the system refuses a handler.
pub(in crate::cluster) fn watch(cluster: &Cluster) -> Result<()> {
    let refused = |e| Error::run(format!("can't listen for signals: {e}"));
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(refused)?;
    let (is_root, place) = (cluster.is_root(), cluster.place(""));
    let listen = move || {
        let Some(signal) = signals.forever().next() else { return };
        if !is_root {
            std::thread::sleep(PATIENCE);
        }
        if LEAVING.load(Ordering::SeqCst) {
            return;
        }
        let name = if signal == SIGINT { "SIGINT" } else { "SIGTERM" };
        say(&format!("{place}stopped by {name}; {}", remedy()));
        abort(ExitCode::Run as i32)
    };
    threads::spawn("signals", listen)?;
    Ok(())
}
