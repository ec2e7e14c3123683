//! The schedule, played through with expected times: every layer over every micro-batch on every stage, in
//! the order in which `walk` does it. What the closed formula of `cost.rs` leaves out happens here: a
//! group waits until all of it has come, a streamed layer is loaded when the one before was taken, a layer's codes
//! are chosen early where nothing waits for the disk, and otherwise behind the last group, where a streamed stage
//! hands a layer over when all but the one before are written.
//!
//! Takes layers × micro-batches steps. Channels between stages count as wide enough: a sender that outruns
//! its receiver would only have waited for it.

use super::cost::{Mode, Pace, SECOND, Time, Work};

/// What a stage did, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// Computing.
    pub busy: f64,
    /// Waiting for hidden states.
    pub wait: f64,
    /// When its last byte was written.
    pub end: f64,
}

/// Plays the schedule: the stages in their order, each with its pace, its layers and its mode; `group`
/// micro-batches walk together; with `two_sweeps` hidden states go ahead of statistics.
pub fn simulate(
    stages: impl Iterator<Item = (Pace, usize, Mode)>,
    group: usize,
    two_sweeps: bool,
    work: &Work,
) -> Vec<Times> {
    let mut stages = stages.peekable();
    let mut arrivals = vec![0.0; work.micro_batches];
    let mut times = Vec::new();
    while let Some((pace, layers, mode)) = stages.next() {
        let stage = Stage { pace, layers, mode, micro_batches: work.micro_batches };
        let all = work.micro_batches;
        let mut clock = Clock::default();
        match (work.calibrates, two_sweeps, stages.peek()) {
            (false, ..) => stage.convert(&mut clock),
            (true, false, _) => arrivals = stage.walk(&mut clock, &arrivals, group, &stage.once()),
            (true, true, Some(_)) => {
                arrivals = stage.walk(&mut clock, &arrivals, group, &stage.ahead());
                stage.walk(&mut clock, &vec![0.0; all], all, &stage.thorough(pace.again));
            }
            (true, true, None) => {
                stage.walk(&mut clock, &arrivals, all, &stage.thorough(pace.read));
            }
        }
        times.push(Times { busy: clock.busy, wait: clock.wait, end: clock.now.max(clock.written) });
    }
    times
}

struct Stage {
    pace: Pace,
    layers: usize,
    mode: Mode,
    micro_batches: usize,
}

/// Seconds that a sweep's steps take.
struct Sweep {
    /// One micro-batch through one layer.
    step: f64,
    /// Choosing a layer's codes.
    solving: f64,
    /// Loading a layer for the first group and for a later one.
    loads: [f64; 2],
    /// Writing a layer.
    write: f64,
}

#[derive(Default)]
struct Clock {
    now: f64,
    busy: f64,
    wait: f64,
    /// When the loading thread is free.
    loaded: f64,
    /// When everything that was handed over is written.
    written: f64,
    /// When all of it but the last layer is.
    written_before: f64,
}

fn seconds(time: Time) -> f64 {
    time as f64 / SECOND
}

impl Stage {
    fn sweep(&self, computing: Time, solving: Time, loads: [Time; 2], write: Time) -> Sweep {
        let layers = self.layers as f64;
        Sweep {
            step: seconds(computing) / layers / self.micro_batches as f64,
            solving: seconds(solving) / layers,
            loads: loads.map(|load| seconds(load) / layers),
            write: seconds(write) / layers,
        }
    }

    /// Hidden states, maxima and codes.
    fn once(&self) -> Sweep {
        let Pace { forward, solving, read, again, write, .. } = self.pace;
        self.sweep(forward, solving, [read, again], write)
    }

    /// Hidden states alone.
    fn ahead(&self) -> Sweep {
        self.sweep(self.pace.forward, 0, [self.pace.read, self.pace.again], 0)
    }

    /// Statistics and codes.
    fn thorough(&self, load: Time) -> Sweep {
        self.sweep(self.pace.statistics, self.pace.solving, [load, load], self.pace.write + self.pace.spill)
    }

    /// Walks groups through the layers; returns when each micro-batch reaches the next stage.
    fn walk(&self, clock: &mut Clock, arrivals: &[f64], group: usize, sweep: &Sweep) -> Vec<f64> {
        let link = seconds(self.pace.link) / self.micro_batches as f64;
        let (mut sent, mut departures) = (0.0f64, Vec::new());
        let groups = arrivals.chunks(group);
        let last = groups.len() - 1;
        let mut given = vec![false; self.layers];
        for (number, group) in groups.enumerate() {
            let complete = group.iter().copied().fold(clock.now, f64::max);
            clock.wait += complete - clock.now;
            clock.now = complete;
            for (layer, given) in given.iter_mut().enumerate() {
                match (self.mode, number) {
                    // Loaded ahead, and kept.
                    (Mode::Resident, 0) => clock.loaded += sweep.loads[0],
                    (Mode::Resident, _) => {}
                    (Mode::Streamed | Mode::Spilled, _) => clock.loaded += sweep.loads[number.min(1)],
                }
                clock.now = clock.now.max(clock.loaded);
                if self.mode == Mode::Streamed {
                    // The next is loaded when this one was taken.
                    clock.loaded = clock.now;
                }
                for _ in group {
                    clock.compute(sweep.step);
                    if layer + 1 == self.layers {
                        sent = clock.now.max(sent) + link;
                        departures.push(sent);
                    }
                }
                let early = number > 0 && clock.written <= clock.now;
                if !*given && (number == last || early) {
                    *given = true;
                    clock.finish(sweep, self.mode);
                }
            }
        }
        // The next sweep's weights are loaded from here on.
        clock.loaded = clock.now;
        departures
    }

    /// Weights alone: read, chosen, written.
    fn convert(&self, clock: &mut Clock) {
        let Pace { solving, read, write, .. } = self.pace;
        for _ in 0..self.layers {
            clock.loaded += seconds(read) / self.layers as f64;
            clock.now = clock.now.max(clock.loaded);
            clock.compute(seconds(solving) / self.layers as f64);
            clock.written = clock.now.max(clock.written) + seconds(write) / self.layers as f64;
        }
    }
}

impl Clock {
    fn compute(&mut self, seconds: f64) {
        self.now += seconds;
        self.busy += seconds;
    }

    /// Chooses a layer's codes and hands them over; where memory is for a few layers alone, no more than one may
    /// wait to be written.
    fn finish(&mut self, sweep: &Sweep, mode: Mode) {
        if mode == Mode::Streamed {
            self.now = self.now.max(self.written_before);
        }
        self.compute(sweep.solving);
        self.written_before = self.written;
        self.written = self.now.max(self.written) + sweep.write;
    }
}
