//! Conversations as the model was trained to see them: the checkpoint's chat template.

use std::path::Path;

use minijinja::{Environment, context};
use serde::Deserialize;
use serde_json::Value;

use super::conversation::Conversation;
use crate::error::{Error, Result};

/// A checkpoint's chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template in `chat_template.jinja` or `tokenizer_config.json`, if there is one.
    ///
    /// # Errors
    /// Exit code 3 where the template does not parse.
    pub fn of(model: &Path) -> Result<Option<ChatTemplate>> {
        let config_path = model.join("tokenizer_config.json");
        let config: Value = std::fs::read(&config_path)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or(Value::Null);
        let separate = model.join("chat_template.jinja");
        let (path, template) = match std::fs::read_to_string(&separate) {
            Ok(template) => (separate, Some(template)),
            Err(_) => (config_path, template_in(&config["chat_template"])),
        };
        let Some(template) = template else { return Ok(None) };
        // A mark for training that Transformers strips as well; it is no tag of the language.
        let mark = regex::Regex::new(r"\{%-?\s*(end)?generation\s*-?%\}").expect("the pattern is constant");
        let template = mark.replace_all(&template, "").into_owned();
        let mut environment = Environment::new();
        let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| Error::run(format!("chat template syntax: {e}")))?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", template).map_err(|e| bad(&path, &e))?;
        Ok(Some(ChatTemplate {
            environment,
            bos: token_in(&config["bos_token"]),
            eos: token_in(&config["eos_token"]),
        }))
    }

    /// A conversation as text, special tokens included.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        let given = |value| {
            minijinja::Value::deserialize(value)
                .map_err(|e| Error::input(format!("a conversation can't be given to the chat template: {e}")))
        };
        let messages = given(&conversation.messages)?;
        let tools = given(conversation.tools.as_ref().unwrap_or(&Value::Null))?;
        let documents = given(conversation.documents.as_ref().unwrap_or(&Value::Null))?;
        let render = |template: minijinja::Template<'_, '_>| {
            template.render(context! {
                messages => messages,
                tools => tools,
                documents => documents,
                bos_token => self.bos.as_str(),
                eos_token => self.eos.as_str(),
                add_generation_prompt => false,
            })
        };
        self.environment
            .get_template("chat")
            .and_then(render)
            .map_err(|e| Error::input(format!("the chat template refuses a conversation: {e:#}")))
    }
}

fn bad(path: &Path, error: &minijinja::Error) -> Error {
    Error::input(format!("the chat template does not parse: {error:#}"))
        .file(path)
        .fix("calibrate with plain text instead of messages")
}

/// A template is a string, or a list of named ones of which `default` counts.
fn template_in(value: &Value) -> Option<String> {
    match value {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_string)
        }
        _ => None,
    }
}

/// A special token is a string, or an object with its content.
fn token_in(value: &Value) -> String {
    value.as_str().or(value["content"].as_str()).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rendered(template: &str, messages: Value) -> Result<String> {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        ChatTemplate::of(dir.path())?.unwrap().render(&Conversation {
            messages,
            tools: None,
            documents: None,
        })
    }

    #[test]
    fn templates_written_for_python_render() {
        let template = "{{ bos_token }}{% for m in messages %}{%- generation -%}{% endgeneration %}\n[{{ m['role'].upper() }}] {{ m.content.strip() }}\
                        {% endfor %}{% if add_generation_prompt %}go{% endif %}{{ eos_token }}";
        let text = rendered(template, json!([{"role": "user", "content": " hi "}])).unwrap();
        assert_eq!(text, "<s>[USER] hi</s>");
    }

    #[test]
    fn a_template_may_refuse() {
        let error = rendered("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
        assert!(rendered("{% for %}", json!([])).is_err());
    }

    #[test]
    fn a_checkpoint_without_a_template_has_none() {
        assert!(ChatTemplate::of(tempfile::tempdir().unwrap().path()).unwrap().is_none());
    }
}
