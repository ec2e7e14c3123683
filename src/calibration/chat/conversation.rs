//! Conversations as chat data sets hold them.

use serde_json::Value;

/// A conversation and what a chat template may be told beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// A JSON array of messages, each an object with a role. Content may be text, a list of parts, null or
    /// absent; keys keep the order that they have in the data.
    pub messages: Value,
    /// The tools that the model may call, as JSON schemas.
    pub tools: Option<Value>,
    /// Documents to answer from, each an object with a title and text.
    pub documents: Option<Value>,
}

impl Conversation {
    /// The conversation of `messages` that stand in `row`, whose `tools` and `documents` belong to it.
    ///
    /// # Errors
    /// What keeps it from being a conversation, as the end of a sentence that begins with the row's place.
    pub fn of_row(messages: &Value, row: &Value) -> Result<Conversation, String> {
        let list = messages.as_array().ok_or("the messages are not a list")?;
        if list.is_empty() {
            return Err("the list of messages is empty".into());
        }
        for (index, message) in list.iter().enumerate() {
            let number = index + 1;
            let message = message.as_object().ok_or(format!("message {number} is not an object"))?;
            if !message.get("role").is_some_and(Value::is_string) {
                return Err(format!("message {number} has no role"));
            }
        }
        let tools = beside(row, "tools")?;
        let documents = beside(row, "documents")?;
        Ok(Conversation { messages: messages.clone(), tools, documents })
    }
}

/// A list of objects beside the messages. Data sets also write such lists as JSON inside a string.
fn beside(row: &Value, key: &str) -> Result<Option<Value>, String> {
    let value = match row.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|e| format!("{key} is a string that is not JSON: {e}"))?
        }
        Some(value) => value.clone(),
    };
    match value.as_array() {
        Some(list) if list.iter().all(Value::is_object) => Ok(Some(value)),
        _ => Err(format!("{key} is not a list of objects")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn content_may_be_anything_and_keys_keep_their_order() {
        let messages = json!([
            {"role": "user", "content": [{"type": "text", "text": "time?"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "now", "arguments": {"z": 1, "a": 2}}}]},
            {"role": "assistant", "tool_calls": []},
        ]);
        let conversation = Conversation::of_row(&messages, &json!({"tools": null})).unwrap();
        assert_eq!(conversation, Conversation { messages: messages.clone(), tools: None, documents: None });
        assert!(conversation.messages.to_string().contains(r#"{"z":1,"a":2}"#));
    }

    #[test]
    fn tools_and_documents_stand_beside_the_messages() {
        let messages = json!([{"role": "user", "content": "a"}]);
        let tools = json!([{"type": "function", "function": {"name": "now"}}]);
        for row in [json!({"tools": tools}), json!({"tools": tools.to_string()})] {
            assert_eq!(Conversation::of_row(&messages, &row).unwrap().tools, Some(tools.clone()));
        }
        let row = json!({"documents": [{"title": "t", "text": "x"}]});
        assert_eq!(Conversation::of_row(&messages, &row).unwrap().documents, Some(row["documents"].clone()));
    }

    #[test]
    fn what_is_no_conversation_is_told() {
        let user = json!([{"role": "user", "content": "a"}]);
        for (messages, row, words) in [
            (json!([]), json!({}), "empty"),
            (json!("hello"), json!({}), "not a list"),
            (json!(["hello"]), json!({}), "message 1 is not an object"),
            (json!([{"role": "user"}, {"content": "a"}]), json!({}), "message 2 has no role"),
            (user.clone(), json!({"tools": "none"}), "not JSON"),
            (user.clone(), json!({"tools": "\"none\""}), "tools is not a list"),
            (user, json!({"documents": ["a"]}), "documents is not a list of objects"),
        ] {
            let error = Conversation::of_row(&messages, &row).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
