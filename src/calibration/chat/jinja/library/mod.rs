//! What templates can call: filters, tests, methods, functions.

pub mod arguments;
pub mod attributes;
pub mod checks;
pub mod date;
pub mod filters;
pub mod globals;
pub mod methods;
