//! Functions that every template has.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::arguments::Arguments;
use super::date::strftime_now;
use crate::calibration::chat::jinja::meter::{Meter, Outcome, fail};
use crate::calibration::chat::jinja::values::print::string;
use crate::calibration::chat::jinja::values::value::{Cycler, Dict, Namespace, Range, Value};

const NAMES: [&str; 8] =
    ["range", "dict", "namespace", "cycler", "joiner", "lipsum", "raise_exception", "strftime_now"];

/// The longest range that the sandbox allows.
const LONGEST_RANGE: usize = 100_000;

/// The function of that name.
pub fn find(name: &str) -> Option<Value> {
    NAMES.iter().find(|known| **known == name).map(|name| Value::Global(name))
}

/// Calls a function by name.
pub fn call(name: &str, arguments: &Arguments, meter: &Meter) -> Outcome<Value> {
    match name {
        "raise_exception" => {
            let bound = arguments.bind(1, ["message"])?;
            fail(string(bound.get(0).expect("needed"), meter)?)
        }
        "strftime_now" => {
            Value::text(strftime_now(arguments.bind(1, ["format"])?.text(0)?.map_or("", |text| text))?, meter)
        }
        "range" => range(arguments),
        "dict" => Ok(entries(arguments, meter)?.into()),
        "namespace" => {
            let dict = entries(arguments, meter)?;
            let mut attributes = indexmap::IndexMap::new();
            for (key, value) in dict.entries.values() {
                attributes.insert(key.as_text()?.clone(), value.clone());
            }
            let depth = Cell::new(dict.depth.max(1));
            Ok(Value::Namespace(Rc::new(Namespace { depth, attributes: RefCell::new(attributes) })))
        }
        "cycler" => match arguments.positional.is_empty() {
            true => fail("a cycler needs items"),
            false => {
                let items = arguments.positional.clone();
                Ok(Value::Cycler(Rc::new(Cycler { items, at: Cell::new(0) })))
            }
        },
        "joiner" => {
            let bound = arguments.bind(0, ["sep"])?;
            let separator = bound.get(0).cloned().unwrap_or(Value::Text(", ".into()));
            Ok(Value::Joiner(Rc::new((separator, Cell::new(false)))))
        }
        _ => fail(format!("{name} gives another result each time")),
    }
}

fn range(arguments: &Arguments) -> Outcome<Value> {
    let bound = arguments.bind(1, ["/start", "/stop", "/step"])?;
    let given = |at: usize| bound.get(at).map(Value::as_int).transpose();
    let (first, second, step) = (given(0)?.unwrap_or(0), given(1)?, given(2)?.unwrap_or(1));
    let (start, stop) = second.map_or((0, first), |stop| (first, stop));
    if step == 0 {
        return fail("a range's step is zero");
    }
    let range = Range { start, stop, step };
    if range.len() > LONGEST_RANGE {
        return fail(format!("a range has more than {LONGEST_RANGE} numbers"));
    }
    Ok(Value::Range(range))
}

/// The entries that `dict(…)` would have.
fn entries(arguments: &Arguments, meter: &Meter) -> Outcome<Dict> {
    let mut dict = Dict::default();
    match arguments.positional.as_slice() {
        [] => {}
        [Value::Dict(from)] => {
            for (key, value) in from.entries.values() {
                dict.insert(key.clone(), value.clone(), meter)?;
            }
        }
        [pairs] => {
            for pair in pairs.items(meter)? {
                let Ok([key, value]) = <[Value; 2]>::try_from(pair.items(meter)?) else {
                    return fail("a dict is made of pairs");
                };
                dict.insert(key, value, meter)?;
            }
        }
        _ => return fail("a dict is made of one argument and named ones"),
    }
    for (name, value) in &arguments.named {
        dict.insert(Value::Text(name.clone()), value.clone(), meter)?;
    }
    Ok(dict)
}
