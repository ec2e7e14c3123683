//! Progress on rank 0: a bar where a terminal shows it, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::planner::Plan;
use crate::units::duration;

const LINE_EVERY: Duration = Duration::from_secs(10);

/// The progress of the whole job, in steps of one layer over one micro-batch.
pub struct Progress {
    bar: ProgressBar,
    plain: Option<Plain>,
    total: u64,
    started: Instant,
    reached: Vec<(usize, usize, usize)>,
}

/// The bar that is on the terminal.
static SHOWN: OnceLock<ProgressBar> = OnceLock::new();

/// How long a launcher gets to pass on that the bar is gone: what is said next goes another way through it.
const PASSING_ON: Duration = Duration::from_millis(50);

struct Plain {
    last: Instant,
}

impl Progress {
    /// Shows `total` steps of `plan`. Open MPI gives ranks a terminal on stdout and a pipe on stderr, so
    /// stdout decides; `quiet` shows nothing.
    pub fn new(total: u64, plan: &Plan, quiet: bool) -> Progress {
        let terminal = std::io::stdout().is_terminal();
        let target = if terminal && !quiet {
            ProgressDrawTarget::stdout_with_hz(5)
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let style = "{bar:30} {pos}/{len} layer passes  {per_sec}  {elapsed} < {eta}  {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is constant"));
        if !bar.is_hidden() {
            let _ = SHOWN.set(bar.clone());
        }
        let plain = (!terminal && !quiet).then(|| Plain { last: Instant::now() });
        let reached = plan.stages.iter().map(|s| (s.rank, s.layers.start, s.layers.end)).collect();
        Progress { bar, plain, total, started: Instant::now(), reached }
    }

    /// Counts one layer of one rank over one micro-batch.
    pub fn step(&mut self, rank: usize, layer: usize) {
        if let Some(entry) = self.reached.iter_mut().find(|(of, ..)| *of == rank) {
            entry.1 = layer;
        }
        self.bar.inc(1);
        let due = self.plain.as_ref().is_some_and(|plain| plain.last.elapsed() >= LINE_EVERY);
        if due {
            self.plain = Some(Plain { last: Instant::now() });
            let (done, seconds) = (self.bar.position(), self.started.elapsed().as_secs_f64());
            let left = seconds / done as f64 * (self.total - done) as f64;
            tracing::info!(
                "{done}/{} layer passes, about {} left, {}",
                self.total,
                duration(left),
                self.stages()
            );
        } else if !self.bar.is_hidden() {
            self.bar.set_message(self.stages());
        }
    }

    fn stages(&self) -> String {
        let stages: Vec<String> = self
            .reached
            .iter()
            .map(|(rank, layer, end)| format!("rank {rank}: layer {layer} of ..{end}"))
            .collect();
        stages.join("  ")
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Takes the bar away from any thread, if there is one, and for good.
    pub fn clear() {
        if let Some(bar) = SHOWN.get().filter(|bar| !bar.is_finished()) {
            bar.finish_and_clear();
            std::thread::sleep(PASSING_ON);
        }
    }
}
