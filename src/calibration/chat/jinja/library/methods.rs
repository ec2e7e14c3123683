//! Methods of Python's types.

use super::arguments::{Arguments, Bound};
use super::attributes::view;
use crate::calibration::chat::jinja::meter::{Fault, Meter, Outcome, fail};
use crate::calibration::chat::jinja::values::format::braces;
use crate::calibration::chat::jinja::values::operators::equal;
use crate::calibration::chat::jinja::values::print::is_printable;
use crate::calibration::chat::jinja::values::strings::{
    capitalize, centered, is_space, lines, split, swap_case, title,
};
use crate::calibration::chat::jinja::values::value::{Dict, SLOT, Value, View};

/// Calls a method.
pub fn call(value: &Value, name: &str, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    let unsupported = || fail(format!("the method {name} of type {} is not supported", value.type_name()));
    match value {
        Value::Text(text) => {
            meter.work(text.len())?;
            match text_method(text, name, arguments, meter)? {
                Some(result) => Ok(result),
                None => unsupported(),
            }
        }
        Value::Dict(dict) => match name {
            "keys" | "values" | "items" => {
                arguments.bind(0, [])?;
                let kind = match name {
                    "keys" => View::Keys,
                    "values" => View::Values,
                    _ => View::Items,
                };
                Ok(view(value, kind).expect("it is a dict"))
            }
            "get" => {
                let bound = arguments.bind(1, ["/key", "/default"])?;
                let found = dict.get(bound.get(0).expect("needed"), meter)?;
                Ok(found.or(bound.get(1)).cloned().unwrap_or(Value::None))
            }
            "copy" => {
                arguments.bind(0, [])?;
                let mut copy = Dict::default();
                for (key, value) in dict.entries.values() {
                    copy.insert(key.clone(), value.clone(), meter)?;
                }
                Ok(copy.into())
            }
            _ => unsupported(),
        },
        Value::List(items) | Value::Tuple(items) => match name {
            "count" => {
                let bound = arguments.bind(1, ["/value"])?;
                let mut count = 0;
                for item in &items.list {
                    count += i128::from(equal(item, bound.get(0).expect("needed"), meter)?);
                }
                Ok(Value::Int(count))
            }
            "index" => {
                let bound = arguments.bind(1, ["/value"])?;
                for (at, item) in items.list.iter().enumerate() {
                    if equal(item, bound.get(0).expect("needed"), meter)? {
                        return Ok(Value::Int(at as i128));
                    }
                }
                fail("the value is not in the list")
            }
            "copy" => Value::list(items.list.clone(), meter),
            _ => unsupported(),
        },
        Value::Int(number) => match name {
            "bit_length" => Ok(Value::Int((128 - number.unsigned_abs().leading_zeros()).into())),
            "is_integer" => Ok(Value::Bool(true)),
            "conjugate" => Ok(value.clone()),
            _ => unsupported(),
        },
        Value::Float(number) => match name {
            "is_integer" => Ok(Value::Bool(number.fract() == 0.0)),
            "conjugate" => Ok(value.clone()),
            _ => unsupported(),
        },
        Value::Loop(it) => match name {
            "cycle" if !arguments.positional.is_empty() => {
                Ok(arguments.positional[it.index0.get() % arguments.positional.len()].clone())
            }
            "cycle" => fail("a loop's cycle needs items"),
            _ => {
                let now = arguments.positional.clone();
                let before = it.seen.replace(Some(now.clone()));
                let Some(before) = before else { return Ok(Value::Bool(true)) };
                let same = equal(&Value::list(before, meter)?, &Value::list(now, meter)?, meter)?;
                Ok(Value::Bool(!same))
            }
        },
        Value::Cycler(cycler) => {
            let at = cycler.at.get();
            let next = if name == "next" { (at + 1) % cycler.items.len() } else { 0 };
            cycler.at.set(next);
            Ok(if name == "next" { cycler.items[at].clone() } else { Value::None })
        }
        _ => unsupported(),
    }
}

/// Whether there are letters of one case and none of the other.
pub fn cased(text: &str, wanted: fn(char) -> bool, unwanted: fn(char) -> bool) -> bool {
    text.chars().any(wanted) && !text.chars().any(unwanted)
}

