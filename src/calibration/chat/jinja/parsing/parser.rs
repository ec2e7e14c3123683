//! Tokens to a tree, by Jinja2's grammar.

use std::collections::HashSet;
use std::sync::Arc;

use super::lexer::{Kind, Token, tokens};
use super::syntax::{
    Arguments, Binary, Comparison, Do, Expr, Filter, For, Macro, Statement, Target, Template, Value,
};
use crate::calibration::chat::jinja::meter::{Fault, Outcome};

/// Larger sources are no chat templates.
const LARGEST_SOURCE: usize = 1 << 20;
/// Expressions and statements inside each other; Python's own limit lies in the same region.
const DEEPEST: u32 = 300;

/// Parses a template.
///
/// # Errors
/// What is wrong with it, and in which line.
pub fn parse(source: &str) -> Result<Template, Fault> {
    if source.len() > LARGEST_SOURCE {
        return Err(Fault::new(format!("it has {} bytes, no chat template is as large", source.len())));
    }
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        nested: 0,
        loops: 0,
        special: Special::default(),
        names: HashSet::new(),
    };
    let body = parser.body(&[])?;
    Ok(Template { body, names: parser.names })
}

/// Which of a macro's special variables are used.
#[derive(Clone, Copy, Default)]
struct Special {
    varargs: bool,
    kwargs: bool,
    caller: bool,
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    nested: u32,
    /// Loops around this place that `break` can end.
    loops: u32,
    special: Special,
    names: HashSet<Arc<str>>,
}

