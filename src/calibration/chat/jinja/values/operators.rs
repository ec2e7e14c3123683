//! What Python's operators do.

use std::cmp::Ordering;
use std::rc::Rc;

use super::format::percent;
use super::print::text;
use super::value::{Items, Range, SLOT, Value, View};
use crate::calibration::chat::jinja::meter::{Fault, Meter, Outcome, fail};
use crate::calibration::chat::jinja::parsing::syntax::{Binary, Comparison};

/// A number, booleans included.
#[derive(Clone, Copy)]
enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    fn of(value: &Value) -> Option<Number> {
        match value {
            Value::Bool(value) => Some(Number::Int((*value).into())),
            Value::Int(value) => Some(Number::Int(*value)),
            Value::Float(value) => Some(Number::Float(*value)),
            _ => None,
        }
    }

    fn float(self) -> f64 {
        match self {
            Number::Int(value) => value as f64,
            Number::Float(value) => value,
        }
    }
}

fn defined(value: &Value) -> Outcome<()> {
    match value {
        Value::Undefined(what) => fail(what.to_string()),
        _ => Ok(()),
    }
}

/// Arithmetic, and what the same signs mean for text and lists.
pub fn binary(operation: Binary, left: &Value, right: &Value, meter: &Meter) -> Outcome<Value> {
    defined(left)?;
    if operation == Binary::Remainder
        && let Value::Text(format) = left
    {
        return Value::text(percent(format, right, meter)?, meter);
    }
    defined(right)?;
    if let (Some(left), Some(right)) = (Number::of(left), Number::of(right)) {
        return arithmetic(operation, left, right);
    }
    match (operation, left, right) {
        (Binary::Add, Value::Text(left), Value::Text(right)) => {
            meter.take(left.len() + right.len())?;
            Ok(Value::Text([&**left, &**right].concat().into()))
        }
        (Binary::Add, Value::List(left), Value::List(right)) => {
            Value::list(joined(&left.list, &right.list, meter)?, meter)
        }
        (Binary::Add, Value::Tuple(left), Value::Tuple(right)) => {
            Value::tuple(joined(&left.list, &right.list, meter)?, meter)
        }
        (Binary::Multiply, sequence, Value::Int(times)) | (Binary::Multiply, Value::Int(times), sequence) => {
            repeated(sequence, *times, meter)
        }
        (Binary::Multiply, sequence, Value::Bool(once)) | (Binary::Multiply, Value::Bool(once), sequence) => {
            repeated(sequence, (*once).into(), meter)
        }
        _ => fail(format!(
            "{operation:?} does not work with values of type {} and {}",
            left.type_name(),
            right.type_name()
        )),
    }
}

fn repeated(sequence: &Value, times: i128, meter: &Meter) -> Outcome<Value> {
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    let list = |items: &Items| -> Outcome<Vec<Value>> {
        meter.take(items.list.len().saturating_mul(times).saturating_mul(SLOT))?;
        Ok(std::iter::repeat_n(&items.list, times).flatten().cloned().collect())
    };
    match sequence {
        Value::Text(text) => {
            meter.take(text.len().saturating_mul(times))?;
            Ok(Value::Text(text.repeat(times).into()))
        }
        Value::List(items) => Value::list(list(items)?, meter),
        Value::Tuple(items) => Value::tuple(list(items)?, meter),
        other => fail(format!("a value of type {} can't be multiplied", other.type_name())),
    }
}

fn joined(left: &[Value], right: &[Value], meter: &Meter) -> Outcome<Vec<Value>> {
    meter.work((left.len() + right.len()) * 32)?;
    Ok([left, right].concat())
}

fn arithmetic(operation: Binary, left: Number, right: Number) -> Outcome<Value> {
    let too_large = || Fault::new("a number is too large");
    let by_zero = || Fault::new("a division by zero");
    if let (Number::Int(a), Number::Int(b)) = (left, right) {
        let result = match operation {
            Binary::Add => a.checked_add(b),
            Binary::Subtract => a.checked_sub(b),
            Binary::Multiply => a.checked_mul(b),
            Binary::FloorDivide | Binary::Remainder if b == 0 => return Err(by_zero()),
            // Python rounds towards minus infinity.
            Binary::FloorDivide => {
                a.checked_div(b).map(|q| if a % b != 0 && (a < 0) != (b < 0) { q - 1 } else { q })
            }
            Binary::Remainder => {
                a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r })
            }
            Binary::Power if b >= 0 => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            _ => return float_arithmetic(operation, a as f64, b as f64),
        };
        return result.map(Value::Int).ok_or_else(too_large);
    }
    float_arithmetic(operation, left.float(), right.float())
}

