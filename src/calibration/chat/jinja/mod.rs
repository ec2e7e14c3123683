//! Jinja as chat templates use it: the language and the Python that shows through it.
//!
//! A chat template is written for Jinja2 in the sandbox that Transformers sets up, and what it prints depends on
//! Python throughout: `'%s' % x`, `message.items`, `1e-05`, a loop over None that fails. Ports of Jinja print
//! something else or print where Jinja2 refuses, in operators that nothing outside of the port can replace, and
//! calibration would then see tokens that the model never sees. So the language is here, as far as templates go:
//!
//! * `lexer`, `parser` and `syntax`: source to a tree.
//! * `value` and `operators`: Python's values, and what its operators do with them.
//! * `run`: statements and expressions; `scope` holds the variables.
//! * `attributes`, `methods`, `filters`, `checks` (`is` tests) and `globals`: what values can do.
//! * `print`, `json`, `format` and `strings`: how values become text.
//! * `meter`: a template is a stranger's program. Its steps, its memory and its nesting have limits.

mod library;
mod meter;
mod parsing;
mod run;
mod scope;
mod values;

pub use library::date::TODAY;
pub use parsing::parser::parse;
pub use parsing::syntax::Template;
pub use run::render;
