//! Progress on rank 0: a bar where a terminal shows it, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::planner::Plan;
use crate::units::duration;

const LINE_EVERY: Duration = Duration::from_secs(10);

/// The bar that is shown on the terminal, for [`Progress::clear`].
static SHOWN: OnceLock<ProgressBar> = OnceLock::new();

/// The time for a launcher to pass on to the terminal that the bar is removed. The next message goes through another
/// pipe of the launcher and could otherwise arrive first.
const PASSING_ON: Duration = Duration::from_millis(50);

/// Steps of equal length towards a known total.
pub struct Steps {
    bar: ProgressBar,
    /// When a line was last written, where lines are written.
    last_line: Option<Mutex<Instant>>,
    unit: &'static str,
    total: u64,
    started: Instant,
}

impl Steps {
    /// Shows `total` steps, called `unit`, of a command whose result goes to files. Open MPI gives ranks a terminal on
    /// stdout and a pipe on stderr, so stdout decides; `quiet` shows nothing.
    pub fn new(total: u64, unit: &'static str, quiet: bool) -> Steps {
        Steps::on(ProgressDrawTarget::stdout_with_hz(5), std::io::stdout().is_terminal(), total, unit, quiet)
    }

    /// The same of a command whose result goes to stdout, where a bar would be a part of it.
    pub fn beside_result(total: u64, unit: &'static str, quiet: bool) -> Steps {
        Steps::on(ProgressDrawTarget::stderr_with_hz(5), std::io::stderr().is_terminal(), total, unit, quiet)
    }

    fn on(shown: ProgressDrawTarget, terminal: bool, total: u64, unit: &'static str, quiet: bool) -> Steps {
        let target = if terminal && !quiet { shown } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let style = format!("{{bar:30}} {{pos}}/{{len}} {unit}  {{per_sec}}  {{elapsed}} < {{eta}}  {{msg}}");
        bar.set_style(ProgressStyle::with_template(&style).expect("the template is constant"));
        if !bar.is_hidden() {
            let _ = SHOWN.set(bar.clone());
        }
        let last_line = (!terminal && !quiet).then(|| Mutex::new(Instant::now()));
        Steps { bar, last_line, unit, total, started: Instant::now() }
    }

    /// Sets the text beside the bar.
    pub fn say(&self, what: String) {
        self.bar.set_message(what);
    }

    /// Counts one step.
    pub fn step(&self) {
        self.bar.inc(1);
        let Some(last) = &self.last_line else { return };
        let mut last = last.lock().expect("no holder of this lock panics");
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            let (done, seconds) = (self.bar.position(), self.started.elapsed().as_secs_f64());
            let left = seconds / done as f64 * self.total.saturating_sub(done) as f64;
            let (total, unit, left, what) = (self.total, self.unit, duration(left), self.bar.message());
            tracing::info!("{done}/{total} {unit}, about {left} left, {what}");
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// The progress of the whole job, in steps of one layer over one micro-batch.
pub struct Progress {
    steps: Steps,
    reached: Vec<(usize, usize, usize)>,
}

impl Progress {
    /// Shows `total` steps of `plan`; `quiet` shows nothing.
    pub fn new(total: u64, plan: &Plan, quiet: bool) -> Progress {
        let reached = plan.stages.iter().map(|s| (s.rank, s.layers.start, s.layers.end)).collect();
        Progress { steps: Steps::new(total, "layer passes", quiet), reached }
    }

    /// Counts one layer of one rank over one micro-batch.
    pub fn step(&mut self, rank: usize, layer: usize) {
        if let Some(entry) = self.reached.iter_mut().find(|(of, ..)| *of == rank) {
            entry.1 = layer;
        }
        self.steps.say(self.stages());
        self.steps.step();
    }

    fn stages(&self) -> String {
        let stages: Vec<String> = self
            .reached
            .iter()
            .map(|(rank, layer, end)| format!("rank {rank}: layer {layer} of ..{end}"))
            .collect();
        stages.join("  ")
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.steps.finish();
    }

    /// Removes the bar, if one is shown, and shows none again. May be called from any thread.
    pub fn clear() {
        if let Some(bar) = SHOWN.get().filter(|bar| !bar.is_finished()) {
            bar.finish_and_clear();
            std::thread::sleep(PASSING_ON);
        }
    }
}
