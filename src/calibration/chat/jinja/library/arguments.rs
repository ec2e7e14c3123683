//! Arguments of a call, and the parameters that they are for.

use std::sync::Arc;

use crate::calibration::chat::jinja::meter::{Outcome, fail};
use crate::calibration::chat::jinja::values::value::Value;

/// The arguments of a call.
#[derive(Default)]
pub struct Arguments {
    /// Those without a name.
    pub positional: Vec<Value>,
    /// Those with one.
    pub named: Vec<(Arc<str>, Value)>,
}

/// A call's values by parameter.
pub struct Bound {
    values: Vec<Option<Value>>,
}

impl Arguments {
    /// The values of the parameters, of which the first `needed` must be given. A parameter that begins with `/`
    /// can't be given by name.
    pub fn bind<const N: usize>(&self, needed: usize, parameters: [&str; N]) -> Outcome<Bound> {
        if self.positional.len() > N {
            return fail(format!("{} arguments given, {N} taken", self.positional.len()));
        }
        let mut values: Vec<Option<Value>> = self.positional.iter().cloned().map(Some).collect();
        values.resize_with(N, || None);
        for (name, value) in &self.named {
            match parameters.iter().position(|parameter| *parameter == &**name) {
                Some(at) if values[at].is_none() => values[at] = Some(value.clone()),
                Some(_) => return fail(format!("the argument {name} is given twice")),
                None => return fail(format!("there is no argument {name}")),
            }
        }
        match (0..needed).find(|at| values[*at].is_none()) {
            Some(at) => fail(format!("the argument {} is missing", parameters[at].trim_start_matches('/'))),
            None => Ok(Bound { values }),
        }
    }
}

impl Bound {
    /// The value given for a parameter.
    pub fn get(&self, at: usize) -> Option<&Value> {
        self.values[at].as_ref()
    }

    /// The value given, unless it is None.
    pub fn some(&self, at: usize) -> Option<&Value> {
        self.get(at).filter(|value| !matches!(value, Value::None))
    }

    /// Whether a condition given holds.
    pub fn flag(&self, at: usize) -> bool {
        self.get(at).is_some_and(Value::is_true)
    }

    /// The text given, unless it is None.
    pub fn text(&self, at: usize) -> Outcome<Option<&Arc<str>>> {
        self.some(at).map(Value::as_text).transpose()
    }

    /// The integer given, unless it is None.
    pub fn int(&self, at: usize) -> Outcome<Option<i128>> {
        self.some(at).map(Value::as_int).transpose()
    }
}
