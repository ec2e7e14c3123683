//! Renders a template.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use super::library::arguments::Arguments;
use super::library::attributes::{attribute, item};
use super::library::checks::check;
use super::library::{filters, globals, methods};
use super::meter::{Fault, Meter, Outcome, fail};
use super::parsing::syntax::{self, Do, Expr, For, Statement, Target, Template};
use super::scope::Scope;
use super::values::operators::{binary, compare, concatenated, negative, positive, sliced};
use super::values::print::text;
use super::values::value::{Dict, Loop, Macro, SLOT, Value};

/// Renders a template with these variables.
///
/// # Errors
/// Whatever Jinja2 would raise, and what goes beyond the limits.
pub fn render(template: &Template, variables: &[(&str, &serde_json::Value)]) -> Result<String, Fault> {
    let meter = Meter::default();
    let scope = Scope::new(None);
    for (name, value) in variables {
        scope.set(&Arc::from(*name), Value::from_json(value, &meter)?);
    }
    let mut out = String::new();
    let ended = Run { meter: &meter, loop_name: "loop".into() }.body(&template.body, &scope, &mut out);
    // Values may refer to the scope that they stand in.
    scope.clear();
    ended.map(|_| out)
}

/// How a body ended.
#[derive(Clone, Copy, PartialEq)]
enum Flow {
    Through,
    Break,
    Continue,
}

struct Run<'a> {
    meter: &'a Meter,
    loop_name: Arc<str>,
}

