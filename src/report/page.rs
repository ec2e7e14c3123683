//! The report as one self-contained HTML page: plots are inline SVG, nothing is fetched.

use std::fmt::Write;

use super::html::escape;
use super::run::RunReport;
use super::timeline::timeline;
use crate::record::PartId;
use crate::units::{binary, duration};
use crate::verify::TensorError;

/// One fused group's numbers, in the order of the model.
struct GroupView<'a> {
    layer: usize,
    record: &'a crate::record::GroupRecord,
}

/// A line of a plot: a name and points (layer, value).
type Line = (String, Vec<(f64, f64)>);

/// Colors of lines, in their order; where there are more lines, they begin again.
const COLORS: [&str; 8] =
    ["#3b6fb6", "#d1495b", "#2a9d6f", "#b07d12", "#7a4fb0", "#3aa6b9", "#8c564b", "#6b7280"];

/// The names of the sites, in the order in which they occur.
fn sites(groups: &[GroupView<'_>]) -> Vec<String> {
    let mut names: Vec<String> = vec![];
    for group in groups {
        if !names.contains(&group.record.site) {
            names.push(group.record.site.clone());
        }
    }
    names
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;color:#222}\
table{border-collapse:collapse;font-size:13px}td,th{padding:.15rem .6rem;text-align:right}\
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}\
figure{display:inline-block;margin:.5rem 1rem .5rem 0}figcaption{font-weight:600}svg{background:#fafafa}";

/// Renders the page.
pub fn page(report: &RunReport) -> String {
    let groups: Vec<GroupView<'_>> = report
        .parts
        .iter()
        .filter_map(|part| match part.part {
            PartId::Layer(layer) => Some((layer, part)),
            _ => None,
        })
        .flat_map(|(layer, part)| part.groups.iter().map(move |record| GroupView { layer, record }))
        .collect();
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>distq: {title}</title><style>{STYLE}</style>\n\
         <h1>{title}</h1><p>{scheme}, {layout} layout, method {method}: {from} to {to} in {time}; {verified}. \
         Written by distq {version}.</p>\n",
        title = escape(&report.model),
        scheme = report.scheme,
        layout = report.layout,
        method = report.method,
        from = binary(report.source_bytes),
        to = binary(report.output_bytes),
        time = duration(report.seconds.total),
        verified = report.verification.summary,
        version = report.version,
    );
    if let Some(calibration) = &report.calibration {
        let text = serde_json::to_string(calibration).unwrap_or_default();
        let _ = writeln!(
            out,
            "<details><summary>calibration data</summary><pre>{}</pre></details>",
            escape(&text)
        );
    }
    out += &plots(&groups);
    out += &timeline(&report.ranks);
    out += &loss(&groups);
    out += &table(&report.verification.tensors, &groups);
    out + "</html>\n"
}

fn plots(groups: &[GroupView<'_>]) -> String {
    let mut out = String::new();
    let mut add = |title: &str, logarithmic: bool, value: &dyn Fn(&GroupView<'_>) -> Option<f64>| {
        let line = |site: String| -> Line {
            let of_site = groups.iter().filter(|group| group.record.site == site);
            let points = of_site.filter_map(|group| Some((group.layer as f64, value(group)?))).collect();
            (site, points)
        };
        out += &plot(title, logarithmic, &sites(groups).into_iter().map(line).collect::<Vec<_>>());
    };
    add("output error (relative), as quantized", false, &|group| mean(group, |v| v.output_error));
    add("output error under max scales, without folds", false, &|group| mean(group, |v| v.output_error_max));
    add("weight error (relative, after folding)", false, &|group| mean(group, |v| v.weight_error));
    add("smoothing: error with the fold over error without", false, &|group| {
        Some(group.record.chosen.as_ref()?.smoothing.as_ref()?.gain)
    });
    add("input maximum", true, &|group| group.record.input_amax.map(f64::from));
    add("input headroom, times the maximum", true, &|group| {
        let chosen = group.record.chosen.as_ref()?;
        group.record.input_amax.map(|_| f64::from(chosen.headroom))
    });
    add("largest weight", true, &|group| {
        let maxima = group.record.members.iter().map(|(_, amax)| f64::from(*amax));
        maxima.reduce(f64::max)
    });
    out
}

/// The mean over a group's members of what was judged.
fn mean(group: &GroupView<'_>, of: impl Fn(&crate::methods::layer::Verdict) -> f64) -> Option<f64> {
    let verdicts = &group.record.chosen.as_ref()?.verdicts;
    (!verdicts.is_empty()).then(|| verdicts.iter().map(of).sum::<f64>() / verdicts.len() as f64)
}

/// Lines over layers. Nothing where there is nothing to draw.
fn plot(title: &str, logarithmic: bool, lines: &[Line]) -> String {
    let scale = |value: f64| if logarithmic { value.max(1e-30).log10() } else { value };
    let points = || lines.iter().flat_map(|(_, points)| points);
    let right = points().map(|point| point.0).fold(1.0, f64::max);
    let top = points().map(|point| scale(point.1)).fold(f64::MIN, f64::max);
    let bottom =
        if logarithmic { points().map(|point| scale(point.1)).fold(f64::MAX, f64::min) } else { 0.0 };
    if points().next().is_none() {
        return String::new();
    }
    let (width, height, margin) = (480.0, 220.0, 46.0);
    let x = |layer: f64| margin + layer / right * (width - margin - 10.0);
    let y = |value: f64| {
        let share = (scale(value) - bottom) / (top - bottom).max(1e-12);
        height - 24.0 - share * (height - 40.0)
    };
    let mut svg = String::new();
    for step in 0..=4 {
        let level = bottom + (top - bottom) * step as f64 / 4.0;
        let value = if logarithmic { 10f64.powf(level) } else { level };
        let _ = write!(
            svg,
            "<line x1=\"{margin}\" x2=\"{width}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{label}\" y=\"{at:.1}\" font-size=\"10\" text-anchor=\"end\">{value:.3}</text>",
            at = y(value),
            label = margin - 4.0,
        );
    }
    let colors = || COLORS.iter().cycle();
    for ((name, points), color) in lines.iter().zip(colors()) {
        let name = escape(name);
        let path: Vec<String> =
            points.iter().map(|(layer, value)| format!("{:.1},{:.1}", x(*layer), y(*value))).collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" points=\"{}\"><title>{name}</title></polyline>",
            path.join(" ")
        );
    }
    let entry = |((name, _), color): (&Line, &&str)| {
        format!("<span style=\"color:{color}\">■ {}</span>", escape(name))
    };
    let legend = lines.iter().zip(colors()).map(entry);
    format!(
        "<figure><figcaption>{title}</figcaption><svg width=\"{width}\" height=\"{height}\">{svg}\
         <text x=\"{}\" y=\"{}\" font-size=\"10\" text-anchor=\"end\">layer {right}</text></svg><br>{}</figure>\n",
        width - 4.0,
        height - 8.0,
        legend.collect::<Vec<_>>().join(" ")
    )
}

/// Where the loss sits: squared output errors by site, before and after.
fn loss(groups: &[GroupView<'_>]) -> String {
    let squared = |site: &str, of: fn(&crate::methods::layer::Verdict) -> f64| -> f64 {
        let of_site = groups.iter().filter(|group| group.record.site == site);
        let verdicts =
            of_site.flat_map(|group| group.record.chosen.iter().flat_map(|chosen| &chosen.verdicts));
        verdicts.map(|verdict| of(verdict).powi(2)).sum()
    };
    let rows: Vec<(f64, f64, String)> = (sites(groups).into_iter())
        .map(|site| {
            (squared(&site, |v| v.output_error_max), squared(&site, |v| v.output_error), escape(&site))
        })
        .collect();
    let (before, after) =
        (rows.iter().map(|row| row.0).sum::<f64>(), rows.iter().map(|row| row.1).sum::<f64>());
    if before == 0.0 {
        return String::new();
    }
    let mut out = String::from(
        "<h2>Where the loss sits</h2><p>Sums of squared relative output errors over linears, on held-out documents \
         where there are any.</p><table><tr><th>site<th>max scales<th>as quantized<th>kept<th>share of what is left</tr>\n",
    );
    for (max, now, name) in rows {
        let _ = writeln!(
            out,
            "<tr><td>{name}<td>{max:.4}<td>{now:.4}<td>{:.0}%<td>{:.0}%</tr>",
            100.0 * now / max,
            100.0 * now / after
        );
    }
    out + &format!(
        "<tr><td>all<td>{before:.4}<td>{after:.4}<td>{:.0}%<td></tr></table>\n",
        100.0 * after / before
    )
}

/// Every linear.
fn table(proven: &[TensorError], groups: &[GroupView<'_>]) -> String {
    let mut out = String::from(
        "<h2>Every linear</h2><table><tr><th>linear<th>codes<th>fold<th>its gain<th>weight error<th>output error, max<th>output \
         error<th>given up<th>damping<th>max |w|<th>input max<th>headroom<th>block scales by power of two</tr>\n",
    );
    let number = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.4}"));
    for group in groups {
        let chosen = group.record.chosen.as_ref();
        let smoothing = chosen.and_then(|chosen| chosen.smoothing.as_ref());
        // What a resumed run takes from a journal may be anybody's text.
        let fold = smoothing.map_or("-".to_string(), |fold| escape(&fold.candidate));
        let gain = number(smoothing.map(|fold| fold.gain));
        for (i, (name, amax)) in group.record.members.iter().enumerate() {
            let verdict = chosen.and_then(|chosen| chosen.verdicts.get(i));
            let proven = proven.iter().find(|tensor| tensor.module == *name);
            let _ = writeln!(
                out,
                "<tr><td>{}<td>{}<td>{fold}<td>{gain}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{amax:.4}<td>{}<td>{}<td>{}</tr>",
                escape(name),
                verdict.map_or("max".to_string(), |verdict| escape(&verdict.codes)),
                number(verdict.map(|v| v.weight_error).or(proven.map(|tensor| tensor.relative_error))),
                number(verdict.map(|v| v.output_error_max)),
                number(verdict.map(|v| v.output_error)),
                number(verdict.and_then(|v| v.output_error_other)),
                number(chosen.and_then(|chosen| chosen.damping).map(f64::from)),
                number(group.record.input_amax.map(f64::from)),
                chosen.map_or("-".to_string(), |chosen| chosen.headroom.to_string()),
                proven.map_or(String::new(), |tensor| bars(&tensor.block_scales)),
            );
        }
    }
    out + "</table>\n"
}

/// A small histogram.
fn bars(counts: &[u64]) -> String {
    let most = counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let bar = |(i, &count): (usize, &u64)| {
        let height = 16.0 * count as f64 / most;
        format!(
            "<rect x=\"{}\" y=\"{:.1}\" width=\"4\" height=\"{height:.1}\" fill=\"#3b6fb6\"/>",
            5 * i,
            16.0 - height
        )
    };
    let bars: String = counts.iter().enumerate().map(bar).collect();
    format!("<svg width=\"{}\" height=\"16\">{bars}</svg>", 5 * counts.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::Smoothing;
    use crate::methods::layer::Verdict;
    use crate::record::{Chosen, GroupRecord};

    #[test]
    fn plots_scale_to_their_points_and_stay_away_without_any() {
        let svg = plot("errors", false, &[("qkv".into(), vec![(0.0, 0.1), (3.0, 0.2)])]);
        assert!(svg.contains("46.0,") && svg.contains("layer 3") && svg.contains("0.200"), "{svg}");
        assert_eq!(plot("nothing", true, &[("o".into(), vec![])]), "");
    }

    #[test]
    fn texts_from_outside_are_escaped() {
        let text = || "<script>&".to_string();
        let (weight_error, output_error_max, output_error, output_error_other) = (0.1, 0.1, 0.1, None);
        let verdict =
            Verdict { codes: text(), weight_error, output_error_max, output_error, output_error_other };
        let smoothing = Smoothing { candidate: text(), gain: 1.0, factors: vec![] };
        let chosen = Chosen {
            smoothing: Some(smoothing),
            headroom: 1.0,
            damping: None,
            fallback: Some(text()),
            verdicts: vec![verdict],
        };
        let members = vec![(text(), 1.0)];
        let record = GroupRecord { site: "qkv".into(), input_amax: None, members, chosen: Some(chosen) };
        let table = table(&[], &[GroupView { layer: 0, record: &record }]);
        assert!(!table.contains("<script") && table.matches("&lt;script&gt;&amp;").count() == 3, "{table}");
    }
}
