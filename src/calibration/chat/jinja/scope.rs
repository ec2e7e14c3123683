//! Variables.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::values::value::Value;

/// Variables and the scope around them.
pub struct Scope {
    variables: RefCell<HashMap<Arc<str>, Value>>,
    outer: Option<Rc<Scope>>,
}

impl Scope {
    /// An empty scope inside another one.
    pub fn new(outer: Option<&Rc<Scope>>) -> Rc<Scope> {
        Rc::new(Scope { variables: RefCell::default(), outer: outer.cloned() })
    }

    /// Assigns a variable of this scope.
    pub fn set(&self, name: &Arc<str>, value: Value) {
        self.variables.borrow_mut().insert(name.clone(), value);
    }

    /// Forgets the variables.
    pub fn clear(&self) {
        self.variables.take();
    }

    /// The variable of this scope or the nearest one around it.
    pub fn get(&self, name: &str) -> Option<Value> {
        let mut scope = Some(self);
        while let Some(here) = scope {
            if let Some(value) = here.variables.borrow().get(name) {
                return Some(value.clone());
            }
            scope = here.outer.as_deref();
        }
        None
    }
}
