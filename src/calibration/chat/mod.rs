//! Conversations to text, by the chat template of the model.

pub mod conversation;
pub mod jinja;
pub mod template;
