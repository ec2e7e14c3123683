//! Values as Python prints them: `str` and `repr`.

use std::fmt::Write;

use super::value::{Value, View};
use crate::calibration::chat::jinja::meter::{Meter, Outcome, fail};

/// Appends what `str(value)` gives.
pub fn text(value: &Value, to: &mut String, meter: &Meter) -> Outcome<()> {
    match value {
        Value::Undefined(_) => Ok(()),
        Value::Text(text) => push(to, text, meter),
        other => literal(other, to, meter),
    }
}

/// What `str(value)` gives.
pub fn string(value: &Value, meter: &Meter) -> Outcome<String> {
    let mut printed = String::new();
    text(value, &mut printed, meter)?;
    Ok(printed)
}

fn push(to: &mut String, part: &str, meter: &Meter) -> Outcome<()> {
    meter.take(part.len())?;
    to.push_str(part);
    Ok(())
}

/// Appends what `repr(value)` gives.
pub fn literal(value: &Value, to: &mut String, meter: &Meter) -> Outcome<()> {
    meter.step()?;
    match value {
        Value::Undefined(_) => push(to, "Undefined", meter),
        Value::None => push(to, "None", meter),
        Value::Bool(true) => push(to, "True", meter),
        Value::Bool(false) => push(to, "False", meter),
        Value::Int(value) => push(to, &value.to_string(), meter),
        Value::Float(value) => push(to, &float(*value), meter),
        Value::Text(text) => push(to, &quoted(text), meter),
        Value::List(items) => sequence("[", &items.list, "]", to, meter),
        Value::Tuple(items) if items.list.len() == 1 => sequence("(", &items.list, ",)", to, meter),
        Value::Tuple(items) => sequence("(", &items.list, ")", to, meter),
        Value::Dict(dict) => pairs(dict.entries.values().map(|(key, value)| (key, value)), to, meter),
        Value::View(view, _) => {
            let open = format!("{}([", value.type_name());
            let inner: Vec<Value> = match view {
                View::Keys | View::Values | View::Items => value.items(meter)?,
            };
            sequence(&open, &inner, "])", to, meter)
        }
        Value::Range(range) if range.step == 1 => {
            push(to, &format!("range({}, {})", range.start, range.stop), meter)
        }
        Value::Range(range) => {
            push(to, &format!("range({}, {}, {})", range.start, range.stop, range.step), meter)
        }
        Value::Namespace(namespace) => {
            push(to, "<Namespace ", meter)?;
            let attributes: Vec<_> = namespace
                .attributes
                .borrow()
                .iter()
                .map(|(key, value)| (Value::Text(key.clone()), value.clone()))
                .collect();
            meter.nest(|| pairs(attributes.iter().map(|(key, value)| (key, value)), to, meter))?;
            push(to, ">", meter)
        }
        Value::Macro(it) => push(to, &format!("<Macro '{}'>", it.code.name), meter),
        Value::Loop(it) => {
            let length = it.index0.get() + 1 + it.ready.borrow().len() + it.waiting.borrow().len();
            push(to, &format!("<LoopContext {}/{length}>", it.index0.get() + 1), meter)
        }
        Value::Global("dict") => push(to, "<class 'dict'>", meter),
        Value::Global("namespace") => push(to, "<class 'jinja2.utils.Namespace'>", meter),
        Value::Stream(_) | Value::Method(_) | Value::Global(_) | Value::Cycler(_) | Value::Joiner(_) => {
            fail(format!(
                "a {} is printed, which Python prints with an address that is another one each time",
                value.type_name()
            ))
        }
    }
}

fn sequence(open: &str, items: &[Value], close: &str, to: &mut String, meter: &Meter) -> Outcome<()> {
    push(to, open, meter)?;
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            push(to, ", ", meter)?;
        }
        literal(item, to, meter)?;
    }
    push(to, close, meter)
}

fn pairs<'a>(
    entries: impl Iterator<Item = (&'a Value, &'a Value)>,
    to: &mut String,
    meter: &Meter,
) -> Outcome<()> {
    push(to, "{", meter)?;
    for (at, (key, value)) in entries.enumerate() {
        if at > 0 {
            push(to, ", ", meter)?;
        }
        literal(key, to, meter)?;
        push(to, ": ", meter)?;
        literal(value, to, meter)?;
    }
    push(to, "}", meter)
}

/// A float: the fewest digits that are read back as the same number.
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    // Rust's notation changes at the same magnitudes, but its exponents have no sign and one digit.
    let printed = format!("{value:?}");
    match printed.split_once('e') {
        Some((digits, exponent)) => {
            let exponent: i32 = exponent.parse().expect("an exponent is an integer");
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        None => printed,
    }
}

/// Text in the quotes that Python would choose.
pub fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut printed = String::with_capacity(text.len() + 2);
    printed.push(quote);
    for c in text.chars() {
        match c {
            '\n' => printed.push_str("\\n"),
            '\r' => printed.push_str("\\r"),
            '\t' => printed.push_str("\\t"),
            c if c == quote || c == '\\' => printed.extend(['\\', c]),
            c if is_printable(c) => printed.push(c),
            c => {
                let code = c as u32;
                let _ = match code {
                    0..=0xFF => write!(printed, "\\x{code:02x}"),
                    0x100..=0xFFFF => write!(printed, "\\u{code:04x}"),
                    _ => write!(printed, "\\U{code:08x}"),
                };
            }
        }
    }
    printed.push(quote);
    printed
}

/// Python's `str.isprintable` for one character.
pub fn is_printable(c: char) -> bool {
    // Rust's own escaping leaves the same characters as they are where they don't begin the text.
    (' '..='~').contains(&c)
        || (!c.is_ascii() && !format!("{:?}", String::from_iter(['a', c])).contains('\\'))
}