fn float_arithmetic(operation: Binary, a: f64, b: f64) -> Outcome<Value> {
    let divides = matches!(operation, Binary::Divide | Binary::FloorDivide | Binary::Remainder);
    if (divides && b == 0.0) || (operation == Binary::Power && a == 0.0 && b < 0.0) {
        return fail("a division by zero");
    }
    let remainder = || {
        let r = a % b;
        if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
    };
    let result = match operation {
        Binary::Add => a + b,
        Binary::Subtract => a - b,
        Binary::Multiply => a * b,
        Binary::Divide => a / b,
        Binary::FloorDivide => ((a - remainder()) / b).round(),
        Binary::Remainder => remainder(),
        Binary::Power => {
            let result = a.powf(b);
            if a < 0.0 && b.fract() != 0.0 {
                return fail("a power is a complex number");
            }
            if result.is_infinite() && a.is_finite() && b.is_finite() {
                return fail("a number is too large");
            }
            result
        }
    };
    Ok(Value::Float(result))
}

/// `-value`
pub fn negative(value: &Value) -> Outcome<Value> {
    defined(value)?;
    match Number::of(value) {
        Some(Number::Int(value)) => {
            value.checked_neg().map(Value::Int).ok_or_else(|| Fault::new("a number is too large"))
        }
        Some(Number::Float(value)) => Ok(Value::Float(-value)),
        None => fail(format!("a value of type {} has no negative", value.type_name())),
    }
}

/// `+value`
pub fn positive(value: &Value) -> Outcome<Value> {
    defined(value)?;
    match Number::of(value) {
        Some(Number::Int(value)) => Ok(Value::Int(value)),
        Some(Number::Float(value)) => Ok(Value::Float(value)),
        None => fail(format!("a value of type {} is no number", value.type_name())),
    }
}

/// `a ~ b ~ …`
pub fn concatenated(parts: &[Value], meter: &Meter) -> Outcome<Value> {
    let mut joined = String::new();
    for part in parts {
        text(part, &mut joined, meter)?;
    }
    Value::text(joined, meter)
}

/// One comparison.
pub fn compare(comparison: Comparison, left: &Value, right: &Value, meter: &Meter) -> Outcome<bool> {
    Ok(match comparison {
        Comparison::Equal => equal(left, right, meter)?,
        Comparison::Unequal => !equal(left, right, meter)?,
        Comparison::In => contains(right, left, meter)?,
        Comparison::NotIn => !contains(right, left, meter)?,
        ordering => {
            let Some(order) = order(left, right, meter)? else { return Ok(false) };
            match ordering {
                Comparison::Less => order.is_lt(),
                Comparison::LessOrEqual => order.is_le(),
                Comparison::Greater => order.is_gt(),
                _ => order.is_ge(),
            }
        }
    })
}

/// `==`
pub fn equal(left: &Value, right: &Value, meter: &Meter) -> Outcome<bool> {
    meter.step()?;
    if let (Some(left), Some(right)) = (Number::of(left), Number::of(right)) {
        return Ok(match (left, right) {
            (Number::Int(left), Number::Int(right)) => left == right,
            _ => left.float() == right.float(),
        });
    }
    let all = |left: &[Value], right: &[Value]| -> Outcome<bool> {
        if left.len() != right.len() {
            return Ok(false);
        }
        for (left, right) in left.iter().zip(right) {
            if !equal(left, right, meter)? {
                return Ok(false);
            }
        }
        Ok(true)
    };
    Ok(match (left, right) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Text(left), Value::Text(right)) => {
            meter.work(left.len().min(right.len()))?;
            left == right
        }
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            Rc::ptr_eq(left, right) || all(&left.list, &right.list)?
        }
        (Value::Dict(left), Value::Dict(right)) => {
            if Rc::ptr_eq(left, right) {
                return Ok(true);
            }
            if left.entries.len() != right.entries.len() {
                return Ok(false);
            }
            for (key, (_, value)) in &left.entries {
                match right.entries.get(key) {
                    Some((_, other)) if equal(value, other, meter)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::View(a, left), Value::View(b, right)) if a == b && *a != View::Values => {
            equal(&Value::Dict(left.clone()), &Value::Dict(right.clone()), meter)?
        }
        (Value::Range(left), Value::Range(right)) => left == right,
        _ => same(left, right),
    })
}

/// `is`: one and the same value.
pub fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::None, Value::None) => true,
        (Value::Bool(left), Value::Bool(right)) => left == right,
        (Value::Int(left), Value::Int(right)) => left == right,
        (Value::Float(left), Value::Float(right)) => left == right,
        (Value::Text(left), Value::Text(right)) => left == right,
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            Rc::ptr_eq(left, right)
        }
        (Value::Dict(left), Value::Dict(right)) => Rc::ptr_eq(left, right),
        (Value::Stream(left), Value::Stream(right)) => Rc::ptr_eq(left, right),
        (Value::Namespace(left), Value::Namespace(right)) => Rc::ptr_eq(left, right),
        (Value::Macro(left), Value::Macro(right)) => Rc::ptr_eq(left, right),
        (Value::Loop(left), Value::Loop(right)) => Rc::ptr_eq(left, right),
        (Value::Global(left), Value::Global(right)) => left == right,
        _ => false,
    }
}