impl Run<'_> {
    fn body(&self, body: &[Statement], scope: &Rc<Scope>, out: &mut String) -> Outcome<Flow> {
        self.meter.nest(|| {
            for statement in body {
                self.meter.step()?;
                let flow = self.statement(statement, scope, out).map_err(|fault| fault.at(statement.line))?;
                if flow != Flow::Through {
                    return Ok(flow);
                }
            }
            Ok(Flow::Through)
        })
    }

    /// A body's text by itself.
    fn captured(&self, body: &[Statement], scope: &Rc<Scope>) -> Outcome<(String, Flow)> {
        let mut text = String::new();
        let flow = self.body(body, scope, &mut text)?;
        Ok((text, flow))
    }

    fn statement(&self, statement: &Statement, scope: &Rc<Scope>, out: &mut String) -> Outcome<Flow> {
        match &statement.kind {
            Do::Text(text) => {
                self.meter.take(text.len())?;
                out.push_str(text);
            }
            Do::Print(value) => text(&self.value(value, scope)?, out, self.meter)?,
            Do::If { branches, otherwise } => {
                for (test, body) in branches {
                    if self.value(test, scope)?.is_true() {
                        return self.body(body, scope, out);
                    }
                }
                return self.body(otherwise, scope, out);
            }
            Do::For(code) => {
                let items = self.value(&code.items, scope)?.items(self.meter)?;
                return self.repeat(code, items, scope, 0, out);
            }
            Do::Break => return Ok(Flow::Break),
            Do::Continue => return Ok(Flow::Continue),
            Do::Set(target, value) => self.assign(target, self.value(value, scope)?, scope)?,
            Do::SetBlock(target, filters, body) => {
                let (text, flow) = self.captured(body, &Scope::new(Some(scope)))?;
                self.assign(target, self.filtered(text, filters, scope)?, scope)?;
                return Ok(flow);
            }
            Do::FilterBlock(filters, body) => {
                let (captured, flow) = self.captured(body, &Scope::new(Some(scope)))?;
                text(&self.filtered(captured, filters, scope)?, out, self.meter)?;
                return Ok(flow);
            }
            Do::With(values, body) => {
                let inner = Scope::new(Some(scope));
                for (target, value) in values {
                    self.assign(target, self.value(value, scope)?, &inner)?;
                }
                return self.body(body, &inner, out);
            }
            Do::Macro(code) => scope.set(&code.name, self.macro_here(code, scope)),
            Do::CallBlock(call, code) => {
                let syntax::Value::Call(callee, arguments) = &call.kind else {
                    return fail("a call block needs a call");
                };
                let callee = self.value(callee, scope)?;
                let mut arguments = self.arguments(arguments, scope)?;
                arguments.named.push(("caller".into(), self.macro_here(code, scope)));
                text(&self.call(&callee, arguments)?, out, self.meter)?;
            }
            Do::Scope(body) => return self.body(body, &Scope::new(Some(scope)), out),
        }
        Ok(Flow::Through)
    }

    fn filtered(&self, text: String, filters: &[syntax::Filter], scope: &Rc<Scope>) -> Outcome<Value> {
        let mut value = Value::text(text, self.meter)?;
        for filter in filters {
            let arguments = self.arguments(&filter.arguments, scope)?;
            value = filters::apply(&filter.name, &value, &arguments, self.meter)
                .map_err(|fault| fault.at(filter.line))?;
        }
        Ok(value)
    }

    fn assign(&self, target: &Target, value: Value, scope: &Rc<Scope>) -> Outcome<()> {
        match target {
            Target::Name(name) => scope.set(name, value),
            Target::Attribute(name, attribute) => {
                let Some(Value::Namespace(namespace)) = scope.get(name) else {
                    return fail(format!("{name} is no namespace, so {name}.{attribute} can't be set"));
                };
                let depth = self.meter.deeper(value.depth())?;
                namespace.depth.set(namespace.depth.get().max(depth));
                self.meter.take(64)?;
                namespace.attributes.borrow_mut().insert(attribute.clone(), value);
            }
            Target::Tuple(targets) => {
                let values = value.items(self.meter)?;
                if values.len() != targets.len() {
                    return fail(format!(
                        "{} values can't be assigned to {} names",
                        values.len(),
                        targets.len()
                    ));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
            }
        }
        Ok(())
    }

    fn repeat(
        &self,
        code: &Arc<For>,
        items: Vec<Value>,
        scope: &Rc<Scope>,
        depth0: usize,
        out: &mut String,
    ) -> Outcome<Flow> {
        let this = Rc::new(Loop {
            code: code.clone(),
            scope: scope.clone(),
            waiting: RefCell::new(items.into()),
            ready: RefCell::new(VecDeque::new()),
            index0: Cell::new(0),
            depth0,
            current: RefCell::new(None),
            previous: RefCell::new(None),
            seen: RefCell::new(None),
        });
        let mut count = 0;
        while self.has_next(&this)? {
            self.meter.take(2 * SLOT)?;
            let item = this.ready.borrow_mut().pop_front().expect("just looked");
            this.index0.set(count);
            *this.previous.borrow_mut() = this.current.replace(Some(item.clone()));
            count += 1;
            let inner = Scope::new(Some(scope));
            inner.set(&self.loop_name, Value::Loop(this.clone()));
            self.assign(&code.target, item, &inner)?;
            if self.body(&code.body, &inner, out)? == Flow::Break {
                break;
            }
        }
        if count == 0 { self.body(&code.otherwise, scope, out) } else { Ok(Flow::Through) }
    }

    /// Looks for the next item that passes the loop's test.
    fn has_next(&self, this: &Loop) -> Outcome<bool> {
        while this.ready.borrow().is_empty() {
            let next = this.waiting.borrow_mut().pop_front();
            let Some(item) = next else { return Ok(false) };
            if let Some(test) = &this.code.test {
                self.meter.step()?;
                let inner = Scope::new(Some(&this.scope));
                self.assign(&this.code.target, item.clone(), &inner)?;
                if !self.value(test, &inner)?.is_true() {
                    continue;
                }
            }
            this.ready.borrow_mut().push_back(item);
        }
        Ok(true)
    }

    /// What `loop` knows about where it is.
    fn loop_attribute(&self, this: &Loop, name: &str) -> Outcome<Option<Value>> {
        let index0 = this.index0.get();
        let length = || -> Outcome<usize> {
            let mut passed = VecDeque::new();
            while self.has_next(this)? {
                passed.extend(this.ready.borrow_mut().drain(..));
            }
            let length = index0 + 1 + passed.len();
            this.ready.replace(passed);
            Ok(length)
        };
        let number = |number: usize| Some(Value::Int(number as i128));
        Ok(match name {
            "index" => number(index0 + 1),
            "index0" => number(index0),
            "first" => Some(Value::Bool(index0 == 0)),
            "last" => Some(Value::Bool(!self.has_next(this)?)),
            "length" => number(length()?),
            "revindex" => number(length()? - index0),
            "revindex0" => number(length()? - index0 - 1),
            "depth" => number(this.depth0 + 1),
            "depth0" => number(this.depth0),
            "previtem" => {
                let previous = this.previous.borrow().clone();
                Some(previous.unwrap_or_else(|| Value::undefined("there is no previous item")))
            }
            "nextitem" => {
                self.has_next(this)?;
                let next = this.ready.borrow().front().cloned();
                Some(next.unwrap_or_else(|| Value::undefined("there is no next item")))
            }
            _ => None,
        })
    }

    fn macro_here(&self, code: &Arc<syntax::Macro>, scope: &Rc<Scope>) -> Value {
        Value::Macro(Rc::new(Macro { code: code.clone(), scope: Rc::downgrade(scope) }))
    }

    fn call(&self, callee: &Value, arguments: Arguments) -> Outcome<Value> {
        self.meter.nest(|| match callee {
            Value::Macro(called) => self.call_macro(called, arguments),
            Value::Method(method) => methods::call(&method.0, &method.1, &arguments, self.meter),
            Value::Global(name) => globals::call(name, &arguments, self.meter),
            Value::Joiner(joiner) => {
                arguments.bind(0, [])?;
                let first = !joiner.1.replace(true);
                Ok(if first { Value::Text("".into()) } else { joiner.0.clone() })
            }
            Value::Loop(this) => {
                let bound = arguments.bind(1, ["iterable"])?;
                if !this.code.recursive {
                    return fail("the loop is not recursive");
                }
                let items = bound.get(0).expect("needed").items(self.meter)?;
                let mut text = String::new();
                self.repeat(&this.code, items, &this.scope, this.depth0 + 1, &mut text)?;
                Value::text(text, self.meter)
            }
            Value::Undefined(what) => fail(what.to_string()),
            other => fail(format!("a value of type {} can't be called", other.type_name())),
        })
    }

    fn call_macro(&self, called: &Macro, arguments: Arguments) -> Outcome<Value> {
        let code = &called.code;
        let Some(outer) = called.scope.upgrade() else {
            return fail("a macro outlived the block that it is in");
        };
        let scope = Scope::new(Some(&outer));
        let mut positional = arguments.positional.into_iter();
        let mut named = arguments.named;
        let mut take =
            |name: &str| named.iter().position(|(known, _)| &**known == name).map(|at| named.remove(at).1);
        let caller = take("caller");
        let given: Vec<Option<Value>> = code
            .parameters
            .iter()
            .map(|(name, _)| match (positional.next(), take(name)) {
                (Some(_), Some(_)) => fail(format!("the argument {name} is given twice")),
                (Some(value), None) | (None, Some(value)) => Ok(Some(value)),
                (None, None) => Ok(None),
            })
            .collect::<Outcome<_>>()?;
        for ((name, default), value) in code.parameters.iter().zip(given) {
            let value = match (value, default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.value(default, &scope)?,
                (None, None) => Value::undefined(format!("the parameter {name} was not given")),
            };
            scope.set(name, value);
        }
        let rest: Vec<Value> = positional.collect();
        if code.varargs {
            scope.set(&"varargs".into(), Value::tuple(rest, self.meter)?);
        } else if !rest.is_empty() {
            return fail(format!("{} takes {} arguments", code.name, code.parameters.len()));
        }
        if code.kwargs {
            let mut dict = Dict::default();
            for (name, value) in named {
                dict.insert(Value::Text(name), value, self.meter)?;
            }
            scope.set(&"kwargs".into(), dict.into());
        } else if let Some((name, _)) = named.first() {
            return fail(format!("{} takes no argument {name}", code.name));
        }
        match caller {
            Some(caller) if code.caller => scope.set(&"caller".into(), caller),
            Some(_) => return fail(format!("{} is used in a call block but has no caller()", code.name)),
            None if code.caller => scope.set(&"caller".into(), Value::undefined("there is no caller")),
            None => {}
        }
        let (text, _) = self.captured(&code.body, &scope)?;
        Value::text(text, self.meter)
    }

    fn arguments(&self, arguments: &syntax::Arguments, scope: &Rc<Scope>) -> Outcome<Arguments> {
        let mut evaluated = Arguments::default();
        for value in &arguments.positional {
            evaluated.positional.push(self.value(value, scope)?);
        }
        if let Some(list) = &arguments.list {
            evaluated.positional.extend(self.value(list, scope)?.items(self.meter)?);
        }
        for (name, value) in &arguments.named {
            evaluated.named.push((name.clone(), self.value(value, scope)?));
        }
        if let Some(dict) = &arguments.dict {
            let Value::Dict(dict) = self.value(dict, scope)? else { return fail("'**' needs a dict") };
            for (key, value) in dict.entries.values() {
                evaluated.named.push((key.as_text()?.clone(), value.clone()));
            }
        }
        Ok(evaluated)
    }

    fn values(&self, items: &[Expr], scope: &Rc<Scope>) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.value(item, scope)).collect()
    }

    fn value(&self, expression: &Expr, scope: &Rc<Scope>) -> Outcome<Value> {
        self.meter.step()?;
        self.meter.nest(|| self.evaluate(expression, scope)).map_err(|fault| fault.at(expression.line))
    }

    fn evaluate(&self, expression: &Expr, scope: &Rc<Scope>) -> Outcome<Value> {
        use syntax::Value as E;
        let meter = self.meter;
        Ok(match &expression.kind {
            E::None => Value::None,
            E::Bool(value) => Value::Bool(*value),
            E::Int(value) => Value::Int(*value),
            E::Float(value) => Value::Float(*value),
            E::Text(text) => Value::Text(text.clone()),
            E::Name(name) => scope
                .get(name)
                .or_else(|| globals::find(name))
                .unwrap_or_else(|| Value::undefined(format!("the variable '{name}' is undefined"))),
            E::List(items) => Value::list(self.values(items, scope)?, meter)?,
            E::Tuple(items) => Value::tuple(self.values(items, scope)?, meter)?,
            E::Dict(entries) => {
                let mut dict = Dict::default();
                for (key, value) in entries {
                    dict.insert(self.value(key, scope)?, self.value(value, scope)?, meter)?;
                }
                dict.into()
            }
            E::Attribute(of, name) => {
                let of = self.value(of, scope)?;
                if let Value::Loop(this) = &of
                    && let Some(found) = self.loop_attribute(this, name)?
                {
                    return Ok(found);
                }
                attribute(&of, name, meter)?
            }
            E::Item(of, key) => {
                let (of, key) = (self.value(of, scope)?, self.value(key, scope)?);
                if let (Value::Loop(this), Value::Text(name)) = (&of, &key)
                    && let Some(found) = self.loop_attribute(this, name)?
                {
                    return Ok(found);
                }
                item(&of, &key, meter)?
            }
            E::Slice(of, parts) => {
                let of = self.value(of, scope)?;
                let mut bounds = [None, None, None];
                for (bound, part) in bounds.iter_mut().zip(parts) {
                    *bound = part.as_ref().map(|part| self.value(part, scope)).transpose()?;
                }
                sliced(&of, bounds, meter)?
            }
            E::Call(callee, arguments) => {
                let callee = self.value(callee, scope)?;
                self.call(&callee, self.arguments(arguments, scope)?)?
            }
            E::Filter(value, filter) => {
                let value = self.value(value, scope)?;
                filters::apply(&filter.name, &value, &self.arguments(&filter.arguments, scope)?, meter)?
            }
            E::Test(value, test) => {
                let value = self.value(value, scope)?;
                Value::Bool(check(&test.name, &value, &self.arguments(&test.arguments, scope)?, meter)?)
            }
            E::Not(value) => Value::Bool(!self.value(value, scope)?.is_true()),
            E::Negative(value) => negative(&self.value(value, scope)?)?,
            E::Positive(value) => positive(&self.value(value, scope)?)?,
            E::Binary(operation, left, right) => {
                binary(*operation, &self.value(left, scope)?, &self.value(right, scope)?, meter)?
            }
            E::Concat(parts) => concatenated(&self.values(parts, scope)?, meter)?,
            E::Compare(first, rest) => {
                let mut left = self.value(first, scope)?;
                for (comparison, right) in rest {
                    let right = self.value(right, scope)?;
                    if !compare(*comparison, &left, &right, meter)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            E::And(left, right) => {
                let left = self.value(left, scope)?;
                if left.is_true() { self.value(right, scope)? } else { left }
            }
            E::Or(left, right) => {
                let left = self.value(left, scope)?;
                if left.is_true() { left } else { self.value(right, scope)? }
            }
            E::If { test, then, otherwise } => match (self.value(test, scope)?.is_true(), otherwise) {
                (true, _) => self.value(then, scope)?,
                (false, Some(otherwise)) => self.value(otherwise, scope)?,
                (false, None) => Value::undefined("a condition without 'else' did not hold"),
            },
        })
    }
}
