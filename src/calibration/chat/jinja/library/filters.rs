//! Filters.

use std::collections::HashSet;

use super::arguments::Arguments;
use super::attributes::{attribute, path, reversed};
use super::checks::check;
use super::methods::{replaced, stripped};
use crate::calibration::chat::jinja::meter::{Fault, Meter, Outcome, fail};
use crate::calibration::chat::jinja::parsing::syntax::Binary;
use crate::calibration::chat::jinja::values::format::percent;
use crate::calibration::chat::jinja::values::json::{Style, json};
use crate::calibration::chat::jinja::values::operators::{binary, order, sorted};
use crate::calibration::chat::jinja::values::print::{string, text};
use crate::calibration::chat::jinja::values::strings::{capitalize, centered, escaped, is_space, lines};
use crate::calibration::chat::jinja::values::value::{Key, SLOT, Value, View};

const NAMES: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "forceescape",
    "format",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
];

/// Whether there is a filter of that name.
pub fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// Applies the filter of that name.
pub fn apply(name: &str, value: &Value, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    match name {
        "default" | "d" => {
            let bound = arguments.bind(0, ["default_value", "boolean"])?;
            let missing = matches!(value, Value::Undefined(_)) || (bound.flag(1) && !value.is_true());
            let default = || bound.get(0).cloned().unwrap_or(Value::Text("".into()));
            Ok(if missing { default() } else { value.clone() })
        }
        "map" | "select" | "reject" | "selectattr" | "rejectattr" => each(name, value, arguments, meter),
        "first" | "last" | "length" | "count" | "list" | "items" | "reverse" | "batch" | "slice" | "join"
        | "sum" | "min" | "max" | "sort" | "unique" | "dictsort" => sequence(name, value, arguments, meter),
        "abs" | "int" | "float" | "round" => number(name, value, arguments, meter),
        "attr" => {
            let bound = arguments.bind(1, ["name"])?;
            let name = bound.get(0).expect("needed").as_text()?;
            match value {
                // What stands in a dict is no attribute.
                Value::Dict(_) if !matches!(attribute(value, name, meter)?, Value::Method(_)) => {
                    Ok(Value::undefined(format!("a dict has no attribute {name:?}")))
                }
                _ => attribute(value, name, meter),
            }
        }
        "tojson" => tojson(value, arguments, meter),
        "format" => {
            let all = match (arguments.positional.is_empty(), arguments.named.is_empty()) {
                (false, false) => return fail("a format has values with names or without, not both"),
                (_, true) => Value::tuple(arguments.positional.clone(), meter)?,
                (true, false) => {
                    let mut dict = crate::calibration::chat::jinja::values::value::Dict::default();
                    for (name, value) in &arguments.named {
                        dict.insert(Value::Text(name.clone()), value.clone(), meter)?;
                    }
                    dict.into()
                }
            };
            Value::text(percent(&string(value, meter)?, &all, meter)?, meter)
        }
        "indent" | "truncate" if !matches!(value, Value::Text(_)) => {
            fail(format!("{name} is for text, not for a value of type {}", value.type_name()))
        }
        "wordcount" => {
            arguments.bind(0, [])?;
            let text = string(value, meter)?;
            meter.work(text.len())?;
            let words = text.split(|c: char| c != '_' && !c.is_alphanumeric());
            Ok(Value::Int(words.filter(|word| !word.is_empty()).count() as i128))
        }
        name if is_known(name) => Value::text(words(name, &string(value, meter)?, arguments, meter)?, meter),
        _ => fail(format!("the filter '{name}' is unknown or not for chat templates")),
    }
}

