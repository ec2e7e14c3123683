//! Python's values.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use indexmap::IndexMap;

use crate::calibration::chat::jinja::meter::{Meter, Outcome, fail};
use crate::calibration::chat::jinja::parsing::syntax;
use crate::calibration::chat::jinja::scope::Scope;

/// A value that a template computes with.
#[derive(Clone)]
pub enum Value {
    /// What isn't there; the text says what that is.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Arc<str>),
    List(Rc<Items>),
    Tuple(Rc<Items>),
    Dict(Rc<Dict>),
    /// What `keys()`, `values()` and `items()` of a dict give.
    View(View, Rc<Dict>),
    Range(Range),
    /// A generator, which can be read once.
    Stream(Rc<RefCell<VecDeque<Value>>>),
    Namespace(Rc<Namespace>),
    Cycler(Rc<Cycler>),
    /// `joiner(text)`, and whether it was called.
    Joiner(Rc<(Value, Cell<bool>)>),
    Loop(Rc<Loop>),
    Macro(Rc<Macro>),
    /// A method of a value.
    Method(Rc<(Value, Arc<str>)>),
    /// A function that every template has.
    Global(&'static str),
}

/// The items of a list or tuple.
pub struct Items {
    /// Containers inside each other, this one included.
    pub depth: u32,
    /// The items.
    pub list: Vec<Value>,
}

/// A dict, in the order of insertion.
#[derive(Default)]
pub struct Dict {
    /// Containers inside each other, this one included.
    pub depth: u32,
    /// Keys by what makes them equal, with themselves and their values.
    pub entries: IndexMap<Key, (Value, Value)>,
}

/// What makes two keys of a dict equal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Key {
    Undefined,
    None,
    Int(i128),
    /// The bits of a number that is no integer.
    Float(u64),
    Text(Arc<str>),
    Tuple(Vec<Key>),
}

/// Which view of a dict.
#[derive(Clone, Copy, PartialEq)]
pub enum View {
    Keys,
    Values,
    Items,
}

/// A range of integers.
#[derive(Clone, Copy, PartialEq)]
pub struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

/// A namespace, whose attributes can be assigned.
pub struct Namespace {
    pub depth: Cell<u32>,
    pub attributes: RefCell<IndexMap<Arc<str>, Value>>,
}

/// `cycler(…)`.
pub struct Cycler {
    pub items: Vec<Value>,
    pub at: Cell<usize>,
}

/// A macro and where it was defined.
pub struct Macro {
    pub code: Arc<syntax::Macro>,
    /// Not owned: the scope owns the macro.
    pub scope: Weak<Scope>,
}

/// A loop that is running: what `loop` gives.
pub struct Loop {
    pub code: Arc<syntax::For>,
    pub scope: Rc<Scope>,
    /// Items that the loop's test has not seen.
    pub waiting: RefCell<VecDeque<Value>>,
    /// Items that passed the test.
    pub ready: RefCell<VecDeque<Value>>,
    pub index0: Cell<usize>,
    pub depth0: usize,
    pub current: RefCell<Option<Value>>,
    pub previous: RefCell<Option<Value>>,
    /// What `changed` was last called with.
    pub seen: RefCell<Option<Vec<Value>>>,
}

/// Memory that a value takes, about.
pub const SLOT: usize = 32;

impl Value {
    /// Text.
    pub fn text(text: impl AsRef<str>, meter: &Meter) -> Outcome<Value> {
        meter.take(text.as_ref().len() + SLOT)?;
        Ok(Value::Text(text.as_ref().into()))
    }

    /// A list.
    pub fn list(items: Vec<Value>, meter: &Meter) -> Outcome<Value> {
        Ok(Value::List(Rc::new(Items::new(items, meter)?)))
    }

    /// A tuple.
    pub fn tuple(items: Vec<Value>, meter: &Meter) -> Outcome<Value> {
        Ok(Value::Tuple(Rc::new(Items::new(items, meter)?)))
    }

    /// A generator.
    pub fn stream(items: Vec<Value>, meter: &Meter) -> Outcome<Value> {
        let items = Items::new(items, meter)?.list;
        Ok(Value::Stream(Rc::new(RefCell::new(items.into()))))
    }

