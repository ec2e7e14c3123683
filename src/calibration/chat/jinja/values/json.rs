//! `tojson`: what `json.dumps` writes.

use super::operators::sorted;
use super::print::float;
use super::value::Value;
use crate::calibration::chat::jinja::meter::{Meter, Outcome, fail};

/// The arguments of `json.dumps` that templates use.
pub struct Style {
    /// Escapes whatever is not ASCII.
    pub ascii: bool,
    /// What a level is indented by; none for one line.
    pub indent: Option<String>,
    /// Between items.
    pub comma: String,
    /// Between key and value.
    pub colon: String,
    /// Entries in the order of their keys.
    pub sorted: bool,
}

/// A value as JSON.
pub fn json(value: &Value, style: &Style, meter: &Meter) -> Outcome<String> {
    let mut written = String::new();
    Writer { style, meter, to: &mut written }.value(value, 0)?;
    Ok(written)
}

struct Writer<'a> {
    style: &'a Style,
    meter: &'a Meter,
    to: &'a mut String,
}

impl Writer<'_> {
    fn push(&mut self, part: &str) -> Outcome<()> {
        self.meter.take(part.len())?;
        self.to.push_str(part);
        Ok(())
    }

    fn value(&mut self, value: &Value, level: usize) -> Outcome<()> {
        match value {
            Value::Text(text) => self.text(text),
            Value::List(items) | Value::Tuple(items) => {
                self.items("[", "]", &items.list, level, |writer, item| writer.value(item, level + 1))
            }
            Value::Dict(dict) => {
                let mut entries: Vec<(Value, Value)> = dict.entries.values().cloned().collect();
                self.meter.take(entries.len() * 64)?;
                if self.style.sorted {
                    let pair = |(key, value): (Value, Value)| {
                        Ok((key.clone(), Value::tuple(vec![key, value], self.meter)?))
                    };
                    let keyed = entries.into_iter().map(pair).collect::<Outcome<_>>()?;
                    entries = Vec::new();
                    for entry in sorted(keyed, false, self.meter)? {
                        let Value::Tuple(entry) = entry else { unreachable!("just made") };
                        entries.push((entry.list[0].clone(), entry.list[1].clone()));
                    }
                }
                self.items("{", "}", &entries, level, |writer, (key, value)| {
                    match key {
                        Value::Text(text) => writer.text(text)?,
                        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                            let key = scalar(key).expect("just matched");
                            writer.push(&format!("\"{key}\""))?;
                        }
                        other => return fail(format!("a key of type {} can't be JSON", other.type_name())),
                    }
                    writer.push(&writer.style.colon)?;
                    writer.value(value, level + 1)
                })
            }
            other => match scalar(other) {
                Some(scalar) => self.push(&scalar),
                None => fail(format!("a value of type {} can't be JSON", other.type_name())),
            },
        }
    }

    fn items<T>(
        &mut self,
        open: &str,
        close: &str,
        items: &[T],
        level: usize,
        write: impl Fn(&mut Self, &T) -> Outcome<()>,
    ) -> Outcome<()> {
        self.push(open)?;
        for (at, item) in items.iter().enumerate() {
            if at > 0 {
                self.push(&self.style.comma)?;
            }
            self.line(level + 1)?;
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(level)?;
        }
        self.push(close)
    }

    fn line(&mut self, level: usize) -> Outcome<()> {
        let Some(indent) = &self.style.indent else { return Ok(()) };
        self.push("\n")?;
        self.meter.take(indent.len().saturating_mul(level))?;
        self.to.extend(std::iter::repeat_n(indent.as_str(), level));
        Ok(())
    }

    fn text(&mut self, text: &str) -> Outcome<()> {
        self.meter.take(text.len() + 2)?;
        self.to.push('"');
        for c in text.chars() {
            match c {
                '"' => self.to.push_str("\\\""),
                '\\' => self.to.push_str("\\\\"),
                '\n' => self.to.push_str("\\n"),
                '\r' => self.to.push_str("\\r"),
                '\t' => self.to.push_str("\\t"),
                '\x08' => self.to.push_str("\\b"),
                '\x0C' => self.to.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.push(&format!("\\u{unit:04x}"))?;
                    }
                }
                c => self.to.push(c),
            }
        }
        self.to.push('"');
        Ok(())
    }
}

fn scalar(value: &Value) -> Option<String> {
    Some(match value {
        Value::None => "null".into(),
        Value::Bool(true) => "true".into(),
        Value::Bool(false) => "false".into(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) if value.is_nan() => "NaN".into(),
        Value::Float(value) if value.is_infinite() => {
            if *value > 0.0 { "Infinity" } else { "-Infinity" }.into()
        }
        Value::Float(value) => float(*value),
        _ => return None,
    })
}
