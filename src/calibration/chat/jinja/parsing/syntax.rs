//! The tree of a template.

use std::collections::HashSet;
use std::sync::Arc;

/// A template, ready to render.
pub struct Template {
    pub(in crate::calibration::chat::jinja) body: Vec<Statement>,
    /// Variables that it mentions.
    pub(in crate::calibration::chat::jinja) names: HashSet<Arc<str>>,
}

impl Template {
    /// Whether it mentions a variable or function.
    pub fn mentions(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

/// A statement, with its line.
pub struct Statement {
    pub line: u32,
    pub kind: Do,
}

/// Kinds of statements.
pub enum Do {
    Text(Arc<str>),
    Print(Expr),
    If {
        branches: Vec<(Expr, Vec<Statement>)>,
        otherwise: Vec<Statement>,
    },
    For(Arc<For>),
    Break,
    Continue,
    Set(Target, Expr),
    /// `{% set x %}…{% endset %}`, with filters.
    SetBlock(Target, Vec<Filter>, Vec<Statement>),
    With(Vec<(Target, Expr)>, Vec<Statement>),
    FilterBlock(Vec<Filter>, Vec<Statement>),
    Macro(Arc<Macro>),
    /// A call whose callee may render `caller()`.
    CallBlock(Expr, Arc<Macro>),
    /// A body whose variables end with it: `generation` and `block`.
    Scope(Vec<Statement>),
}

/// A loop.
pub struct For {
    pub target: Target,
    pub items: Expr,
    pub test: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
}

/// A macro, or the body of a call block.
pub struct Macro {
    pub name: Arc<str>,
    pub parameters: Vec<(Arc<str>, Option<Expr>)>,
    pub body: Vec<Statement>,
    /// The body uses `varargs`.
    pub varargs: bool,
    /// The body uses `kwargs`.
    pub kwargs: bool,
    /// The body uses `caller`.
    pub caller: bool,
}

/// What is assigned to.
pub enum Target {
    Name(Arc<str>),
    /// An attribute of a namespace.
    Attribute(Arc<str>, Arc<str>),
    Tuple(Vec<Target>),
}

/// A filter by name, with its arguments.
pub struct Filter {
    pub line: u32,
    pub name: Arc<str>,
    pub arguments: Arguments,
}

/// Arguments as they are written.
#[derive(Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(Arc<str>, Expr)>,
    /// `*list`
    pub list: Option<Box<Expr>>,
    /// `**dict`
    pub dict: Option<Box<Expr>>,
}

/// An expression, with its line and how deep it is nested.
pub struct Expr {
    pub line: u32,
    pub depth: u32,
    pub kind: Value,
}

/// Kinds of expressions.
pub enum Value {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Arc<str>),
    Name(Arc<str>),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Arc<str>),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Arguments),
    Filter(Box<Expr>, Filter),
    Test(Box<Expr>, Filter),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Binary(Binary, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    If { test: Box<Expr>, then: Box<Expr>, otherwise: Option<Box<Expr>> },
}

/// Arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Binary {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
}

/// Comparisons, which may be chained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Comparison {
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}
