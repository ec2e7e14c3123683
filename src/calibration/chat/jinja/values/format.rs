//! Python's two ways of formatting: `'%s' % value` and `'{}'.format(value)`.

use super::print::{float, literal, string};
use super::value::Value;
use crate::calibration::chat::jinja::library::arguments::Arguments;
use crate::calibration::chat::jinja::library::attributes::{attribute, item};
use crate::calibration::chat::jinja::meter::{Fault, Meter, Outcome, fail};

/// Wider fields and longer fractions are no text for a model.
const WIDEST: usize = 1 << 20;

/// How one value is to look.
#[derive(Clone, Default)]
struct Spec {
    /// What a field is filled with; none for spaces.
    fill: Option<char>,
    /// `<`, `>`, `^`, `=`, or none for what suits the type.
    align: Option<char>,
    /// `+`, a space, or none for minus signs alone.
    sign: Option<char>,
    alternate: bool,
    width: usize,
    /// What groups of digits are separated by.
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// Reads a format from left to right.
struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn next_if(&mut self, wanted: impl Fn(char) -> bool) -> Option<char> {
        let next = self.rest.chars().next().filter(|c| wanted(*c))?;
        self.rest = &self.rest[next.len_utf8()..];
        Some(next)
    }

    fn skip(&mut self, wanted: char) -> bool {
        self.next_if(|c| c == wanted).is_some()
    }

    fn until(&mut self, end: impl Fn(char) -> bool) -> &'a str {
        let (before, rest) = self.rest.split_at(self.rest.find(end).unwrap_or(self.rest.len()));
        self.rest = rest;
        before
    }

    /// A number, if there is one.
    fn number(&mut self) -> Outcome<Option<usize>> {
        let digits = self.until(|c| !c.is_ascii_digit());
        if digits.is_empty() { Ok(None) } else { sized(digits.parse().unwrap_or(i128::MAX)).map(Some) }
    }
}

fn sized(number: i128) -> Outcome<usize> {
    match usize::try_from(number) {
        Ok(number) if number <= WIDEST => Ok(number),
        _ => fail("a field of a format is too wide"),
    }
}

/// The values of a format with `%`.
struct Values<'a> {
    all: &'a Value,
    left: std::collections::VecDeque<Value>,
}

impl Values<'_> {
    fn next(&mut self) -> Outcome<Value> {
        self.left.pop_front().ok_or_else(|| Fault::new("a format has more fields than values"))
    }

    fn number(&mut self, format: &mut Reader) -> Outcome<Option<i128>> {
        if format.skip('*') {
            return self.next()?.as_int().map(Some);
        }
        Ok(format.number()?.map(|number| number as i128))
    }
}

/// `'…' % values`
pub fn percent(format: &str, values: &Value, meter: &Meter) -> Outcome<String> {
    let left = match values {
        Value::Tuple(items) => items.list.iter().cloned().collect(),
        other => [other.clone()].into(),
    };
    let mut values = Values { all: values, left };
    let mut format = Reader { rest: format };
    let mut formatted = String::new();
    loop {
        let text = format.until(|c| c == '%');
        meter.take(text.len())?;
        formatted.push_str(text);
        if !format.skip('%') {
            break;
        }
        let field = percent_field(&mut format, &mut values, meter)?;
        meter.take(field.len())?;
        formatted.push_str(&field);
    }
    let unused = !values.left.is_empty() && !matches!(values.all, Value::Dict(_) | Value::List(_));
    if unused { fail("a format has fewer fields than values") } else { Ok(formatted) }
}

