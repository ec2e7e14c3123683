//! Typed access to the fields of config.json.

use serde_json::{Map, Value};

use crate::error::{Error, LONGEST_NAME, Result, printable};

/// What a message shows of a value.
pub fn shown(value: &impl std::fmt::Display) -> String {
    printable(&value.to_string(), LONGEST_NAME)
}

/// Typed access to an object of config.json, with errors that name the field.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    /// The object.
    pub map: &'a Map<String, Value>,
    /// What names of fields begin with in messages: empty, or the name of the object with a dot behind it.
    path: &'static str,
}

impl<'a> Fields<'a> {
    /// The fields of config.json itself.
    pub fn new(map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { map, path: "" }
    }

    /// The fields of an object inside of it, whose names begin with `path` in messages.
    pub fn inside(map: &'a Map<String, Value>, path: &'static str) -> Fields<'a> {
        Fields { map, path }
    }

    /// A field, where JSON's null counts as absent.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// The error that a field is wrong.
    pub fn wrong(&self, name: &str, what: String) -> Error {
        Error::input(format!("config.json: {}{name} {what}", self.path)).fix("correct config.json")
    }

    /// A positive whole number that must be there.
    pub fn count(&self, name: &str) -> Result<usize> {
        self.optional_count(name)?.ok_or_else(|| self.wrong(name, "is missing".into()))
    }

    /// A positive whole number.
    pub fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if n > 0 => Ok(Some(n as usize)),
                _ => Err(self.wrong(name, format!("is {}, not a positive whole number", shown(value)))),
            },
        }
    }

    /// A positive number.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
                _ => Err(self.wrong(name, format!("is {}, not a positive number", shown(value)))),
            },
        }
    }

    /// A positive whole number with a default for a field that is absent; a null is none.
    pub fn count_or(&self, name: &str, default: Option<usize>) -> Result<Option<usize>> {
        if self.map.contains_key(name) { self.optional_count(name) } else { Ok(default) }
    }

    /// A positive number with a default for a field that is absent; a null is none.
    pub fn number_or(&self, name: &str, default: Option<f64>) -> Result<Option<f64>> {
        if self.map.contains_key(name) { self.number(name) } else { Ok(default) }
    }

    /// True or false; false where the field is absent.
    pub fn flag(&self, name: &str) -> Result<bool> {
        Ok(self.optional_flag(name)?.unwrap_or(false))
    }

    /// True or false.
    pub fn optional_flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_bool()
                .map(Some)
                .ok_or_else(|| self.wrong(name, format!("is {}, not true or false", shown(value)))),
        }
    }

    /// A string.
    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value
                .as_str()
                .map(Some)
                .ok_or_else(|| self.wrong(name, format!("is {}, not a string", shown(value)))),
        }
    }

    /// A list of strings.
    pub fn texts(&self, name: &str) -> Result<Option<Vec<&'a str>>> {
        let wrong = |value: &Value| self.wrong(name, format!("is {}, not a list of strings", shown(value)));
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(items)) => {
                let items = items.iter().map(|item| item.as_str().ok_or_else(|| wrong(item)));
                items.collect::<Result<Vec<_>>>().map(Some)
            }
            Some(value) => Err(wrong(value)),
        }
    }

    /// An object, whose fields' names begin with `path` in messages.
    pub fn object(&self, name: &str, path: &'static str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map, path })),
            Some(value) => Err(self.wrong(name, format!("is {}, not an object", shown(value)))),
        }
    }
}
