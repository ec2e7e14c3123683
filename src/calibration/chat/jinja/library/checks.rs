//! `is` tests.

use super::arguments::Arguments;
use super::filters;
use super::methods::cased;
use crate::calibration::chat::jinja::meter::{Fault, Meter, Outcome, fail};
use crate::calibration::chat::jinja::parsing::syntax::{Binary, Comparison};
use crate::calibration::chat::jinja::values::operators::{binary, compare, contains, equal, same};
use crate::calibration::chat::jinja::values::print::string;
use crate::calibration::chat::jinja::values::value::Value;

const NAMES: &[&str] = &[
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Whether a value passes the test of that name.
pub fn check(name: &str, value: &Value, arguments: &Arguments, meter: &Meter) -> Outcome<bool> {
    if !NAMES.contains(&name) {
        return fail(format!("the test '{name}' is unknown"));
    }
    let comparison = match name {
        "eq" | "equalto" | "==" => Some(Comparison::Equal),
        "ne" | "!=" => Some(Comparison::Unequal),
        "lt" | "lessthan" | "<" => Some(Comparison::Less),
        "le" | "<=" => Some(Comparison::LessOrEqual),
        "gt" | "greaterthan" | ">" => Some(Comparison::Greater),
        "ge" | ">=" => Some(Comparison::GreaterOrEqual),
        _ => None,
    };
    if comparison.is_some() || matches!(name, "in" | "divisibleby" | "sameas") {
        let bound = arguments.bind(1, ["other"])?;
        let other = bound.get(0).expect("needed");
        return match (comparison, name) {
            (Some(comparison), _) => compare(comparison, value, other, meter),
            (None, "in") => contains(other, value, meter),
            (None, "sameas") => Ok(same(value, other)),
            _ => has_remainder(value, other, 0, meter),
        };
    }
    arguments.bind(0, [])?;
    let two = Value::Int(2);
    Ok(match name {
        "boolean" => matches!(value, Value::Bool(_)),
        "callable" => matches!(
            value,
            Value::Undefined(_)
                | Value::Macro(_)
                | Value::Method(_)
                | Value::Global(_)
                | Value::Joiner(_)
                | Value::Loop(_)
        ),
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "escaped" => false,
        "even" => has_remainder(value, &two, 0, meter)?,
        "odd" => has_remainder(value, &two, 1, meter)?,
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "filter" => filters::is_known(value.as_text()?),
        "test" => NAMES.contains(&&**value.as_text()?),
        "float" => matches!(value, Value::Float(_)),
        "integer" => matches!(value, Value::Int(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "iterable" => !matches!(
            value,
            Value::None
                | Value::Bool(_)
                | Value::Int(_)
                | Value::Float(_)
                | Value::Namespace(_)
                | Value::Cycler(_)
                | Value::Joiner(_)
                | Value::Macro(_)
                | Value::Method(_)
                | Value::Global(_)
        ),
        "sequence" => matches!(
            value,
            Value::Undefined(_)
                | Value::Text(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
        ),
        "mapping" => matches!(value, Value::Dict(_)),
        "none" => matches!(value, Value::None),
        "string" => matches!(value, Value::Text(_)),
        "lower" => cased(&string(value, meter)?, char::is_lowercase, char::is_uppercase),
        "upper" => cased(&string(value, meter)?, char::is_uppercase, char::is_lowercase),
        _ => return Err(Fault::new(format!("the test '{name}' is not supported"))),
    })
}

fn has_remainder(value: &Value, by: &Value, wanted: i128, meter: &Meter) -> Outcome<bool> {
    equal(&binary(Binary::Remainder, value, by, meter)?, &Value::Int(wanted), meter)
}
