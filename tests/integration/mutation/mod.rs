//! Mutated input for every parser: valid files, damaged in seeded ways, given to the real binary.
//!
//! Whatever a file holds, distq may accept it or refuse it, and nothing else: no panic, no signal, no hang, no more
//! memory than [`MEMORY_KIB`], an exit code of the documented class, a message that names the file, and no
//! control character from the file in what is printed.
//!
//! `make test` runs [`CASES`] cases. `make fuzz N=100000 SEED=7` runs any number; `CASE=123` runs one again.

mod bytes;
mod json;
mod targets;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::support::Random;
use targets::{Target, targets};

/// Cases that every run of the tests tries.
const CASES: usize = 2000;

/// The address space that a run may take.
const MEMORY_KIB: u64 = 5 << 20;

/// No run of a tiny model takes this long, on a busy machine either.
const LIMIT: Duration = Duration::from_secs(40);

/// Faults that are printed.
const SHOWN: usize = 60;

/// More text than this is no message for a person.
const LONGEST: usize = 8000;

#[test]
fn mutated_files_are_accepted_or_refused() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    let seed = number("DISTQ_FUZZ_SEED").unwrap_or(1) as u32;
    let cases = match number("DISTQ_FUZZ_CASE") {
        Some(case) => case..case + 1,
        None => 0..number("DISTQ_FUZZ_CASES").unwrap_or(CASES),
    };
    let scratch = tempfile::tempdir().unwrap();
    let targets = targets(&scratch.path().join("valid"));
    let turns: Vec<usize> =
        (0..targets.len()).flat_map(|at| std::iter::repeat_n(at, targets[at].weight)).collect();
    for target in &targets {
        target.accepts_what_is_valid(&scratch.path().join("valid-run"));
    }
    let (next, failures) = (AtomicUsize::new(cases.start), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let (next, failures, targets, turns, cases) = (&next, &failures, &targets, &turns, &cases);
            let room = scratch.path().join(format!("worker-{worker}"));
            scope.spawn(move || {
                loop {
                    let case = next.fetch_add(1, Ordering::Relaxed);
                    if !cases.contains(&case) {
                        return;
                    }
                    let target = &targets[turns[case % turns.len()]];
                    if let Some(fault) = target.fault(seed, case, &room) {
                        let kept = keep(&room, seed, case);
                        let line = format!(
                            "case {case} of {}: {fault}\n    kept in {}",
                            target.name,
                            kept.display()
                        );
                        failures.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} of {} mutated inputs with seed {seed} were not handled:\n{}",
        failures.len(),
        cases.len(),
        failures[..failures.len().min(SHOWN)].join("\n")
    );
}

impl Target {
    /// Damage to what was refused anyway would show nothing.
    fn accepts_what_is_valid(&self, room: &Path) {
        let _ = fs::remove_dir_all(room);
        link_tree(&self.base, room);
        let outcome = run(&(self.args)(room, &mut Random::seeded(0)));
        assert_eq!(outcome.code, Some(0), "{}, undamaged: {}", self.name, outcome.said);
    }

    /// Makes the case's files in `room`, runs the target's command on them, and says what is wrong with the outcome.
    fn fault(&self, seed: u32, case: usize, room: &Path) -> Option<String> {
        let mut random = Random::seeded(seed ^ (case as u32).wrapping_mul(0x9E37_79B9));
        let _ = fs::remove_dir_all(room);
        link_tree(&self.base, room);
        let mut args = (self.args)(room, &mut random);
        match &self.file {
            Some(file) => {
                let path = room.join(file);
                let spoiled = (self.mutate)(&fs::read(&path).unwrap(), &mut random);
                // The file is a hard link to the original, which must stay as it is.
                fs::remove_file(&path).unwrap();
                fs::write(&path, spoiled).unwrap();
            }
            None => {
                let at = random.below(args.len() - self.fixed) + self.fixed;
                let spoiled = (self.mutate)(args[at].as_bytes(), &mut random);
                // The operating system passes no argument with a zero byte in it.
                args[at] = String::from_utf8_lossy(&spoiled).replace('\0', "");
            }
        }
        let outcome = run(&args);
        fs::write(room.join("command.txt"), format!("{args:?}\n{}", outcome.said)).unwrap();
        self.judge(&outcome).or_else(|| (self.check)(room, &outcome))
    }

    fn judge(&self, outcome: &Outcome) -> Option<String> {
        let said = &outcome.said;
        let Some(code) = outcome.code else {
            return Some(format!("ended by a signal or after {} s: {said}", LIMIT.as_secs()));
        };
        if said.contains("internal error") || said.contains("panicked") {
            return Some(format!("a panic: {said}"));
        }
        if !self.codes.contains(&code) {
            return Some(format!("exit code {code}: {said}"));
        }
        if let Some(found) = said.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t')) {
            return Some(format!("prints the control character {found:?}"));
        }
        if outcome.message.len() > LONGEST {
            return Some(format!("a message of {} bytes", outcome.message.len()));
        }
        let names_something =
            self.names.is_empty() || self.names.iter().any(|name| outcome.message.contains(name));
        if code == 3 && !names_something {
            return Some(format!("the message names no file: {said}"));
        }
        None
    }
}

/// What a run came to.
pub struct Outcome {
    /// The exit code; none where a signal ended it.
    pub code: Option<i32>,
    /// Standard error.
    pub message: String,
    /// Both streams.
    pub said: String,
}

/// Runs distq with limits on memory and time.
fn run(args: &[String]) -> Outcome {
    let limited = format!("ulimit -v {MEMORY_KIB}; ulimit -c 0; exec \"$0\" \"$@\"");
    let mut child = Command::new("sh")
        .args(["-c", &limited, env!("CARGO_BIN_EXE_distq")])
        .args(args)
        .env("OMP_NUM_THREADS", "1")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    std::thread::scope(|scope| {
        let stdout = scope.spawn(|| read(stdout));
        let stderr = scope.spawn(|| read(stderr));
        let started = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if started.elapsed() > LIMIT => {
                    child.kill().unwrap();
                    break child.wait().unwrap();
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let message = stderr.join().unwrap();
        let said = stdout.join().unwrap() + &message;
        Outcome { code: status.code(), message, said }
    })
}

fn read(mut stream: impl Read) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Copies a directory's structure; its files become hard links.
fn link_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => link_tree(&entry.path(), &target),
            // A run appends to its journal, so files that are written to are copied.
            false if targets::is_written_to(&entry.path()) => {
                fs::copy(entry.path(), target).unwrap();
            }
            false => fs::hard_link(entry.path(), target).unwrap(),
        }
    }
}

/// Copies a case that failed to where it stays.
fn keep(room: &Path, seed: u32, case: usize) -> PathBuf {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mutation-{seed}-{case}"));
    let _ = fs::remove_dir_all(&kept);
    let copied = Command::new("cp").arg("-r").arg(room).arg(&kept).status().unwrap();
    assert!(copied.success(), "the failed case can't be copied to {}", kept.display());
    kept
}