impl Parser {
    fn kind(&self) -> &Kind {
        &self.tokens[self.at].kind
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    fn next(&mut self) -> Kind {
        let kind = self.tokens[self.at].kind.clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        kind
    }

    fn fault<T>(&self, message: impl Into<String>) -> Outcome<T> {
        Err(Fault::new(message).at(self.line()))
    }

    fn unexpected<T>(&self, wanted: &str) -> Outcome<T> {
        let found = match self.kind() {
            Kind::Data(_) => "text".to_string(),
            Kind::PrintBegin => "'{{'".into(),
            Kind::PrintEnd => "'}}'".into(),
            Kind::TagBegin => "'{%'".into(),
            Kind::TagEnd => "'%}'".into(),
            Kind::Name(name) => format!("'{name}'"),
            Kind::Text(text) => format!("the string {text:?}"),
            Kind::Int(number) => number.to_string(),
            Kind::Float(number) => number.to_string(),
            Kind::Op(op) => format!("'{op}'"),
            Kind::End => "the end of the template".into(),
        };
        self.fault(format!("{wanted} expected, {found} found"))
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.kind(), Kind::Op(found) if *found == op)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.kind(), Kind::Name(found) if &**found == name)
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let found = self.is_op(op);
        if found {
            self.next();
        }
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    fn expect_op(&mut self, op: &str) -> Outcome<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("'{op}'")) }
    }

    fn expect(&mut self, kind: &Kind, what: &str) -> Outcome<()> {
        if self.kind() != kind {
            return self.unexpected(what);
        }
        self.next();
        Ok(())
    }

    fn name(&mut self) -> Outcome<Arc<str>> {
        match self.kind().clone() {
            Kind::Name(name) => {
                self.next();
                Ok(name)
            }
            _ => self.unexpected("a name"),
        }
    }

    /// Parses something one level further inside.
    fn nest<T>(&mut self, parse: impl FnOnce(&mut Parser) -> Outcome<T>) -> Outcome<T> {
        if self.nested >= DEEPEST {
            return self.fault("it is nested too deeply");
        }
        self.nested += 1;
        let outcome = parse(self);
        self.nested -= 1;
        outcome
    }

    /// Statements up to one of the names, which is left to be read.
    fn body(&mut self, ends: &[&str]) -> Outcome<Vec<Statement>> {
        self.nest(|parser| {
            let mut body = Vec::new();
            loop {
                let line = parser.line();
                match parser.kind().clone() {
                    Kind::Data(text) => {
                        parser.next();
                        body.push(Statement { line, kind: Do::Text(text) });
                    }
                    Kind::PrintBegin => {
                        parser.next();
                        let value = parser.tuple(true)?;
                        parser.expect(&Kind::PrintEnd, "'}}'")?;
                        body.push(Statement { line, kind: Do::Print(value) });
                    }
                    Kind::TagBegin => {
                        parser.next();
                        if ends.iter().any(|end| parser.is_name(end)) {
                            return Ok(body);
                        }
                        parser.statement(&mut body)?;
                        parser.expect(&Kind::TagEnd, "'%}'")?;
                    }
                    Kind::End if ends.is_empty() => return Ok(body),
                    _ => return parser.unexpected(&format!("'{}'", ends.join("' or '"))),
                }
            }
        })
    }

    /// A tag's body: from the tag's end to one of the names.
    fn block(&mut self, ends: &[&str]) -> Outcome<Vec<Statement>> {
        self.skip_op(":");
        self.expect(&Kind::TagEnd, "'%}'")?;
        self.body(ends)
    }

    /// A tag's body that the name alone can end.
    fn closed_block(&mut self, end: &str) -> Outcome<Vec<Statement>> {
        let body = self.block(&[end])?;
        self.next();
        Ok(body)
    }

    /// A body that loops around it can't be left from.
    fn apart<T>(&mut self, parse: impl FnOnce(&mut Parser) -> Outcome<T>) -> Outcome<T> {
        let loops = std::mem::take(&mut self.loops);
        let outcome = parse(self);
        self.loops = loops;
        outcome
    }

    fn statement(&mut self, body: &mut Vec<Statement>) -> Outcome<()> {
        let line = self.line();
        let Kind::Name(tag) = self.kind().clone() else { return self.unexpected("a tag's name") };
        self.next();
        let kind = match &*tag {
            "if" => self.if_statement()?,
            "for" => self.for_statement()?,
            "set" => self.set_statement()?,
            "macro" => {
                let name = self.name()?;
                Do::Macro(Arc::new(self.macro_statement(name, "endmacro")?))
            }
            "call" => {
                let arguments = if self.is_op("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(call.kind, Value::Call(..)) {
                    return self.fault("a call block needs a call");
                }
                Do::CallBlock(call, Arc::new(self.macro_body("caller".into(), arguments, "endcall")?))
            }
            "filter" => {
                let filters = self.filters()?;
                Do::FilterBlock(filters, self.closed_block("endfilter")?)
            }
            "with" => {
                let mut values = Vec::new();
                while *self.kind() != Kind::TagEnd {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(false)?;
                    self.expect_op("=")?;
                    values.push((target, self.expression()?));
                }
                Do::With(values, self.closed_block("endwith")?)
            }
            "generation" => Do::Scope(self.apart(|parser| parser.closed_block("endgeneration"))?),
            "block" => {
                let name = self.name()?;
                let inside = self.apart(|parser| parser.closed_block("endblock"))?;
                self.skip_name(&name);
                Do::Scope(inside)
            }
            "print" => {
                let value = self.tuple(true)?;
                Do::Print(value)
            }
            "break" if self.loops > 0 => Do::Break,
            "continue" if self.loops > 0 => Do::Continue,
            "break" | "continue" => return self.fault(format!("'{tag}' stands outside of a loop")),
            "include" | "import" | "from" | "extends" => {
                return self.fault(format!("'{tag}' needs other files, a chat template has none"));
            }
            _ => return self.fault(format!("the tag '{tag}' is unknown")),
        };
        body.push(Statement { line, kind });
        Ok(())
    }

    fn if_statement(&mut self) -> Outcome<Do> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false)?;
            branches.push((test, self.block(&["elif", "else", "endif"])?));
            if self.skip_name("elif") {
                continue;
            }
            let otherwise = if self.skip_name("else") { self.block(&["endif"])? } else { Vec::new() };
            self.next();
            return Ok(Do::If { branches, otherwise });
        }
    }

    fn for_statement(&mut self) -> Outcome<Do> {
        let target = self.target(false)?;
        if !self.skip_name("in") {
            return self.unexpected("'in'");
        }
        let items = self.tuple(false)?;
        let test = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let body = self.block(&["endfor", "else"])?;
        self.loops -= 1;
        let otherwise = if self.skip_name("else") { self.block(&["endfor"])? } else { Vec::new() };
        self.next();
        Ok(Do::For(Arc::new(For { target, items, test, recursive, body, otherwise })))
    }

    fn set_statement(&mut self) -> Outcome<Do> {
        let target = self.target(true)?;
        if self.skip_op("=") {
            return Ok(Do::Set(target, self.tuple(true)?));
        }
        let mut filters = Vec::new();
        while self.skip_op("|") {
            filters.push(self.filter()?);
        }
        Ok(Do::SetBlock(target, filters, self.closed_block("endset")?))
    }

    fn macro_statement(&mut self, name: Arc<str>, end: &str) -> Outcome<Macro> {
        let parameters = self.parameters()?;
        self.macro_body(name, parameters, end)
    }

    fn macro_body(
        &mut self,
        name: Arc<str>,
        parameters: Vec<(Arc<str>, Option<Expr>)>,
        end: &str,
    ) -> Outcome<Macro> {
        let outer = std::mem::take(&mut self.special);
        let body = self.apart(|parser| parser.closed_block(end))?;
        let Special { varargs, kwargs, caller } = self.special;
        self.special = Special {
            varargs: outer.varargs | varargs,
            kwargs: outer.kwargs | kwargs,
            caller: outer.caller | caller,
        };
        Ok(Macro { name, parameters, body, varargs, kwargs, caller })
    }

    fn parameters(&mut self) -> Outcome<Vec<(Arc<str>, Option<Expr>)>> {
        self.expect_op("(")?;
        let mut parameters: Vec<(Arc<str>, Option<Expr>)> = Vec::new();
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.name()?;
            let default = if self.skip_op("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.iter().any(|(_, default)| default.is_some()) {
                return self.fault("a parameter without a default follows one with a default");
            }
            parameters.push((name, default));
        }
        self.next();
        Ok(parameters)
    }

    /// What stands on the left of an assignment.
    fn target(&mut self, attributes: bool) -> Outcome<Target> {
        let first = self.target_part(attributes)?;
        if !self.is_op(",") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op(",") {
            if !matches!(self.kind(), Kind::Name(name) if &**name != "in") && !self.is_op("(") {
                break;
            }
            parts.push(self.target_part(attributes)?);
        }
        Ok(Target::Tuple(parts))
    }

    fn target_part(&mut self, attributes: bool) -> Outcome<Target> {
        if self.skip_op("(") {
            let inside = self.nest(|parser| parser.target(attributes))?;
            self.expect_op(")")?;
            return Ok(inside);
        }
        let name = self.name()?;
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return self.fault(format!("'{name}' can't be assigned to"));
        }
        if &*name == "loop" && self.loops > 0 {
            return self.fault("'loop' can't be assigned to inside of a loop");
        }
        if attributes && self.skip_op(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        Ok(Target::Name(name))
    }

    fn filters(&mut self) -> Outcome<Vec<Filter>> {
        let mut filters = vec![self.filter()?];
        while self.skip_op("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    fn filter(&mut self) -> Outcome<Filter> {
        let line = self.line();
        let name = self.name()?;
        let arguments = if self.is_op("(") { self.arguments()? } else { Arguments::default() };
        Ok(Filter { line, name, arguments })
    }

    fn arguments(&mut self) -> Outcome<Arguments> {
        self.expect_op("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.is_op(")") {
            if !std::mem::take(&mut first) {
                self.expect_op(",")?;
                if self.is_op(")") {
                    break;
                }
            }
            let named = matches!(
                (self.kind(), &self.tokens.get(self.at + 1).map(|token| &token.kind)),
                (Kind::Name(_), Some(Kind::Op("=")))
            );
            let late = arguments.list.is_some() || arguments.dict.is_some();
            if self.skip_op("*") {
                arguments.list = Some(Box::new(self.expression()?));
            } else if self.skip_op("**") {
                arguments.dict = Some(Box::new(self.expression()?));
                continue;
            } else if named {
                let name = self.name()?;
                self.next();
                arguments.named.push((name, self.expression()?));
            } else if !arguments.named.is_empty() || late {
                return self.fault("an argument without a name follows one with a name");
            } else {
                arguments.positional.push(self.expression()?);
                continue;
            }
            if late {
                return self.fault("an argument follows '*' or '**'");
            }
        }
        self.next();
        Ok(arguments)
    }

    fn make(&self, line: u32, kind: Value) -> Outcome<Expr> {
        let depth = 1 + children(&kind).map(|child| child.depth).max().unwrap_or(0);
        if depth > DEEPEST {
            return self.fault("an expression is nested too deeply");
        }
        Ok(Expr { line, depth, kind })
    }

    /// An expression, or several with commas, which are a tuple.
    fn tuple(&mut self, conditional: bool) -> Outcome<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut commas = false;
        loop {
            let ends = matches!(self.kind(), Kind::PrintEnd | Kind::TagEnd)
                || self.is_op(")")
                || (!conditional && self.is_name("recursive"));
            if ends {
                break;
            }
            items.push(if conditional { self.expression()? } else { self.or()? });
            if !self.skip_op(",") {
                break;
            }
            commas = true;
        }
        if commas {
            return self.make(line, Value::Tuple(items));
        }
        match items.pop() {
            Some(item) => Ok(item),
            None => self.unexpected("an expression"),
        }
    }

    fn expression(&mut self) -> Outcome<Expr> {
        self.nest(|parser| {
            let line = parser.line();
            let mut value = parser.or()?;
            while parser.skip_name("if") {
                let test = Box::new(parser.or()?);
                let otherwise =
                    if parser.skip_name("else") { Some(Box::new(parser.expression()?)) } else { None };
                value = parser.make(line, Value::If { test, then: Box::new(value), otherwise })?;
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut left = self.and()?;
        while self.skip_name("or") {
            let right = self.and()?;
            left = self.make(line, Value::Or(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let mut left = self.not()?;
        while self.skip_name("and") {
            let right = self.not()?;
            left = self.make(line, Value::And(Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Outcome<Expr> {
        let line = self.line();
        if !self.skip_name("not") {
            return self.comparison();
        }
        let inside = self.nest(Parser::not)?;
        self.make(line, Value::Not(Box::new(inside)))
    }

    fn comparison(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let comparison = match self.kind() {
                Kind::Op("==") => Comparison::Equal,
                Kind::Op("!=") => Comparison::Unequal,
                Kind::Op("<") => Comparison::Less,
                Kind::Op("<=") => Comparison::LessOrEqual,
                Kind::Op(">") => Comparison::Greater,
                Kind::Op(">=") => Comparison::GreaterOrEqual,
                Kind::Name(name) if &**name == "in" => Comparison::In,
                Kind::Name(name) if &**name == "not" => {
                    let after = self.tokens.get(self.at + 1).map(|token| &token.kind);
                    if !matches!(after, Some(Kind::Name(name)) if &**name == "in") {
                        break;
                    }
                    self.next();
                    Comparison::NotIn
                }
                _ => break,
            };
            self.next();
            rest.push((comparison, self.sum()?));
        }
        if rest.is_empty() { Ok(first) } else { self.make(line, Value::Compare(Box::new(first), rest)) }
    }

    /// A chain of operators that bind alike, from left to right.
    fn chain(
        &mut self,
        operators: &[(&str, Binary)],
        operand: fn(&mut Parser) -> Outcome<Expr>,
    ) -> Outcome<Expr> {
        let line = self.line();
        let mut left = operand(self)?;
        while let Some((_, binary)) = operators.iter().find(|(op, _)| self.is_op(op)) {
            self.next();
            let right = operand(self)?;
            left = self.make(line, Value::Binary(*binary, Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn sum(&mut self) -> Outcome<Expr> {
        self.chain(&[("+", Binary::Add), ("-", Binary::Subtract)], Parser::concatenation)
    }

    fn concatenation(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        self.make(line, Value::Concat(parts))
    }

    fn product(&mut self) -> Outcome<Expr> {
        let operators = [
            ("*", Binary::Multiply),
            ("/", Binary::Divide),
            ("//", Binary::FloorDivide),
            ("%", Binary::Remainder),
        ];
        self.chain(&operators, Parser::power)
    }

    fn power(&mut self) -> Outcome<Expr> {
        self.chain(&[("**", Binary::Power)], |parser| parser.unary(true))
    }

    fn unary(&mut self, filters: bool) -> Outcome<Expr> {
        let line = self.line();
        let mut value = if self.skip_op("-") {
            let inside = Box::new(self.nest(|parser| parser.unary(false))?);
            self.make(line, Value::Negative(inside))?
        } else if self.skip_op("+") {
            let inside = Box::new(self.nest(|parser| parser.unary(false))?);
            self.make(line, Value::Positive(inside))?
        } else {
            self.primary()?
        };
        value = self.postfix(value)?;
        if filters { self.filtered(value) } else { Ok(value) }
    }

    /// A value with the filters, tests and calls that follow it.
    fn filtered(&mut self, mut value: Expr) -> Outcome<Expr> {
        loop {
            let line = self.line();
            if self.skip_op("|") {
                let filter = self.filter()?;
                value = self.make(line, Value::Filter(Box::new(value), filter))?;
            } else if self.skip_name("is") {
                value = self.test(line, value)?;
            } else if self.is_op("(") {
                let arguments = self.arguments()?;
                value = self.make(line, Value::Call(Box::new(value), arguments))?;
            } else {
                return Ok(value);
            }
        }
    }

    fn test(&mut self, line: u32, value: Expr) -> Outcome<Expr> {
        let negated = self.skip_name("not");
        let name = self.name()?;
        let mut arguments = Arguments::default();
        let begins_value = match self.kind() {
            Kind::Name(name) => !matches!(&**name, "else" | "or" | "and"),
            Kind::Text(_) | Kind::Int(_) | Kind::Float(_) => true,
            Kind::Op(op) => matches!(*op, "[" | "{"),
            _ => false,
        };
        if self.is_op("(") {
            arguments = self.arguments()?;
        } else if begins_value && self.is_name("is") {
            return self.fault("tests can't be chained with 'is'");
        } else if begins_value {
            let argument = self.primary()?;
            arguments.positional.push(self.postfix(argument)?);
        }
        let test = self.make(line, Value::Test(Box::new(value), Filter { line, name, arguments }))?;
        if negated { self.make(line, Value::Not(Box::new(test))) } else { Ok(test) }
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let line = self.line();
        let kind = match self.kind().clone() {
            Kind::Name(name) => {
                self.next();
                match &*name {
                    "true" | "True" => Value::Bool(true),
                    "false" | "False" => Value::Bool(false),
                    "none" | "None" => Value::None,
                    special => {
                        self.special.varargs |= special == "varargs";
                        self.special.kwargs |= special == "kwargs";
                        self.special.caller |= special == "caller";
                        self.names.insert(name.clone());
                        Value::Name(name)
                    }
                }
            }
            Kind::Text(text) => {
                self.next();
                let mut text = text;
                while let Kind::Text(more) = self.kind().clone() {
                    self.next();
                    text = format!("{text}{more}").into();
                }
                Value::Text(text)
            }
            Kind::Int(number) => {
                self.next();
                Value::Int(number)
            }
            Kind::Float(number) => {
                self.next();
                Value::Float(number)
            }
            Kind::Op("(") => {
                self.next();
                if self.skip_op(")") {
                    return self.make(line, Value::Tuple(Vec::new()));
                }
                let inside = self.nest(|parser| parser.tuple(true))?;
                self.expect_op(")")?;
                return Ok(inside);
            }
            Kind::Op("[") => {
                self.next();
                Value::List(self.separated("]", Parser::expression)?)
            }
            Kind::Op("{") => {
                self.next();
                Value::Dict(self.separated("}", |parser| {
                    let key = parser.expression()?;
                    parser.expect_op(":")?;
                    Ok((key, parser.expression()?))
                })?)
            }
            _ => return self.unexpected("a value"),
        };
        self.make(line, kind)
    }

    fn separated<T>(&mut self, end: &str, item: impl Fn(&mut Parser) -> Outcome<T>) -> Outcome<Vec<T>> {
        let mut items = Vec::new();
        while !self.is_op(end) {
            if !items.is_empty() {
                self.expect_op(",")?;
                if self.is_op(end) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        self.next();
        Ok(items)
    }

    fn postfix(&mut self, mut value: Expr) -> Outcome<Expr> {
        loop {
            let line = self.line();
            let inside = |value| Box::new(value);
            let kind = if self.skip_op(".") {
                match self.next() {
                    Kind::Name(name) => Value::Attribute(inside(value), name),
                    Kind::Int(number) => {
                        let index = self.make(line, Value::Int(number))?;
                        Value::Item(inside(value), Box::new(index))
                    }
                    _ => return self.fault("a name or a number must follow '.'"),
                }
            } else if self.skip_op("[") {
                self.subscript(value)?
            } else if self.is_op("(") {
                let arguments = self.arguments()?;
                Value::Call(inside(value), arguments)
            } else {
                return Ok(value);
            };
            value = self.make(line, kind)?;
        }
    }

    fn subscript(&mut self, value: Expr) -> Outcome<Value> {
        let value = Box::new(value);
        let part = |parser: &mut Parser| -> Outcome<Option<Box<Expr>>> {
            let empty = parser.is_op(":") || parser.is_op("]");
            Ok(if empty { None } else { Some(Box::new(parser.expression()?)) })
        };
        let first = part(self)?;
        if !self.skip_op(":") {
            self.expect_op("]")?;
            return match first {
                Some(index) => Ok(Value::Item(value, index)),
                None => self.fault("an index is missing"),
            };
        }
        let second = part(self)?;
        let third = if self.skip_op(":") { part(self)? } else { None };
        self.expect_op("]")?;
        Ok(Value::Slice(value, [first, second, third]))
    }
}

/// The expressions directly inside one.
fn children(kind: &Value) -> Box<dyn Iterator<Item = &Expr> + '_> {
    fn of(arguments: &Arguments) -> impl Iterator<Item = &Expr> {
        let named = arguments.named.iter().map(|(_, value)| value);
        let rest = arguments.list.as_deref().into_iter().chain(arguments.dict.as_deref());
        arguments.positional.iter().chain(named).chain(rest)
    }
    use std::iter::once;
    match kind {
        Value::List(items) | Value::Tuple(items) | Value::Concat(items) => Box::new(items.iter()),
        Value::Dict(items) => Box::new(items.iter().flat_map(|(key, value)| [key, value])),
        Value::Attribute(value, _) | Value::Not(value) | Value::Negative(value) | Value::Positive(value) => {
            Box::new(once(&**value))
        }
        Value::Item(left, right)
        | Value::Binary(_, left, right)
        | Value::And(left, right)
        | Value::Or(left, right) => Box::new([&**left, &**right].into_iter()),
        Value::Slice(value, parts) => {
            Box::new(once(&**value).chain(parts.iter().flatten().map(|part| &**part)))
        }
        Value::Call(value, arguments) => Box::new(once(&**value).chain(of(arguments))),
        Value::Filter(value, filter) | Value::Test(value, filter) => {
            Box::new(once(&**value).chain(of(&filter.arguments)))
        }
        Value::Compare(first, rest) => Box::new(once(&**first).chain(rest.iter().map(|(_, value)| value))),
        Value::If { test, then, otherwise } => {
            Box::new([&**test, &**then].into_iter().chain(otherwise.as_deref()))
        }
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Text(_) | Value::Name(_) => {
            Box::new(std::iter::empty())
        }
    }
}
