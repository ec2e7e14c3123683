//! What a row's document is: the names under which data sets keep text, conversations and token ids.

use serde_json::{Map, Value, json};

use super::chat::conversation::Conversation;
use super::documents::Document;

/// Token ids, and which of them count.
const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";

/// A list of messages.
const CONVERSATIONS: [&str; 3] = ["messages", "conversations", "conversation"];

/// What stands beside a list of messages.
const BESIDE: [&str; 3] = ["tools", "documents", "system"];

/// A question and its answer; `input` adds to the question.
const QUESTIONS: [&str; 3] = ["instruction", "question", "prompt"];
const ANSWERS: [&str; 5] = ["output", "response", "answer", "completion", "chosen"];
const INPUT: &str = "input";

/// Plain text.
const TEXTS: [&str; 5] = ["text", "article", "content", "prompt", "code"];

/// Whether a key or a column is looked at.
pub fn is_known(key: &str) -> bool {
    [&CONVERSATIONS[..], &BESIDE, &QUESTIONS, &ANSWERS, &TEXTS, &[IDS, MASK, INPUT]].concat().contains(&key)
}

/// The keys that hold a document by themselves, for messages.
pub const HOLD_A_DOCUMENT: &str = "input_ids, messages, conversations, text, article, content, prompt, code, instruction and output, or question and answer";

/// The document of a row; the error is what keeps it from being one.
pub fn document_of(row: Value) -> Result<Document, String> {
    match &row {
        Value::String(text) => some_text(text),
        Value::Array(list) if list.first().is_some_and(Value::is_number) => ids(&row, None),
        Value::Array(list) if list.first().is_some_and(Value::is_object) => conversation(&row, &Value::Null),
        Value::Object(fields) => of_object(&row, fields),
        _ => Err("neither an object nor text".into()),
    }
}

fn of_object(row: &Value, fields: &Map<String, Value>) -> Result<Document, String> {
    let present = |key: &str| fields.get(key).filter(|value| !value.is_null());
    let text = |keys: &[&str]| keys.iter().find_map(|key| present(key)?.as_str());
    if let Some(list) = present(IDS) {
        return ids(list, present(MASK));
    }
    if let Some(messages) = CONVERSATIONS.iter().find_map(|key| present(key)) {
        return conversation(messages, row);
    }
    // Sets for preferences and completions have lists of messages too: a prompt, and an answer that continues or
    // repeats it.
    let prompt = present("prompt").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let answer = ANSWERS.iter().find_map(|key| present(key)?.as_array()).map_or(&[][..], Vec::as_slice);
    if prompt.iter().chain(answer).next().is_some_and(Value::is_object) {
        let begun = if answer.starts_with(prompt) { &[][..] } else { prompt };
        return conversation(&Value::from([begun, answer].concat()), row);
    }
    if let Some(text) = text(&TEXTS[..2]) {
        return some_text(text);
    }
    if let (Some(question), Some(answer)) = (text(&QUESTIONS), text(&ANSWERS)) {
        let question = match text(&[INPUT]) {
            Some(input) if !input.trim().is_empty() => format!("{question}\n\n{input}"),
            _ => question.to_string(),
        };
        let messages =
            json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
        return conversation(&messages, row);
    }
    match text(&TEXTS) {
        Some(text) => some_text(text),
        None => {
            let null = fields.iter().find(|(key, value)| is_known(key) && value.is_null());
            Err(match null {
                Some((key, _)) => format!("{key} is null"),
                None => format!("no document in it, its keys are {}", names(fields.keys())),
            })
        }
    }
}

/// Some names, for a message.
pub fn names<'a>(names: impl ExactSizeIterator<Item = &'a String>) -> String {
    const MOST: usize = 12;
    let more = if names.len() > MOST { format!(" and {} more", names.len() - MOST) } else { String::new() };
    let shown: Vec<String> = names.take(MOST).map(|name| name.chars().take(40).collect()).collect();
    shown.join(", ") + &more
}

