//! Ending together: one message, one exit code, no rank left behind.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};

use crate::cluster::host::launch::LAUNCHERS;
use crate::cluster::{Cluster, launch, transport};
use crate::error::{Error, ExitCode, Result};
use crate::{confined, last_words, threads};

impl Cluster {
    /// Text prefixed with the rank and the host it comes from, where there is more than one.
    pub fn place(&self, text: &str) -> String {
        if self.size > 1 { format!("rank {} ({}): {text}", self.rank, self.host) } else { text.to_string() }
    }

    /// Turns the result of a run into the process's exit code. A failure that every rank knows of is
    /// printed by rank 0 and all leave in order; any other is printed here and takes the other ranks down.
    pub fn conclude(self, result: Result<()>) -> i32 {
        let code = result.as_ref().err().map_or(ExitCode::Done, |error| error.exit) as i32;
        match result {
            Err(error) if self.size == 1 => say(&error.to_string()),
            Err(error) if !self.agreed.get() => self.end(error),
            Err(error) => {
                match self.is_root() {
                    true => say(&error.to_string()),
                    false => TOLD.store(true, Ordering::Relaxed),
                }
                super::signals::disregard();
                // A launcher kills the other ranks when the first one leaves with a failure: let rank 0 speak first.
                let _ = self.barrier();
            }
            Ok(()) => {}
        }
        let late = "MPI does not come to its end: another rank is silent, or the link to it is down";
        let _in_time = within(self.silence, self.place(late), code);
        drop(self);
        code
    }

    /// Tells of a failure that not every rank knows of, and takes the other ranks down.
    pub(in crate::cluster) fn end(&self, error: Error) -> ! {
        if error.is_reported() {
            // Rank 0 passes on what others reported to it; the text already names them.
            say(&error.to_string());
        } else {
            self.report_to_root(&error);
            say(&self.place(&error.to_string()));
        }
        free_launcher();
        abort(error.exit as i32)
    }
}

/// Ends this process with a message and an exit code, unless what it returns is dropped within the limit: for the calls
/// into MPI that can't be asked whether they are done.
pub(in crate::cluster) fn within(limit: Duration, late: String, code: i32) -> Sender<()> {
    let (in_time, timer) = bounded(0);
    let wait = move || {
        if timer.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            say(&late);
            std::process::exit(code);
        }
    };
    // Where the system has no thread left, MPI has as long as it likes.
    let _ = threads::spawn("timer", wait);
    in_time
}

/// Open MPI's mpirun waits for the daemon of a host that is gone, for as long as TCP hopes. If it is still there when all
/// ranks have had the time to end, it is ended as well (Ctrl-C makes it fall over instead).
fn free_launcher() {
    let launcher = std::os::unix::process::parent_id();
    let comm = format!("/proc/{launcher}/comm");
    let name = std::fs::read_to_string(&comm).unwrap_or_default();
    if LAUNCHERS.contains(&name.trim()) {
        let end = r#"sleep 10; [ "$(cat "$1")" = "$2" ] && kill -KILL "$0""#;
        // In a process group of its own, since this rank's is about to be killed.
        let _ = Command::new("sh")
            .args(["-c", end, &launcher.to_string(), &comm, name.trim()])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
    }
}

/// How long a launcher gets to pass on what was said: MPICH's ends without reading it to its end.
const PASSING_ON: Duration = Duration::from_millis(200);

/// Ends every rank of the job at once with this exit code.
pub fn abort(code: i32) -> ! {
    if launch().is_none() {
        std::process::exit(code)
    }
    std::thread::sleep(PASSING_ON);
    transport::abort(code)
}

/// A rank that panics would otherwise wait for ever in MPI's finalisation, and the others for it.
pub(in crate::cluster) fn install_panic_hook(cluster: &Cluster) {
    let who = cluster.place("");
    let no_system = format!("{}; {}", threads::REFUSED, threads::REMEDY);
    std::panic::set_hook(Box::new(move |info| {
        if confined::is_here() {
            // Whoever confined the thread makes an error of it.
            return;
        }
        // A new thread that finds no memory for its signal stack panics in the standard library, before it runs anything
        // of distq's.
        let by_system = info.location().is_some_and(|place| place.file().contains("library/std/src/sys/"));
        if by_system && std::thread::current().name() != Some("main") {
            last_words::end(&no_system);
        }
        // Last words of another thread are for the main thread to pass on. This is that thread, or a fault of distq's.
        match by_system {
            true => say(&format!("{who}{no_system}")),
            false => {
                say(&format!("{who}internal error: {info}; please report it with the command that led here"))
            }
        }
        abort(ExitCode::Run as i32);
    }));
}

/// Whether this rank has nothing more to say: a launcher sends SIGTERM to those that are left when one has ended.
static TOLD: AtomicBool = AtomicBool::new(false);

/// Whether what this job has done so far can be resumed.
static RESUMABLE: AtomicBool = AtomicBool::new(false);

/// What to do when the job was ended by something that has nothing to do with it.
pub(in crate::cluster) fn remedy() -> &'static str {
    match RESUMABLE.load(Ordering::Relaxed) {
        true => "start it again with --resume, and it goes on where it was",
        false => "start it again",
    }
}

/// What takes away that which a message would be mixed with, such as a bar on the terminal.
static CLEAR: OnceLock<fn()> = OnceLock::new();

impl Cluster {
    /// This is a job that `--resume` can go on with: messages about its end say so.
    pub fn can_be_resumed(&self) {
        RESUMABLE.store(true, Ordering::Relaxed);
    }

    /// Has `clear` called before the message that ends the job is written.
    pub fn before_last_words(&self, clear: fn()) {
        let _ = CLEAR.set(clear);
    }
}

/// Clears the way for a message. On a thread of its own: a terminal that takes nothing must not hold up the end.
fn clear() {
    let Some(clear) = CLEAR.get() else { return };
    let (cleared, done) = bounded(1);
    let work = move || {
        clear();
        let _ = cleared.send(());
    };
    if threads::spawn("clear", work).is_ok() {
        let _ = done.recv_timeout(PASSING_ON);
    }
}

/// Says why the job ends, once.
pub(in crate::cluster) fn say(text: &str) {
    if !TOLD.swap(true, Ordering::Relaxed) {
        clear();
        let mut stderr = std::io::stderr().lock();
        // At once: a launcher puts its own words between the parts of a message.
        let _ = stderr.write_all(format!("distq: {text}\n").as_bytes());
        let _ = stderr.flush();
    }
}