    /// A method.
    pub fn method(of: &Value, name: &str) -> Value {
        Value::Method(Rc::new((of.clone(), name.into())))
    }

    /// What isn't there.
    pub fn undefined(what: impl AsRef<str>) -> Value {
        Value::Undefined(what.as_ref().into())
    }

    /// A value of JSON.
    pub fn from_json(json: &serde_json::Value, meter: &Meter) -> Outcome<Value> {
        use serde_json::Value as Json;
        Ok(match json {
            Json::Null => Value::None,
            Json::Bool(value) => Value::Bool(*value),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), _, _) => Value::Int(value.into()),
                (_, Some(value), _) => Value::Int(value.into()),
                (_, _, value) => Value::Float(value.unwrap_or(f64::NAN)),
            },
            Json::String(text) => Value::text(text, meter)?,
            Json::Array(items) => {
                let items = items.iter().map(|item| Value::from_json(item, meter));
                Value::list(items.collect::<Outcome<_>>()?, meter)?
            }
            Json::Object(entries) => {
                let mut dict = Dict::default();
                for (key, value) in entries {
                    dict.insert(Value::text(key, meter)?, Value::from_json(value, meter)?, meter)?;
                }
                dict.into()
            }
        })
    }

    /// Containers inside each other.
    pub fn depth(&self) -> u32 {
        match self {
            Value::List(items) | Value::Tuple(items) => items.depth,
            Value::Dict(dict) | Value::View(_, dict) => dict.depth,
            Value::Stream(items) => 1 + items.borrow().iter().map(Value::depth).max().unwrap_or(0),
            Value::Namespace(namespace) => namespace.depth.get(),
            Value::Cycler(cycler) => 1 + cycler.items.iter().map(Value::depth).max().unwrap_or(0),
            Value::Joiner(joiner) => 1 + joiner.0.depth(),
            Value::Method(method) => 1 + method.0.depth(),
            _ => 0,
        }
    }

    /// Python's name of the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Text(_) => "str",
            Value::List(_) => "list",
            Value::Tuple(_) => "tuple",
            Value::Dict(_) => "dict",
            Value::View(View::Keys, _) => "dict_keys",
            Value::View(View::Values, _) => "dict_values",
            Value::View(View::Items, _) => "dict_items",
            Value::Range(_) => "range",
            Value::Stream(_) => "generator",
            Value::Namespace(_) => "Namespace",
            Value::Cycler(_) => "Cycler",
            Value::Joiner(_) => "Joiner",
            Value::Loop(_) => "LoopContext",
            Value::Macro(_) => "Macro",
            Value::Method(_) => "method",
            Value::Global(_) => "function",
        }
    }

    /// Whether a condition holds.
    pub fn is_true(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(value) => *value,
            Value::Int(value) => *value != 0,
            Value::Float(value) => *value != 0.0,
            Value::Text(text) => !text.is_empty(),
            Value::List(items) | Value::Tuple(items) => !items.list.is_empty(),
            Value::Dict(dict) | Value::View(_, dict) => !dict.entries.is_empty(),
            Value::Range(range) => range.len() > 0,
            _ => true,
        }
    }

    /// The number of items.
    pub fn len(&self, meter: &Meter) -> Outcome<usize> {
        Ok(match self {
            Value::Undefined(_) => 0,
            Value::Text(text) => {
                meter.work(text.len())?;
                text.chars().count()
            }
            Value::List(items) | Value::Tuple(items) => items.list.len(),
            Value::Dict(dict) | Value::View(_, dict) => dict.entries.len(),
            Value::Range(range) => range.len(),
            other => return fail(format!("a value of type {} has no length", other.type_name())),
        })
    }

    /// The items; a generator is empty afterwards.
    pub fn items(&self, meter: &Meter) -> Outcome<Vec<Value>> {
        let count = match self {
            Value::Text(text) => text.len(),
            Value::Stream(items) => items.borrow().len(),
            Value::Undefined(_) => 0,
            Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::View(..) | Value::Range(_) => {
                self.len(meter)?
            }
            other => return fail(format!("a value of type {} can't be iterated over", other.type_name())),
        };
        meter.take(count * SLOT)?;
        Ok(match self {
            Value::Text(text) => {
                text.chars().map(|c| Value::Text(c.encode_utf8(&mut [0; 4]).into())).collect()
            }
            Value::List(items) | Value::Tuple(items) => items.list.clone(),
            Value::Dict(dict) | Value::View(View::Keys, dict) => {
                dict.entries.values().map(|(key, _)| key.clone()).collect()
            }
            Value::View(View::Values, dict) => {
                dict.entries.values().map(|(_, value)| value.clone()).collect()
            }
            Value::View(View::Items, dict) => {
                let pair =
                    |(key, value): &(Value, Value)| Value::tuple(vec![key.clone(), value.clone()], meter);
                dict.entries.values().map(pair).collect::<Outcome<_>>()?
            }
            Value::Range(range) => (0..range.len()).map(|at| Value::Int(range.at(at))).collect(),
            Value::Stream(items) => items.borrow_mut().drain(..).collect(),
            _ => Vec::new(),
        })
    }

    /// The text of a value that must be text.
    pub fn as_text(&self) -> Outcome<&Arc<str>> {
        match self {
            Value::Text(text) => Ok(text),
            other => fail(format!("text expected, a value of type {} found", other.type_name())),
        }
    }

    /// The number of a value that must be an integer.
    pub fn as_int(&self) -> Outcome<i128> {
        match self {
            Value::Int(value) => Ok(*value),
            Value::Bool(value) => Ok((*value).into()),
            other => fail(format!("an integer expected, a value of type {} found", other.type_name())),
        }
    }
}

