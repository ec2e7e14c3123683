//! When each rank computed what: recorded while it works, drawn as one picture.

use std::fmt::Write;
use std::sync::Mutex;
use std::time::Instant;

use super::RankReport;

/// What a bar stands for.
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

/// A stretch of work on one layer.
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

/// The bars of one rank, in the making.
pub struct Timeline {
    zero: Instant,
    bars: Mutex<Vec<Bar>>,
}

/// Seconds between micro-batches of one layer that are still one bar: shorter than anything that is worth seeing.
const GAP: f64 = 0.0005;

impl Timeline {
    /// Begins. Ranks that leave a barrier together have the same zero without looking at clocks.
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

/// The picture and the shares of time, as HTML. Nothing where no rank computed.
pub fn timeline(ranks: &[RankReport]) -> String {
    let end = ranks.iter().flat_map(|rank| &rank.timeline).map(|bar| bar.end).fold(0.0, f64::max);
    if end == 0.0 {
        return String::new();
    }
    let (left, width, lane) = (60.0, 1000.0, 40.0);
    let x = |seconds: f64| left + seconds / end * (width - left);
    let (mut svg, mut rows) = (String::new(), String::new());
    for (position, rank) in ranks.iter().enumerate() {
        let top = position as f64 * lane;
        let _ =
            write!(svg, "<text x=\"0\" y=\"{:.1}\" font-size=\"12\">rank {}</text>", top + 18.0, rank.rank);
        for bar in &rank.timeline {
            let (y, height) = match bar.work {
                Work::Load => (top + 2.0, 6.0),
                Work::Compute => (top + 9.0, 18.0),
                Work::Quantize => (top + 28.0, 8.0),
            };
            let [first, last] = bar.micro_batches;
            let what = match bar.work {
                Work::Load => format!("layer {}, loading", bar.layer),
                Work::Compute => format!("layer {}, micro-batches {first} to {last}", bar.layer),
                Work::Quantize => format!("layer {}, quantizing", bar.layer),
            };
            let _ = write!(
                svg,
                "<rect x=\"{:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{height}\" fill=\"hsl({},55%,52%)\">\
                 <title>{what}: {:.3} s to {:.3} s</title></rect>",
                x(bar.start),
                (x(bar.end) - x(bar.start)).max(0.3),
                bar.layer * 47 % 360,
                bar.start,
                bar.end,
            );
        }
        let busy: f64 =
            rank.timeline.iter().filter(|bar| bar.work == Work::Compute).map(|bar| bar.end - bar.start).sum();
        let phases = &rank.phases;
        let _ = writeln!(
            rows,
            "<tr><td>{} ({})</td><td>{busy:.2}</td><td>{:.0} %</td><td>{:.2}</td><td>{:.2}</td><td>{:.2}</td><td>{:.2}</td></tr>",
            rank.rank,
            super::page::escape(&rank.machine.host),
            100.0 * busy / end,
            phases.wait,
            phases.transfer,
            phases.quantize,
            phases.write,
        );
    }
    let height = ranks.len() as f64 * lane + 18.0;
    format!(
        "<h2>When each rank did what</h2><p>One color a layer: its weights being loaded, micro-batches \
         passing it, its codes being chosen. White is waiting.</p><svg width=\"{width}\" height=\"{height}\">{svg}\
         <text x=\"{left}\" y=\"{label}\" font-size=\"10\">0 s</text>\
         <text x=\"{width}\" y=\"{label}\" font-size=\"10\" text-anchor=\"end\">{end:.2} s</text></svg>\
         <table><tr><th>rank</th><th>computing, s</th><th>of the time</th><th>waiting for hidden states</th>\
         <th>moving them</th><th>quantizing</th><th>writing, sending</th></tr>{rows}</table>\n",
        label = height - 4.0,
    )
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
