//! When this rank computed what, recorded while it works. The report draws it.

use std::sync::Mutex;
use std::time::Instant;

/// The kind of work that a bar shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// Loading a layer's weights.
    Load,
    /// Micro-batches through a layer, by the clock of the device.
    Compute,
    /// Choosing codes for a layer.
    Quantize,
}

/// A period of work on one layer.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Bar {
    /// What was done.
    pub work: Work,
    /// The decoder layer.
    pub layer: usize,
    /// The first and the last micro-batch; both 0 where it is about none.
    pub micro_batches: [usize; 2],
    /// Seconds from the moment at which all ranks began together.
    pub start: f64,
    /// Likewise.
    pub end: f64,
}

/// Records the bars of one rank.
pub struct Timeline {
    zero: Instant,
    bars: Mutex<Vec<Bar>>,
}

/// Micro-batches of one layer are one bar where the seconds between them are fewer than this, which is too short to be
/// seen in the picture.
const GAP: f64 = 0.0005;

impl Timeline {
    /// Begins at zero. Ranks call this when they leave a barrier together, so their zeros agree without comparing
    /// clocks.
    pub fn begin() -> Timeline {
        Timeline { zero: Instant::now(), bars: Mutex::default() }
    }

    /// Seconds since the beginning.
    pub fn now(&self) -> f64 {
        self.zero.elapsed().as_secs_f64()
    }

    /// Notes work between two times, in seconds since the beginning.
    pub fn note(&self, work: Work, layer: usize, micro_batch: usize, start: f64, end: f64) {
        let mut bars = self.bars.lock().expect("no holder of this lock panics");
        let last = bars.iter_mut().rev().find(|bar| bar.work == work);
        match last {
            Some(bar)
                if bar.layer == layer && start - bar.end < GAP && bar.micro_batches[1] < micro_batch =>
            {
                bar.end = end;
                bar.micro_batches[1] = micro_batch;
            }
            _ => bars.push(Bar { work, layer, micro_batches: [micro_batch; 2], start, end }),
        }
    }

    /// The bars.
    pub fn finish(self) -> Vec<Bar> {
        self.bars.into_inner().expect("no holder of this lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_that_follow_each_other_are_one_bar() {
        let timeline = Timeline::begin();
        timeline.note(Work::Compute, 3, 0, 0.0, 1.0);
        timeline.note(Work::Compute, 3, 1, 1.0, 2.0);
        timeline.note(Work::Quantize, 2, 0, 0.0, 3.0);
        timeline.note(Work::Compute, 3, 2, 2.0001, 3.0);
        timeline.note(Work::Compute, 4, 0, 3.0, 4.0);
        timeline.note(Work::Compute, 4, 1, 4.1, 5.0);
        let bars = timeline.finish();
        let seen: Vec<_> = bars.iter().map(|bar| (bar.layer, bar.micro_batches)).collect();
        assert_eq!(seen, [(3, [0, 2]), (2, [0, 0]), (4, [0, 0]), (4, [1, 1])]);
    }
}