impl Items {
    fn new(list: Vec<Value>, meter: &Meter) -> Outcome<Items> {
        meter.take(list.len() * SLOT)?;
        let depth = meter.deeper(list.iter().map(Value::depth).max().unwrap_or(0))?;
        Ok(Items { depth, list })
    }
}

impl Dict {
    /// Adds an entry, or replaces its value.
    pub fn insert(&mut self, key: Value, value: Value, meter: &Meter) -> Outcome<()> {
        meter.take(4 * SLOT)?;
        self.depth = self.depth.max(meter.deeper(value.depth().max(key.depth()))?);
        match self.entries.entry(Key::of(&key, meter)?) {
            indexmap::map::Entry::Occupied(mut entry) => entry.get_mut().1 = value,
            indexmap::map::Entry::Vacant(entry) => {
                entry.insert((key, value));
            }
        }
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &Value, meter: &Meter) -> Outcome<Option<&Value>> {
        Ok(self.entries.get(&Key::of(key, meter)?).map(|(_, value)| value))
    }
}

impl From<Dict> for Value {
    fn from(dict: Dict) -> Value {
        Value::Dict(Rc::new(dict))
    }
}

impl Key {
    /// A value as a key.
    pub fn of(value: &Value, meter: &Meter) -> Outcome<Key> {
        meter.step()?;
        Ok(match value {
            Value::Undefined(_) => Key::Undefined,
            Value::None => Key::None,
            Value::Bool(value) => Key::Int((*value).into()),
            Value::Int(value) => Key::Int(*value),
            Value::Float(value) if value.fract() == 0.0 && value.abs() < 1e38 => Key::Int(*value as i128),
            Value::Float(value) => Key::Float(value.to_bits()),
            Value::Text(text) => {
                meter.work(text.len())?;
                Key::Text(text.clone())
            }
            Value::Tuple(items) => {
                Key::Tuple(items.list.iter().map(|item| Key::of(item, meter)).collect::<Outcome<_>>()?)
            }
            other => return fail(format!("a value of type {} can't be a key", other.type_name())),
        })
    }
}

impl Range {
    /// The number of integers.
    pub fn len(&self) -> usize {
        let (low, high) = if self.step > 0 { (self.start, self.stop) } else { (self.stop, self.start) };
        let step = self.step.unsigned_abs();
        if high <= low { 0 } else { (high.abs_diff(low).div_ceil(step)) as usize }
    }

    /// One of the integers.
    pub fn at(&self, index: usize) -> i128 {
        self.start + self.step * index as i128
    }
}