fn some_text(text: &str) -> Result<Document, String> {
    match text.trim().is_empty() {
        true => Err("its text is empty".into()),
        false => Ok(Document::Text(text.to_string())),
    }
}

/// Token ids without those that are padding.
fn ids(list: &Value, mask: Option<&Value>) -> Result<Document, String> {
    let list = list.as_array().ok_or("input_ids is not a list")?;
    let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
    let ids: Vec<u32> = ids.collect::<Option<_>>().ok_or("input_ids holds something that is no token id")?;
    let Some(mask) = mask else { return Ok(Document::Ids(ids)) };
    let mask = mask.as_array().ok_or("attention_mask is not a list")?;
    if mask.len() != ids.len() {
        return Err(format!("attention_mask has {} entries for {} input_ids", mask.len(), ids.len()));
    }
    let counts = |mask: &Value| mask.as_bool().or(mask.as_i64().map(|mask| mask != 0));
    let mut counted = Vec::with_capacity(ids.len());
    for (id, mask) in ids.into_iter().zip(mask) {
        if counts(mask).ok_or("attention_mask holds something other than 0 and 1")? {
            counted.push(id);
        }
    }
    Ok(Document::Ids(counted))
}

/// A conversation in any spelling. Tables without lists write it as JSON inside a string.
fn conversation(messages: &Value, row: &Value) -> Result<Document, String> {
    let written;
    let messages = match messages {
        Value::String(text) => {
            written = serde_json::from_str(text).map_err(|_| "the messages are a string that is not JSON")?;
            &written
        }
        messages => messages,
    };
    let list = messages.as_array().ok_or("the messages are not a list")?;
    let mut messages: Vec<Value> = list.iter().map(message).collect();
    let begins_with_system = messages.first().is_some_and(|message| message["role"] == "system");
    if let Some(system) = row.get("system").and_then(Value::as_str).filter(|system| !system.trim().is_empty())
        && !begins_with_system
    {
        messages.insert(0, json!({"role": "system", "content": system}));
    }
    Conversation::of_row(&Value::from(messages), row).map(Document::Conversation)
}

/// A message with `role` and `content`, also where it is written with `from` and `value` (ShareGPT).
fn message(message: &Value) -> Value {
    let (Some(fields), None) = (message.as_object(), message.get("role").filter(|role| !role.is_null()))
    else {
        return message.clone();
    };
    let Some(from) = fields.get("from").and_then(Value::as_str) else { return message.clone() };
    let value = fields.get("value").or(fields.get("content")).cloned().unwrap_or(Value::Null);
    let role = match from {
        "human" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" => "assistant",
        "observation" | "function_response" => "tool",
        "function_call" => return tool_call(value),
        other => other,
    };
    let mut made = Map::from_iter([("role".to_string(), role.into()), ("content".to_string(), value)]);
    let rest = fields.iter().filter(|(key, _)| !["from", "value", "content", "role"].contains(&key.as_str()));
    made.extend(rest.map(|(key, value)| (key.clone(), value.clone())));
    Value::Object(made)
}