fn percent_field(format: &mut Reader, values: &mut Values, meter: &Meter) -> Outcome<String> {
    let mut named = None;
    if format.skip('(') {
        let name = format.until(|c| c == ')');
        format.skip(')');
        let Value::Dict(dict) = values.all else { return fail("a format with names needs a dict") };
        let value = dict.get(&Value::text(name, meter)?, meter)?;
        named = Some(
            value.cloned().ok_or_else(|| Fault::new(format!("a format's {name:?} is not in the dict")))?,
        );
        values.left.clear();
    }
    let mut spec = Spec::default();
    while let Some(flag) = format.next_if(|c| "#0- +".contains(c)) {
        match flag {
            '#' => spec.alternate = true,
            '0' => spec.fill = Some('0'),
            '-' => spec.align = Some('<'),
            '+' => spec.sign = Some('+'),
            _ => spec.sign = spec.sign.or(Some(' ')),
        }
    }
    if let Some(width) = values.number(format)? {
        if width < 0 {
            spec.align = Some('<');
        }
        spec.width = sized(width.saturating_abs())?;
    }
    if format.skip('.') {
        spec.precision = Some(sized(values.number(format)?.unwrap_or(0).max(0))?);
    }
    format.next_if(|c| "hlL".contains(c));
    let Some(kind) = format.next_if(|_| true) else { return fail("a format ends inside a field") };
    if kind == '%' {
        return Ok("%".into());
    }
    let value = match named {
        Some(value) => value,
        None => values.next()?,
    };
    let numeric = matches!(kind, 'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G');
    if spec.align.is_some() || !numeric {
        spec.fill = None;
    }
    let align = spec.align.unwrap_or(if spec.fill.is_some() { '=' } else { '>' });
    spec.align = Some(align);
    spec.kind = Some(kind);
    match kind {
        's' => Ok(padded(cut(string(&value, meter)?, &spec), &spec)),
        'r' | 'a' => Ok(padded(cut(printed(&value, kind, meter)?, &spec), &spec)),
        'c' => match &value {
            Value::Text(text) if text.chars().count() == 1 => Ok(padded(text.to_string(), &spec)),
            number => Ok(padded(character(number.as_int()?)?, &spec)),
        },
        'd' | 'i' | 'u' => match value {
            Value::Float(value) if value.is_finite() => integer(value as i128, &spec),
            value => integer(value.as_int()?, &spec),
        },
        'x' | 'X' | 'o' => integer(value.as_int()?, &spec),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => fraction(number(&value)?, &spec),
        other => fail(format!("a format has the unknown type '{other}'")),
    }
}

fn number(value: &Value) -> Outcome<f64> {
    match value {
        Value::Float(value) => Ok(*value),
        other => other.as_int().map(|value| value as f64),
    }
}

fn character(code: i128) -> Outcome<String> {
    let c = u32::try_from(code).ok().and_then(char::from_u32);
    c.map(String::from).ok_or_else(|| Fault::new("a format's number is no character"))
}

/// `repr`, or `ascii`, which escapes what is not ASCII.
fn printed(value: &Value, kind: char, meter: &Meter) -> Outcome<String> {
    let mut printed = String::new();
    literal(value, &mut printed, meter)?;
    if kind == 'a' && !printed.is_ascii() {
        return fail("a format asks for ASCII, the text is not");
    }
    Ok(printed)
}

fn cut(text: String, spec: &Spec) -> String {
    match spec.precision {
        Some(length) => text.chars().take(length).collect(),
        None => text,
    }
}

/// Text in a field's width.
fn padded(text: String, spec: &Spec) -> String {
    let missing = spec.width.saturating_sub(text.chars().count());
    let (left, right) = match spec.align {
        Some('>' | '=') => (missing, 0),
        Some('^') => (missing / 2, missing - missing / 2),
        _ => (0, missing),
    };
    let pad = |count| std::iter::repeat_n(spec.fill.unwrap_or(' '), count);
    pad(left).chain(text.chars()).chain(pad(right)).collect()
}

/// A number's sign and digits in a field's width.
fn assembled(negative: bool, prefix: &str, digits: &str, spec: &Spec) -> String {
    let sign = match spec.sign {
        _ if negative => "-",
        Some('+') => "+",
        Some(' ') => " ",
        _ => "",
    };
    let head = format!("{sign}{prefix}");
    let digits = match spec.grouping {
        Some(separator) => {
            grouped(digits, separator, if matches!(spec.kind, Some('x' | 'X' | 'o' | 'b')) { 4 } else { 3 })
        }
        None => digits.to_string(),
    };
    if spec.align == Some('=') {
        let missing = spec.width.saturating_sub(head.chars().count() + digits.chars().count());
        let fill: String = std::iter::repeat_n(spec.fill.unwrap_or(' '), missing).collect();
        return head + &fill + &digits;
    }
    padded(head + &digits, &Spec { align: spec.align.or(Some('>')), ..spec.clone() })
}

fn grouped(digits: &str, separator: char, size: usize) -> String {
    let whole = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
    let mut grouped = String::new();
    for (at, digit) in digits[..whole].char_indices() {
        if at > 0 && (whole - at).is_multiple_of(size) {
            grouped.push(separator);
        }
        grouped.push(digit);
    }
    grouped + &digits[whole..]
}

