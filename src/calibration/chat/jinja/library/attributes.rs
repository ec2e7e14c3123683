//! `value.name` and `value[key]`.

use std::collections::VecDeque;

use crate::calibration::chat::jinja::meter::{Meter, Outcome, fail};
use crate::calibration::chat::jinja::values::operators::position;
use crate::calibration::chat::jinja::values::value::{Items, Value, View};

const TEXT: &[&str] = &[
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const LIST: &[&str] = &["copy", "count", "index"];
const TUPLE: &[&str] = &["count", "index"];
const DICT: &[&str] = &["copy", "fromkeys", "get", "items", "keys", "values"];
const INT: &[&str] = &["as_integer_ratio", "bit_count", "bit_length", "conjugate", "is_integer"];
const FLOAT: &[&str] = &["as_integer_ratio", "conjugate", "hex", "is_integer"];

/// Methods that the sandbox hides because they change a value.
const LIST_CHANGES: &[&str] = &["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const DICT_CHANGES: &[&str] = &["clear", "pop", "popitem", "setdefault", "update"];

/// An attribute that Python itself gives a value: a method, mostly.
fn own(value: &Value, name: &str, meter: &Meter) -> Outcome<Option<Value>> {
    if name.starts_with("__") && name.ends_with("__") {
        return Ok(Some(Value::undefined(format!("the attribute {name} is unsafe"))));
    }
    let (methods, changes): (&[&str], &[&str]) = match value {
        Value::Text(_) => (TEXT, &[]),
        Value::List(_) => (LIST, LIST_CHANGES),
        Value::Tuple(_) | Value::Range(_) => (TUPLE, &[]),
        Value::Dict(_) => (DICT, DICT_CHANGES),
        Value::Int(_) | Value::Bool(_) => (INT, &[]),
        Value::Float(_) => (FLOAT, &[]),
        Value::Loop(_) => (&["cycle", "changed"], &[]),
        Value::Cycler(_) => (&["next", "reset"], &[]),
        _ => (&[], &[]),
    };
    if methods.contains(&name) {
        return Ok(Some(Value::method(value, name)));
    }
    if changes.contains(&name) {
        return Ok(Some(Value::undefined(format!(
            "the method {name} is unsafe, because it changes a value"
        ))));
    }
    Ok(match (value, name) {
        (Value::Int(_) | Value::Float(_), "real") => Some(value.clone()),
        (Value::Int(_), "numerator") => Some(value.clone()),
        (Value::Int(_), "denominator") => Some(Value::Int(1)),
        (Value::Int(_), "imag") => Some(Value::Int(0)),
        (Value::Float(_), "imag") => Some(Value::Float(0.0)),
        (Value::Range(range), "start") => Some(Value::Int(range.start)),
        (Value::Range(range), "stop") => Some(Value::Int(range.stop)),
        (Value::Range(range), "step") => Some(Value::Int(range.step)),
        (Value::Namespace(namespace), name) => namespace.attributes.borrow().get(name).cloned(),
        (Value::Cycler(cycler), "current") => Some(cycler.items[cycler.at.get()].clone()),
        (Value::Cycler(cycler), "pos") => Some(Value::Int(cycler.at.get() as i128)),
        (Value::Macro(it), "name") => Some(Value::Text(it.code.name.clone())),
        (Value::Macro(it), "arguments") => {
            let names = it.code.parameters.iter().map(|(name, _)| Value::Text(name.clone()));
            Some(Value::tuple(names.collect(), meter)?)
        }
        (Value::Macro(it), "catch_kwargs") => Some(Value::Bool(it.code.kwargs)),
        (Value::Macro(it), "catch_varargs") => Some(Value::Bool(it.code.varargs)),
        (Value::Macro(it), "caller") => Some(Value::Bool(it.code.caller)),
        _ => None,
    })
}

/// What a key stands for; nothing where it is not there.
fn entry(value: &Value, key: &Value, meter: &Meter) -> Outcome<Option<Value>> {
    let at = |items: &Items| {
        let index = key.as_int().ok()?;
        position(index, items.list.len()).map(|at| items.list[at].clone())
    };
    Ok(match value {
        Value::Dict(dict) => match dict.get(key, meter) {
            Ok(found) => found.cloned(),
            // What can't be a key is not there.
            Err(fault) if fault.limit => return Err(fault),
            Err(_) => None,
        },
        Value::List(items) | Value::Tuple(items) => at(items),
        Value::Text(text) => match key.as_int() {
            Ok(index) => {
                let at = position(index, value.len(meter)?);
                at.and_then(|at| text.chars().nth(at)).map(|c| Value::Text(c.encode_utf8(&mut [0; 4]).into()))
            }
            Err(_) => None,
        },
        Value::Range(range) => key
            .as_int()
            .ok()
            .and_then(|index| position(index, range.len()))
            .map(|at| Value::Int(range.at(at))),
        _ => None,
    })
}

fn undefined_has_none(value: &Value) -> Outcome<()> {
    match value {
        Value::Undefined(what) => fail(what.to_string()),
        _ => Ok(()),
    }
}

/// `value.name`: what Python gives the value first, then what stands in it.
pub fn attribute(value: &Value, name: &str, meter: &Meter) -> Outcome<Value> {
    undefined_has_none(value)?;
    if let Some(found) = own(value, name, meter)? {
        return Ok(found);
    }
    let found = entry(value, &Value::Text(name.into()), meter)?;
    Ok(found.unwrap_or_else(|| missing(value, &format!("{name:?}"))))
}

/// `value[key]`: what stands in the value first, then what Python gives it.
pub fn item(value: &Value, key: &Value, meter: &Meter) -> Outcome<Value> {
    undefined_has_none(value)?;
    if let Some(found) = entry(value, key, meter)? {
        return Ok(found);
    }
    let Value::Text(name) = key else {
        return Ok(missing(value, &crate::calibration::chat::jinja::values::print::string(key, meter)?));
    };
    let found = own(value, name, meter)?;
    Ok(found.unwrap_or_else(|| missing(value, &format!("{name:?}"))))
}

fn missing(value: &Value, what: &str) -> Value {
    Value::undefined(format!("a value of type {} has no {what}", value.type_name()))
}

/// What a path such as `function.name` or `0.name` leads to, as filters' `attribute` has it.
pub fn path(value: &Value, path: &Value, meter: &Meter) -> Outcome<Value> {
    let Value::Text(text) = path else { return item(value, path, meter) };
    let mut value = value.clone();
    for part in text.split('.') {
        let key = match part.parse() {
            Ok(index) if part.bytes().all(|b| b.is_ascii_digit()) => Value::Int(index),
            _ => Value::text(part, meter)?,
        };
        value = item(&value, &key, meter)?;
    }
    Ok(value)
}

/// A dict's view.
pub fn view(value: &Value, view: View) -> Option<Value> {
    match value {
        Value::Dict(dict) => Some(Value::View(view, dict.clone())),
        _ => None,
    }
}

/// Items in reverse.
pub fn reversed(items: Vec<Value>) -> VecDeque<Value> {
    items.into_iter().rev().collect()
}
