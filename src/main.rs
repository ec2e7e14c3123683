//! The distq command.
fn main() {}