fn integer(value: i128, spec: &Spec) -> Outcome<String> {
    let magnitude = value.unsigned_abs();
    let (prefix, mut digits) = match spec.kind {
        Some('x') => ("0x", format!("{magnitude:x}")),
        Some('X') => ("0X", format!("{magnitude:X}")),
        Some('o') => ("0o", format!("{magnitude:o}")),
        Some('b') => ("0b", format!("{magnitude:b}")),
        _ => ("", magnitude.to_string()),
    };
    // Only `%` has a precision here: the least number of digits.
    if let Some(least) = spec.precision {
        digits = "0".repeat(least.saturating_sub(digits.len())) + &digits;
    }
    Ok(assembled(value < 0, if spec.alternate { prefix } else { "" }, &digits, spec))
}

fn fraction(value: f64, spec: &Spec) -> Outcome<String> {
    let magnitude = value.abs();
    let kind = spec.kind.unwrap_or('g');
    let precision = spec.precision.unwrap_or(6);
    let digits = if !magnitude.is_finite() {
        if magnitude.is_nan() { "nan".to_string() } else { "inf".into() }
    } else {
        match kind.to_ascii_lowercase() {
            'e' => exponent(magnitude, precision),
            'f' => format!("{magnitude:.precision$}"),
            '%' => format!("{:.precision$}%", magnitude * 100.0),
            _ => general(magnitude, precision.max(1), spec.alternate),
        }
    };
    let digits = if kind.is_ascii_uppercase() { digits.to_uppercase() } else { digits };
    Ok(assembled(value.is_sign_negative() && !value.is_nan(), "", &digits, spec))
}

fn exponent(magnitude: f64, precision: usize) -> String {
    let printed = format!("{magnitude:.precision$e}");
    let (digits, exponent) = printed.split_once('e').expect("scientific notation");
    let exponent: i32 = exponent.parse().expect("an exponent is an integer");
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// Significant digits, in whichever notation is shorter.
fn general(magnitude: f64, precision: usize, keep_zeros: bool) -> String {
    let scientific = exponent(magnitude, precision - 1);
    let (digits, power) = scientific.split_once('e').expect("scientific notation");
    let power: i64 = power.parse().expect("an exponent is an integer");
    let trimmed = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => digits.to_string(),
    };
    if (-4..precision as i64).contains(&power) {
        let places = (precision as i64 - 1 - power).max(0) as usize;
        trimmed(&format!("{magnitude:.places$}"))
    } else {
        format!("{}e{}", trimmed(digits), scientific.split_once('e').expect("just split").1)
    }
}

/// `'…'.format(…)`
pub fn braces(format: &str, arguments: &Arguments, meter: &Meter) -> Outcome<String> {
    Braces { arguments, meter, automatic: 0, manual: false }.format(format, 2)
}

struct Braces<'a> {
    arguments: &'a Arguments,
    meter: &'a Meter,
    /// Fields without a number so far.
    automatic: usize,
    /// A field had a number.
    manual: bool,
}

