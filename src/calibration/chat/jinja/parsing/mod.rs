//! Source to a tree.

pub mod lexer;
pub mod parser;
pub mod syntax;