/// The order of two values; none where a number is NaN.
pub fn order(left: &Value, right: &Value, meter: &Meter) -> Outcome<Option<Ordering>> {
    meter.step()?;
    defined(left)?;
    defined(right)?;
    if let (Some(left), Some(right)) = (Number::of(left), Number::of(right)) {
        return Ok(match (left, right) {
            (Number::Int(left), Number::Int(right)) => Some(left.cmp(&right)),
            _ => left.float().partial_cmp(&right.float()),
        });
    }
    match (left, right) {
        (Value::Text(left), Value::Text(right)) => {
            meter.work(left.len().min(right.len()))?;
            // UTF-8 keeps the order of code points.
            Ok(Some(left.cmp(right)))
        }
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            for (left, right) in left.list.iter().zip(&right.list) {
                if !equal(left, right, meter)? {
                    return order(left, right, meter);
                }
            }
            Ok(Some(left.list.len().cmp(&right.list.len())))
        }
        _ => fail(format!("values of type {} and {} have no order", left.type_name(), right.type_name())),
    }
}

/// `item in container`
pub fn contains(container: &Value, item: &Value, meter: &Meter) -> Outcome<bool> {
    match container {
        Value::Text(text) => {
            let part = item.as_text()?;
            meter.work(text.len())?;
            Ok(text.contains(&**part))
        }
        Value::Dict(dict) | Value::View(View::Keys, dict) => Ok(dict.get(item, meter)?.is_some()),
        Value::List(items) | Value::Tuple(items) => {
            for candidate in &items.list {
                if equal(candidate, item, meter)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        other => {
            for candidate in other.items(meter)? {
                if equal(&candidate, item, meter)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// Sorts by keys, stably; the comparison may fail, which the standard library's sorting does not allow.
pub fn sorted(mut items: Vec<(Value, Value)>, reverse: bool, meter: &Meter) -> Outcome<Vec<Value>> {
    // Reversing before and after keeps equal items in their order.
    if reverse {
        items.reverse();
    }
    let mut items = merge_sorted(items, meter)?;
    if reverse {
        items.reverse();
    }
    Ok(items.into_iter().map(|(_, item)| item).collect())
}

fn merge_sorted(mut left: Vec<(Value, Value)>, meter: &Meter) -> Outcome<Vec<(Value, Value)>> {
    if left.len() < 2 {
        return Ok(left);
    }
    let right = left.split_off(left.len() / 2);
    let (left, right) = (merge_sorted(left, meter)?, merge_sorted(right, meter)?);
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some((a, _)), Some((b, _))) = (left.peek(), right.peek()) {
        let next = if order(b, a, meter)? == Some(Ordering::Less) { right.next() } else { left.next() };
        merged.extend(next);
    }
    merged.extend(left);
    merged.extend(right);
    Ok(merged)
}

/// The index that a position counts from either end means.
pub fn position(index: i128, length: usize) -> Option<usize> {
    let length = length as i128;
    let index = if index < 0 { index + length } else { index };
    (0..length).contains(&index).then_some(index as usize)
}

/// `value[start:stop:step]`
pub fn sliced(value: &Value, parts: [Option<Value>; 3], meter: &Meter) -> Outcome<Value> {
    defined(value)?;
    let length = match value {
        Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Range(_) => value.len(meter)? as i128,
        other => return fail(format!("a value of type {} can't be sliced", other.type_name())),
    };
    let number = |part: &Option<Value>| match part {
        None | Some(Value::None) => Ok(None),
        Some(value) => value.as_int().map(Some),
    };
    let (start, stop, step) = (number(&parts[0])?, number(&parts[1])?, number(&parts[2])?.unwrap_or(1));
    if step == 0 {
        return fail("a slice's step is zero");
    }
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let bound = |at: i128| (if at < 0 { at.saturating_add(length) } else { at }).clamp(low, high);
    let start = start.map_or(if step > 0 { low } else { high }, bound);
    let stop = stop.map_or(if step > 0 { high } else { low }, bound);
    if let Value::Range(range) = value {
        let at = |index: i128| range.start.saturating_add(range.step.saturating_mul(index));
        return Ok(Value::Range(Range {
            start: at(start),
            stop: at(stop),
            step: range.step.saturating_mul(step),
        }));
    }
    let mut indices = Vec::new();
    let mut at = start;
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        indices.push(at as usize);
        at = at.saturating_add(step);
    }
    match value {
        Value::Text(text) if step == 1 => {
            let from = text.char_indices().nth(start as usize).map_or(text.len(), |(at, _)| at);
            let length = indices.len();
            let part = &text[from..];
            let to = part.char_indices().nth(length).map_or(part.len(), |(at, _)| at);
            Value::text(&part[..to], meter)
        }
        Value::Text(text) => {
            let chars: Vec<char> = text.chars().collect();
            Value::text(indices.iter().map(|&at| chars[at]).collect::<String>(), meter)
        }
        Value::List(items) => Value::list(indices.iter().map(|&at| items.list[at].clone()).collect(), meter),
        Value::Tuple(items) => {
            Value::tuple(indices.iter().map(|&at| items.list[at].clone()).collect(), meter)
        }
        _ => unreachable!("its length was taken"),
    }
}