fn text_method(text: &str, name: &str, arguments: &Arguments, meter: &Meter) -> Outcome<Option<Value>> {
    let none = || arguments.bind(0, []).map(|_| ());
    let all = |is: fn(char) -> bool| Value::Bool(!text.is_empty() && text.chars().all(is));
    let result = match name {
        "format" => Value::text(braces(text, arguments, meter)?, meter)?,
        "format_map" => {
            let bound = arguments.bind(1, ["/mapping"])?;
            let Some(Value::Dict(dict)) = bound.get(0) else { return fail("format_map needs a dict") };
            let named = dict.entries.values().map(|(key, value)| Ok((key.as_text()?.clone(), value.clone())));
            let arguments = Arguments { positional: Vec::new(), named: named.collect::<Outcome<_>>()? };
            Value::text(braces(text, &arguments, meter)?, meter)?
        }
        "strip" | "lstrip" | "rstrip" => {
            let bound = arguments.bind(0, ["/chars"])?;
            let chars = bound.text(0)?;
            Value::text(
                stripped(text, chars.map(|chars| &**chars), name != "rstrip", name != "lstrip"),
                meter,
            )?
        }
        "split" | "rsplit" => {
            let bound = arguments.bind(0, ["sep", "maxsplit"])?;
            let separator = bound.text(0)?.map(|text| &**text);
            if separator == Some("") {
                return fail("the separator to split by is empty");
            }
            let limit = bound.int(1)?.and_then(|limit| usize::try_from(limit).ok());
            let places = match separator {
                Some(separator) => text.matches(separator).count(),
                None => text.chars().filter(|c| is_space(*c)).count(),
            };
            meter.take(places * SLOT)?;
            let parts = split(text, separator, limit, name == "rsplit");
            texts(&parts, meter)?
        }
        "splitlines" => {
            let bound = arguments.bind(0, ["keepends"])?;
            meter.take(text.chars().filter(|c| is_space(*c)).count() * SLOT)?;
            texts(&lines(text, bound.flag(0)), meter)?
        }
        "partition" | "rpartition" => {
            let bound = arguments.bind(1, ["/sep"])?;
            let separator = bound.get(0).expect("needed").as_text()?;
            if separator.is_empty() {
                return fail("the separator to split by is empty");
            }
            let found = if name == "partition" { text.find(&**separator) } else { text.rfind(&**separator) };
            let parts = match found {
                Some(at) => [&text[..at], separator, &text[at + separator.len()..]],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            let parts = parts.iter().map(|part| Value::text(part, meter));
            Value::tuple(parts.collect::<Outcome<_>>()?, meter)?
        }
        "replace" => {
            let bound = arguments.bind(2, ["/old", "/new", "count"])?;
            let (old, new) =
                (bound.get(0).expect("needed").as_text()?, bound.get(1).expect("needed").as_text()?);
            Value::text(replaced(text, old, new, bound.int(2)?, meter)?, meter)?
        }
        "join" => {
            let bound = arguments.bind(1, ["/iterable"])?;
            let mut joined = String::new();
            for (at, item) in bound.get(0).expect("needed").items(meter)?.iter().enumerate() {
                let item = item.as_text()?;
                let separator = if at > 0 { text } else { "" };
                meter.take(separator.len() + item.len())?;
                joined.push_str(separator);
                joined.push_str(item);
            }
            Value::text(joined, meter)?
        }
        "startswith" | "endswith" => {
            let bound = arguments.bind(1, ["/affix", "/start", "/end"])?;
            let (part, _) = range(text, &bound)?;
            let Some(part) = part else { return Ok(Some(Value::Bool(false))) };
            let holds = |affix: &Value| -> Outcome<bool> {
                let affix = &**affix.as_text()?;
                Ok(if name == "startswith" { part.starts_with(affix) } else { part.ends_with(affix) })
            };
            Value::Bool(match bound.get(0).expect("needed") {
                Value::Tuple(affixes) => {
                    let mut any = false;
                    for affix in &affixes.list {
                        any |= holds(affix)?;
                    }
                    any
                }
                affix => holds(affix)?,
            })
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let bound = arguments.bind(1, ["/sub", "/start", "/end"])?;
            let sought = &**bound.get(0).expect("needed").as_text()?;
            let (part, before) = range(text, &bound)?;
            let part =
                part.filter(|part| name != "count" || !(part.is_empty() && sought.is_empty() && before > 0));
            let Some(part) = part else {
                return match name {
                    "count" => Ok(Some(Value::Int(0))),
                    "find" | "rfind" => Ok(Some(Value::Int(-1))),
                    _ => fail("the text to find is not there"),
                };
            };
            if name == "count" {
                return Ok(Some(Value::Int(part.matches(sought).count() as i128)));
            }
            let found = if name.starts_with('r') { part.rfind(sought) } else { part.find(sought) };
            match found {
                Some(at) => Value::Int((before + part[..at].chars().count()) as i128),
                None if name.ends_with("find") => Value::Int(-1),
                None => return fail("the text to find is not there"),
            }
        }
        "removeprefix" | "removesuffix" => {
            let bound = arguments.bind(1, ["/affix"])?;
            let affix = &**bound.get(0).expect("needed").as_text()?;
            let shorter =
                if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            Value::text(shorter.unwrap_or(text), meter)?
        }
        "center" | "ljust" | "rjust" => {
            let bound = arguments.bind(1, ["/width", "/fillchar"])?;
            let width = usize::try_from(bound.get(0).expect("needed").as_int()?).unwrap_or(0);
            let fill = match bound.text(1)?.map(|text| text.chars().collect::<Vec<_>>()).as_deref() {
                None => ' ',
                Some([fill]) => *fill,
                Some(_) => return fail("text is padded with one character"),
            };
            meter.take(width.saturating_mul(fill.len_utf8()))?;
            let missing = width.saturating_sub(text.chars().count());
            let pad: String = std::iter::repeat_n(fill, missing).collect();
            match name {
                "center" => Value::text(centered(text, width, fill), meter)?,
                "ljust" => Value::text(text.to_string() + &pad, meter)?,
                _ => Value::text(pad + text, meter)?,
            }
        }
        "zfill" => {
            let bound = arguments.bind(1, ["/width"])?;
            let width = usize::try_from(bound.get(0).expect("needed").as_int()?).unwrap_or(0);
            meter.take(width)?;
            let zeros = "0".repeat(width.saturating_sub(text.chars().count()));
            let sign = text.len() - text.trim_start_matches(['+', '-']).len();
            let (sign, digits) = text.split_at(sign.min(1));
            Value::text(format!("{sign}{zeros}{digits}"), meter)?
        }
        "expandtabs" => {
            let bound = arguments.bind(0, ["tabsize"])?;
            let size = usize::try_from(bound.int(0)?.unwrap_or(8)).unwrap_or(0);
            let mut expanded = String::new();
            let mut column = 0;
            for c in text.chars() {
                match c {
                    '\t' if size > 0 => {
                        let missing = size - column % size;
                        meter.take(missing)?;
                        expanded.extend(std::iter::repeat_n(' ', missing));
                        column += missing;
                    }
                    '\t' => {}
                    c => {
                        column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                        expanded.push(c);
                    }
                }
            }
            Value::text(expanded, meter)?
        }
        _ => {
            let result = match name {
                "upper" => Value::text(text.to_uppercase(), meter)?,
                "lower" => Value::text(text.to_lowercase(), meter)?,
                "casefold" => Value::text(text.to_lowercase().replace('ß', "ss").replace('ς', "σ"), meter)?,
                "title" => Value::text(title(text), meter)?,
                "capitalize" => Value::text(capitalize(text), meter)?,
                "swapcase" => Value::text(swap_case(text), meter)?,
                "isupper" => Value::Bool(cased(text, char::is_uppercase, char::is_lowercase)),
                "islower" => Value::Bool(cased(text, char::is_lowercase, char::is_uppercase)),
                "istitle" => Value::Bool(
                    text.chars().any(|c| c.is_uppercase() || c.is_lowercase()) && title(text) == *text,
                ),
                "isspace" => all(is_space),
                "isalpha" => all(char::is_alphabetic),
                "isalnum" => all(char::is_alphanumeric),
                "isnumeric" => all(char::is_numeric),
                "isdecimal" => all(is_decimal),
                "isdigit" => {
                    all(|c| is_decimal(c) || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉'))
                }
                "isascii" => Value::Bool(text.is_ascii()),
                "isprintable" => Value::Bool(text.chars().all(is_printable)),
                "isidentifier" => Value::Bool(
                    text.starts_with(|c: char| c == '_' || c.is_alphabetic())
                        && text.chars().all(|c| c == '_' || c.is_alphanumeric()),
                ),
                _ => return Ok(None),
            };
            none()?;
            result
        }
    };
    Ok(Some(result))
}

/// A digit of a decimal number, in any script: blocks of ten that begin with a multiple of their zero.
fn is_decimal(c: char) -> bool {
    c.is_ascii_digit()
        || matches!(c as u32, 0x660..=0x669 | 0x6F0..=0x6F9 | 0x7C0..=0x7C9 | 0x966..=0x96F | 0x9E6..=0x9EF
            | 0xA66..=0xA6F | 0xAE6..=0xAEF | 0xB66..=0xB6F | 0xBE6..=0xBEF | 0xC66..=0xC6F | 0xCE6..=0xCEF
            | 0xD66..=0xD6F | 0xE50..=0xE59 | 0xED0..=0xED9 | 0xF20..=0xF29 | 0x1040..=0x1049 | 0xFF10..=0xFF19)
}

fn texts(parts: &[&str], meter: &Meter) -> Outcome<Value> {
    Value::list(parts.iter().map(|part| Value::text(part, meter)).collect::<Outcome<_>>()?, meter)
}

/// Without white space, or without these characters, on the sides named.
pub fn stripped<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(goes) } else { text };
    if right { text.trim_end_matches(goes) } else { text }
}

/// Text with parts of it replaced; a negative count replaces all.
pub fn replaced(text: &str, old: &str, new: &str, count: Option<i128>, meter: &Meter) -> Outcome<String> {
    let most = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let found = text.matches(old).take(most).count();
    meter.take(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, most))
}

/// The part between `start` and `end`, which are arguments 1 and 2, and the characters before it.
fn range<'a>(text: &'a str, bound: &Bound) -> Outcome<(Option<&'a str>, usize)> {
    let (start, end) = (bound.int(1)?, bound.int(2)?);
    if start.is_none() && end.is_none() {
        return Ok((Some(text), 0));
    }
    let length = text.chars().count() as i128;
    let place = |at: i128| if at < 0 { (at + length).max(0) } else { at };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)).min(length));
    if start > end {
        return Ok((None, 0));
    }
    let byte = |at: i128| text.char_indices().nth(at as usize).map_or(text.len(), |(at, _)| at);
    let part = text.get(byte(start)..byte(end)).ok_or_else(|| Fault::new("a range is out of bounds"))?;
    Ok((Some(part), start as usize))
}