/// Filters of text.
fn words(name: &str, value: &str, arguments: &Arguments, meter: &Meter) -> Outcome<String> {
    meter.take(value.len())?;
    let none = || arguments.bind(0, []).map(|_| ());
    Ok(match name {
        "trim" => {
            let bound = arguments.bind(0, ["chars"])?;
            stripped(value, bound.text(0)?.map(|chars| &**chars), true, true).to_string()
        }
        "replace" => {
            let bound = arguments.bind(2, ["old", "new", "count"])?;
            let (old, new) = (
                string(bound.get(0).expect("needed"), meter)?,
                string(bound.get(1).expect("needed"), meter)?,
            );
            replaced(value, &old, &new, bound.int(2)?, meter)?
        }
        "indent" => indented(value, arguments, meter)?,
        "truncate" => truncated(value, arguments)?,
        "center" => {
            let width = arguments.bind(0, ["width"])?.int(0)?.unwrap_or(80);
            let width = usize::try_from(width).unwrap_or(0);
            meter.take(width)?;
            centered(value, width, ' ')
        }
        name => {
            none()?;
            match name {
                "upper" => value.to_uppercase(),
                "lower" => value.to_lowercase(),
                "capitalize" => capitalize(value),
                "title" => titled(value),
                "e" | "escape" | "forceescape" => escaped(value),
                _ => value.to_string(),
            }
        }
    })
}

/// Every word's first letter large; words begin after white space and some signs, other than with `str.title`.
fn titled(value: &str) -> String {
    let begins = |c: char| is_space(c) || "-({[<".contains(c);
    let mut titled = String::new();
    for word in value.split_inclusive(begins) {
        let mut chars = word.chars();
        titled.extend(chars.next().into_iter().flat_map(char::to_uppercase));
        titled.push_str(&chars.as_str().to_lowercase());
    }
    titled
}

fn indented(value: &str, arguments: &Arguments, meter: &Meter) -> Outcome<String> {
    let bound = arguments.bind(0, ["width", "first", "blank"])?;
    let indent = match bound.get(0) {
        Some(Value::Text(indent)) => indent.to_string(),
        width => {
            let width = width.map_or(Ok(4), Value::as_int)?;
            let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
            meter.take(width)?;
            " ".repeat(width)
        }
    };
    // A newline at the end makes a line of its own, and an empty text one empty line.
    let with_end = format!("{value}\n");
    let count = value.chars().filter(|c| is_space(*c)).count() + 1;
    meter.take((indent.len() + SLOT).saturating_mul(count))?;
    let lines = lines(&with_end, false);
    let mut indented = String::new();
    for (at, line) in lines.iter().enumerate() {
        if at > 0 {
            indented.push('\n');
        }
        let indents = if at == 0 { bound.flag(1) } else { !line.is_empty() || bound.flag(2) };
        if indents {
            indented.push_str(&indent);
        }
        indented.push_str(line);
    }
    Ok(indented)
}

fn truncated(value: &str, arguments: &Arguments) -> Outcome<String> {
    let bound = arguments.bind(0, ["length", "killwords", "end", "leeway"])?;
    let length = bound.int(0)?.unwrap_or(255);
    let end = bound.text(2)?.map_or("...", |end| end);
    let kept = length - end.chars().count() as i128;
    if kept < 0 || bound.int(3)?.is_some_and(|leeway| leeway < 0) {
        return fail("a text can't be truncated to less than what ends it");
    }
    if value.chars().count() as i128 <= length + bound.int(3)?.unwrap_or(5) {
        return Ok(value.to_string());
    }
    let kept: String = value.chars().take(kept as usize).collect();
    let kept = if bound.flag(1) { &kept } else { kept.rsplit_once(' ').map_or(&*kept, |(before, _)| before) };
    Ok(format!("{kept}{end}"))
}