/// An assistant's message that calls the functions that `value` describes: JSON of one call or of several.
fn tool_call(value: Value) -> Value {
    let call = match &value {
        Value::String(text) => serde_json::from_str(text).ok(),
        other => Some(other.clone()),
    };
    let calls = match call {
        Some(Value::Array(calls)) => calls,
        Some(call) => vec![call],
        None => vec![],
    };
    if calls.is_empty() || !calls.iter().all(|call| call["name"].is_string()) {
        return json!({"role": "assistant", "content": value});
    }
    let calls = calls.into_iter().map(|call| json!({"type": "function", "function": call}));
    json!({"role": "assistant", "content": "", "tool_calls": calls.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(row: Value) -> Value {
        match document_of(row.clone()) {
            Ok(Document::Conversation(conversation)) => conversation.messages,
            other => panic!("{row}: {other:?}"),
        }
    }

    #[test]
    fn text_stands_under_many_names() {
        for row in [
            json!("a"),
            json!({"text": "a", "prompt": "b", "messages": null}),
            json!({"article": "a", "input_ids": null}),
            json!({"content": "a"}),
            json!({"code": "a", "language": "c"}),
            json!({"prompt": "a"}),
        ] {
            assert_eq!(document_of(row.clone()), Ok(Document::Text("a".into())), "{row}");
        }
    }

    #[test]
    fn conversations_in_every_spelling() {
        let expected = json!([
            {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        ]);
        let turns = json!([
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
        ]);
        let pair = &turns.as_array().unwrap()[1..];
        for row in [
            json!({"messages": expected}),
            json!({"messages": expected.to_string(), "prompt": "q"}),
            json!({"conversations": expected}),
            json!({"conversations": turns}),
            json!({"conversations": pair, "system": "s"}),
            json!({"conversations": turns, "system": "other"}),
            expected.clone(),
            turns.clone(),
            json!({"prompt": expected}),
            json!({"prompt": expected.as_array().unwrap()[..2], "completion": expected.as_array().unwrap()[2..]}),
            json!({"prompt": expected.as_array().unwrap()[..2], "chosen": expected, "rejected": []}),
            json!({"prompt": "q", "chosen": expected, "rejected": []}),
        ] {
            assert_eq!(messages(row.clone()), expected, "{row}");
        }
    }

    #[test]
    fn questions_and_answers_are_conversations() {
        let expected = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        for row in [
            json!({"instruction": "q", "input": "", "output": "a"}),
            json!({"question": "q", "answer": "a", "answers": []}),
            json!({"instruction": "q", "response": "a"}),
            json!({"prompt": "q", "completion": "a"}),
            json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
        ] {
            assert_eq!(messages(row.clone()), expected, "{row}");
        }
        let row = json!({"instruction": "q", "input": "i", "output": "a"});
        assert_eq!(messages(row)[0]["content"], "q\n\ni");
    }

    #[test]
    fn calls_of_tools_are_messages_of_the_assistant() {
        let tools = json!([{"name": "now"}]);
        let row = json!({"tools": tools.to_string(), "conversations": [
            {"from": "human", "value": "time?"},
            {"from": "function_call", "value": "{\"name\": \"now\", \"arguments\": {\"zone\": \"UTC\"}}"},
            {"from": "observation", "value": "noon"},
            {"from": "function_call", "value": "not JSON"},
        ]});
        let expected = json!([
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
            ]},
            {"role": "tool", "content": "noon"},
            {"role": "assistant", "content": "not JSON"},
        ]);
        assert_eq!(messages(row.clone()), expected);
        let Ok(Document::Conversation(conversation)) = document_of(row) else { panic!() };
        assert_eq!(conversation.tools, Some(tools));
    }

    #[test]
    fn padding_does_not_count() {
        for mask in [json!([0, 1, 1, 0]), json!([false, true, true, false])] {
            let row = json!({"input_ids": [0, 5, 6, 0], "attention_mask": mask});
            assert_eq!(document_of(row), Ok(Document::Ids(vec![5, 6])));
        }
        assert_eq!(document_of(json!([1, 2])), Ok(Document::Ids(vec![1, 2])));
    }

    #[test]
    fn what_is_no_document_is_told() {
        for (row, words) in [
            (json!({"body": "a", "x": 1}), "its keys are body, x"),
            (json!({"text": null}), "text is null"),
            (json!({"text": " \n"}), "empty"),
            (json!(7), "neither"),
            (json!([]), "neither"),
            (json!({"input_ids": [1, -2]}), "no token id"),
            (json!({"input_ids": "1 2"}), "not a list"),
            (json!({"input_ids": [1], "attention_mask": [1, 1]}), "2 entries for 1"),
            (json!({"input_ids": [1], "attention_mask": ["x"]}), "0 and 1"),
            (json!({"messages": "hello"}), "not JSON"),
            (json!({"conversations": []}), "empty"),
            (json!({"conversations": [{"value": "a"}]}), "no role"),
        ] {
            let reason = document_of(row.clone()).unwrap_err();
            assert!(reason.contains(words), "{row}: {reason}");
        }
    }
}
