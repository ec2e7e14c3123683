//! Draws the recorded timelines of all ranks as one picture.

use std::fmt::Write;

use super::html::escape;
use super::run::RankReport;
use crate::progress::Work;

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
            escape(&rank.machine.host),
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