fn tojson(value: &Value, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    let bound = arguments.bind(0, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match bound.some(1) {
        None => None,
        Some(Value::Text(indent)) => Some(indent.to_string()),
        Some(width) => {
            let width = usize::try_from(width.as_int()?.max(0)).unwrap_or(usize::MAX);
            meter.take(width)?;
            Some(" ".repeat(width))
        }
    };
    let (comma, colon) = match bound.some(2) {
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(pair) => match pair.items(meter)?.as_slice() {
            [comma, colon] => (comma.as_text()?.to_string(), colon.as_text()?.to_string()),
            _ => return fail("tojson's separators are two"),
        },
    };
    let style = Style { ascii: bound.flag(0), indent, comma, colon, sorted: bound.flag(3) };
    Value::text(json(value, &style, meter)?, meter)
}

/// Filters that look at each item by itself.
fn each(name: &str, value: &Value, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    let mut rest = Arguments { positional: arguments.positional.clone(), named: arguments.named.clone() };
    let mut by_attribute = None;
    if name.ends_with("attr") {
        if rest.positional.is_empty() {
            return fail(format!("{name} needs the name of an attribute"));
        }
        by_attribute = Some(rest.positional.remove(0));
    }
    let mut default = None;
    if name == "map" && rest.positional.is_empty() {
        let bound = rest.bind(0, ["attribute", "default"])?;
        let Some(attribute) = bound.get(0) else { return fail("map needs a filter or an attribute") };
        (by_attribute, default) = (Some(attribute.clone()), bound.get(1).cloned());
    }
    let function = match rest.positional.is_empty() {
        true => None,
        false => Some(rest.positional.remove(0).as_text()?.clone()),
    };
    let mut kept = Vec::new();
    // What is false, None among it, has no items here, though it can't be iterated over elsewhere.
    let items = if value.is_true() { value.items(meter)? } else { Vec::new() };
    for item in items {
        meter.step()?;
        let looked_at = match &by_attribute {
            Some(attribute) => path(&item, attribute, meter)?,
            None => item.clone(),
        };
        if name == "map" {
            kept.push(match (&function, &default) {
                (Some(function), _) => apply(function, &looked_at, &rest, meter)?,
                (None, Some(default)) if matches!(looked_at, Value::Undefined(_)) => default.clone(),
                _ => looked_at,
            });
            continue;
        }
        let passes = match &function {
            Some(test) => check(test, &looked_at, &rest, meter)?,
            None => looked_at.is_true(),
        };
        if passes == name.starts_with("select") {
            kept.push(item);
        }
    }
    Value::stream(kept, meter)
}

/// What items are compared by: an attribute or themselves, text without regard to case.
fn key(item: &Value, attribute: Option<&Value>, case_sensitive: bool, meter: &Meter) -> Outcome<Value> {
    let found = match attribute {
        Some(attribute) => path(item, attribute, meter)?,
        None => item.clone(),
    };
    match found {
        Value::Text(text) if !case_sensitive => Value::text(text.to_lowercase(), meter),
        other => Ok(other),
    }
}

/// Filters of lists and what can be made one.
fn sequence(name: &str, value: &Value, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    match name {
        "first" => {
            arguments.bind(0, [])?;
            let first = match value {
                Value::Stream(items) => items.borrow_mut().pop_front(),
                other => other.items(meter)?.into_iter().next(),
            };
            Ok(first.unwrap_or_else(|| Value::undefined("there is no first item")))
        }
        "last" => {
            arguments.bind(0, [])?;
            if matches!(value, Value::Stream(_)) {
                return fail("a generator has no last item");
            }
            Ok(value.items(meter)?.pop().unwrap_or_else(|| Value::undefined("there is no last item")))
        }
        "length" | "count" => {
            arguments.bind(0, [])?;
            Ok(Value::Int(value.len(meter)? as i128))
        }
        "list" => {
            arguments.bind(0, [])?;
            Value::list(value.items(meter)?, meter)
        }
        "items" => {
            arguments.bind(0, [])?;
            match value {
                Value::Undefined(_) => Value::stream(Vec::new(), meter),
                Value::Dict(dict) => {
                    Value::stream(Value::View(View::Items, dict.clone()).items(meter)?, meter)
                }
                other => {
                    fail(format!("a value of type {} has no pairs of keys and values", other.type_name()))
                }
            }
        }
        "reverse" => {
            arguments.bind(0, [])?;
            match value {
                Value::Text(text) => Value::text(text.chars().rev().collect::<String>(), meter),
                Value::Stream(_) => Value::list(reversed(value.items(meter)?).into(), meter),
                other => Value::stream(reversed(other.items(meter)?).into(), meter),
            }
        }
        "batch" | "slice" => {
            let bound = arguments.bind(1, ["count", "fill_with"])?;
            let count = usize::try_from(bound.get(0).expect("needed").as_int()?).unwrap_or(0);
            if count == 0 {
                return fail(format!("{name} needs a number above zero"));
            }
            let items = value.items(meter)?;
            let fill = bound.some(1).cloned();
            let parts = if name == "batch" {
                batches(items, count, fill, meter)?
            } else {
                slices(items, count, fill, meter)?
            };
            let parts = parts.into_iter().map(|part| Value::list(part, meter));
            Value::stream(parts.collect::<Outcome<_>>()?, meter)
        }
        "join" => {
            let bound = arguments.bind(0, ["d", "attribute"])?;
            let separator = bound.get(0).map_or(Ok(String::new()), |separator| string(separator, meter))?;
            let mut joined = String::new();
            for (at, item) in value.items(meter)?.iter().enumerate() {
                if at > 0 {
                    meter.take(separator.len())?;
                    joined.push_str(&separator);
                }
                match bound.some(1) {
                    Some(attribute) => text(&path(item, attribute, meter)?, &mut joined, meter)?,
                    None => text(item, &mut joined, meter)?,
                }
            }
            Value::text(joined, meter)
        }
        "sum" => {
            let bound = arguments.bind(0, ["attribute", "start"])?;
            let mut sum = bound.get(1).cloned().unwrap_or(Value::Int(0));
            if matches!(sum, Value::Text(_)) {
                return fail("text can't be summed");
            }
            for item in value.items(meter)? {
                let item = match bound.some(0) {
                    Some(attribute) => path(&item, attribute, meter)?,
                    None => item,
                };
                sum = binary(Binary::Add, &sum, &item, meter)?;
            }
            Ok(sum)
        }
        "min" | "max" => {
            let bound = arguments.bind(0, ["case_sensitive", "attribute"])?;
            let mut best: Option<(Value, Value)> = None;
            for item in value.items(meter)? {
                let key = key(&item, bound.some(1), bound.flag(0), meter)?;
                let better = match &best {
                    Some((_, kept)) if name == "min" => {
                        order(&key, kept, meter)?.is_some_and(|order| order.is_lt())
                    }
                    Some((_, kept)) => order(&key, kept, meter)?.is_some_and(|order| order.is_gt()),
                    None => true,
                };
                if better {
                    best = Some((item, key));
                }
            }
            Ok(best.map_or_else(|| Value::undefined("there is no item to choose from"), |(item, _)| item))
        }
        "sort" => {
            let bound = arguments.bind(0, ["reverse", "case_sensitive", "attribute"])?;
            let mut keyed = Vec::new();
            for item in value.items(meter)? {
                let by = match bound.some(2) {
                    Some(Value::Text(attributes)) => {
                        let mut keys = Vec::new();
                        for attribute in attributes.split(',') {
                            let attribute = Value::text(attribute, meter)?;
                            keys.push(key(&item, Some(&attribute), bound.flag(1), meter)?);
                        }
                        Value::list(keys, meter)?
                    }
                    attribute => key(&item, attribute, bound.flag(1), meter)?,
                };
                keyed.push((by, item));
            }
            Value::list(sorted(keyed, bound.flag(0), meter)?, meter)
        }
        "unique" => {
            let bound = arguments.bind(0, ["case_sensitive", "attribute"])?;
            let mut seen = HashSet::new();
            let mut kept = Vec::new();
            for item in value.items(meter)? {
                if seen.insert(Key::of(&key(&item, bound.some(1), bound.flag(0), meter)?, meter)?) {
                    kept.push(item);
                }
            }
            Value::stream(kept, meter)
        }
        _ => {
            let bound = arguments.bind(0, ["case_sensitive", "by", "reverse"])?;
            let Value::Dict(dict) = value else {
                return fail(format!("a value of type {} can't be sorted by key", value.type_name()));
            };
            let by_value = match bound.text(1)?.map(|by| &**by) {
                None | Some("key") => false,
                Some("value") => true,
                Some(_) => return fail("a dict is sorted by \"key\" or \"value\""),
            };
            let mut keyed = Vec::new();
            for (name, value) in dict.entries.values() {
                let by = key(if by_value { value } else { name }, None, bound.flag(0), meter)?;
                keyed.push((by, Value::tuple(vec![name.clone(), value.clone()], meter)?));
            }
            Value::list(sorted(keyed, bound.flag(2), meter)?, meter)
        }
    }
}

fn batches(items: Vec<Value>, count: usize, fill: Option<Value>, meter: &Meter) -> Outcome<Vec<Vec<Value>>> {
    let mut batches: Vec<Vec<Value>> = items.chunks(count).map(<[Value]>::to_vec).collect();
    if let (Some(last), Some(fill)) = (batches.last_mut(), fill) {
        meter.take((count - last.len()).saturating_mul(32))?;
        last.resize(count, fill);
    }
    Ok(batches)
}

fn slices(items: Vec<Value>, count: usize, fill: Option<Value>, meter: &Meter) -> Outcome<Vec<Vec<Value>>> {
    meter.take(count.saturating_mul(32))?;
    let (each, longer) = (items.len() / count, items.len() % count);
    let mut items = items.into_iter();
    let mut slices = Vec::with_capacity(count);
    for at in 0..count {
        let mut slice: Vec<Value> = items.by_ref().take(each + usize::from(at < longer)).collect();
        if at >= longer
            && let Some(fill) = &fill
        {
            slice.push(fill.clone());
        }
        slices.push(slice);
    }
    Ok(slices)
}

/// Filters of numbers.
fn number(name: &str, value: &Value, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    if let Value::Undefined(what) = value {
        return fail(what.to_string());
    }
    match name {
        "abs" => {
            arguments.bind(0, [])?;
            match value {
                Value::Float(value) => Ok(Value::Float(value.abs())),
                other => Ok(Value::Int(
                    other.as_int()?.checked_abs().ok_or_else(|| Fault::new("a number is too large"))?,
                )),
            }
        }
        "int" => {
            let bound = arguments.bind(0, ["default", "base"])?;
            let default = || bound.get(0).cloned().unwrap_or(Value::Int(0));
            Ok(match value {
                Value::Int(_) => value.clone(),
                Value::Bool(value) => Value::Int((*value).into()),
                Value::Float(value) if value.is_finite() => Value::Int(*value as i128),
                Value::Text(text) => {
                    let text = stripped(text, None, true, true).replace('_', "");
                    let base = bound.int(1)?.unwrap_or(10);
                    let whole = parsed(&text, base);
                    let fraction = || {
                        text.parse::<f64>().ok().filter(|value| value.is_finite()).map(|value| value as i128)
                    };
                    whole.or_else(fraction).map_or_else(default, Value::Int)
                }
                _ => default(),
            })
        }
        "float" => {
            let bound = arguments.bind(0, ["default"])?;
            let default = || bound.get(0).cloned().unwrap_or(Value::Float(0.0));
            Ok(match value {
                Value::Float(_) => value.clone(),
                Value::Text(text) => {
                    let text = stripped(text, None, true, true).replace('_', "");
                    text.parse().map_or_else(|_| default(), Value::Float)
                }
                other => other.as_int().map_or_else(|_| default(), |value| Value::Float(value as f64)),
            })
        }
        _ => {
            let bound = arguments.bind(0, ["precision", "method"])?;
            let precision = bound.int(0)?.unwrap_or(0).clamp(-300, 300) as i32;
            let _ = meter;
            match (bound.text(1)?.map_or("common", |method| method), value) {
                ("common", Value::Int(_) | Value::Bool(_)) if precision >= 0 => {
                    Ok(Value::Int(value.as_int()?))
                }
                ("common", _) => {
                    let value = float_of(value)?;
                    // Printing rounds the number that it is exactly, as Python does.
                    let places = precision.max(0) as usize;
                    let scale = 10f64.powi((-precision).max(0));
                    let rounded: f64 = format!("{:.places$}", value / scale).parse().unwrap_or(value);
                    Ok(Value::Float(rounded * scale))
                }
                (method @ ("ceil" | "floor"), _) => {
                    let scale = 10f64.powi(precision);
                    let scaled = float_of(value)? * scale;
                    Ok(Value::Float(if method == "ceil" { scaled.ceil() } else { scaled.floor() } / scale))
                }
                _ => fail("round's method is common, ceil or floor"),
            }
        }
    }
}

fn float_of(value: &Value) -> Outcome<f64> {
    match value {
        Value::Float(value) => Ok(*value),
        other => other.as_int().map(|value| value as f64),
    }
}

fn parsed(text: &str, base: i128) -> Option<i128> {
    let base = u32::try_from(base).ok().filter(|base| (2..=36).contains(base))?;
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefix = match base {
        2 => ["0b", "0B"],
        8 => ["0o", "0O"],
        16 => ["0x", "0X"],
        _ => ["", ""],
    };
    let digits = prefix.iter().find_map(|prefix| digits.strip_prefix(prefix)).unwrap_or(digits);
    if digits.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(digits, base).ok().map(|value| sign * value)
}