impl Braces<'_> {
    fn format(&mut self, format: &str, levels: usize) -> Outcome<String> {
        if levels == 0 {
            return fail("a format's fields are nested too deeply");
        }
        let mut format = Reader { rest: format };
        let mut formatted = String::new();
        loop {
            let text = format.until(|c| c == '{' || c == '}');
            self.meter.take(text.len())?;
            formatted.push_str(text);
            let Some(brace) = format.next_if(|_| true) else { return Ok(formatted) };
            if format.skip(brace) {
                formatted.push(brace);
            } else if brace == '}' {
                return fail("a format has a single '}'");
            } else {
                let field = self.field(&mut format, levels)?;
                self.meter.take(field.len())?;
                formatted.push_str(&field);
            }
        }
    }

    fn field(&mut self, format: &mut Reader, levels: usize) -> Outcome<String> {
        // A field's end is the brace that closes it; its own specification may hold fields.
        let mut open = 1;
        let end = format.rest.find(|c| {
            open += match c {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            open == 0
        });
        let Some(end) = end else { return fail("a format has a single '{'") };
        let mut field = Reader { rest: &format.rest[..end] };
        format.rest = &format.rest[end + 1..];
        let mut value = self.value(&mut field)?;
        if field.skip('!') {
            value = match field.next_if(|_| true) {
                Some('s') => Value::text(string(&value, self.meter)?, self.meter)?,
                Some(kind @ ('r' | 'a')) => Value::text(printed(&value, kind, self.meter)?, self.meter)?,
                _ => return fail("a format has an unknown conversion"),
            };
        }
        if !field.skip(':') {
            return if field.rest.is_empty() {
                string(&value, self.meter)
            } else {
                fail("a format's field is wrong")
            };
        }
        let spec = self.format(field.rest, levels - 1)?;
        self.spec(&value, &spec)
    }

    fn value(&mut self, field: &mut Reader) -> Outcome<Value> {
        let name = field.until(|c| ".[!:".contains(c));
        let found = if name.is_empty() || name.bytes().all(|b| b.is_ascii_digit()) {
            self.manual |= !name.is_empty();
            if self.manual && (name.is_empty() || self.automatic > 0) {
                return fail("a format mixes fields with numbers and without");
            }
            let index = if name.is_empty() { self.automatic } else { name.parse().unwrap_or(usize::MAX) };
            self.automatic += usize::from(name.is_empty());
            self.arguments.positional.get(index)
        } else {
            self.arguments.named.iter().find(|(known, _)| &**known == name).map(|(_, value)| value)
        };
        let mut value =
            found.cloned().ok_or_else(|| Fault::new(format!("a format's field {name:?} has no value")))?;
        loop {
            if field.skip('.') {
                let name = field.until(|c| ".[!:".contains(c));
                value = attribute(&value, name, self.meter)?;
            } else if field.skip('[') {
                let name = field.until(|c| c == ']');
                field.skip(']');
                let index = match name.parse() {
                    Ok(number) => Value::Int(number),
                    Err(_) => Value::text(name, self.meter)?,
                };
                value = item(&value, &index, self.meter)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn spec(&self, value: &Value, text: &str) -> Outcome<String> {
        if text.is_empty() {
            return string(value, self.meter);
        }
        let mut spec = Spec::default();
        let mut reader = Reader { rest: text };
        let mut first = text.chars();
        let (fill, align) = (first.next(), first.next());
        if align.is_some_and(|c| "<>=^".contains(c)) {
            (spec.fill, spec.align) = (fill, align);
            reader.rest = first.as_str();
        } else {
            spec.align = reader.next_if(|c| "<>=^".contains(c));
        }
        spec.sign = reader.next_if(|c| "+- ".contains(c));
        spec.alternate = reader.skip('#');
        if reader.skip('0') && spec.fill.is_none() {
            spec.fill = Some('0');
            spec.align = spec.align.or(if matches!(value, Value::Text(_)) { None } else { Some('=') });
        }
        spec.width = reader.number()?.unwrap_or(0);
        spec.grouping = reader.next_if(|c| ",_".contains(c));
        if reader.skip('.') {
            let Some(precision) = reader.number()? else { return fail("a format's precision is missing") };
            spec.precision = Some(precision);
        }
        spec.kind = reader.next_if(|_| true);
        if !reader.rest.is_empty() {
            return fail("a format's specification is wrong");
        }
        self.formatted(value, spec)
    }

    fn formatted(&self, value: &Value, spec: Spec) -> Outcome<String> {
        let wrong = || {
            let kind = spec.kind.map_or(String::new(), |kind| format!(" '{kind}'"));
            fail(format!("a format's type{kind} does not suit a value of type {}", value.type_name()))
        };
        match (value, spec.kind) {
            (Value::Text(text), None | Some('s')) => Ok(padded(cut(text.to_string(), &spec), &spec)),
            (Value::Int(_), Some('c')) => Ok(padded(character(value.as_int()?)?, &spec)),
            (Value::Int(_), None | Some('d' | 'x' | 'X' | 'o' | 'b' | 'n'))
            | (Value::Bool(_), Some('d' | 'x' | 'X' | 'o' | 'b' | 'n')) => integer(value.as_int()?, &spec),
            (Value::Bool(_), None) => {
                Ok(padded(string(value, self.meter)?, &Spec { align: spec.align.or(Some('>')), ..spec }))
            }
            (
                Value::Int(_) | Value::Bool(_) | Value::Float(_),
                Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%'),
            ) => fraction(number(value)?, &spec),
            (Value::Float(number), None) if spec.precision.is_none() => {
                Ok(assembled(number.is_sign_negative(), "", &float(number.abs()), &spec))
            }
            (Value::Float(number), None | Some('n')) => fraction(*number, &spec),
            _ => wrong(),
        }
    }
}
