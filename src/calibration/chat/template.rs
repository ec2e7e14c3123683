//! Conversations as the model was trained to see them: the checkpoint's chat template.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::conversation::Conversation;
use super::jinja;
use crate::error::{Error, Result};

/// Files that hold templates are smaller than this.
const LARGEST_FILE: u64 = 64 << 20;

/// Rendering is recursive; its depth is limited such that this is enough.
const STACK: usize = 64 << 20;

/// What to do where a template can't be used.
const REMEDY: &str = "calibrate with text or input_ids instead of messages, or correct the template";

/// A checkpoint's chat template, ready to render.
pub struct ChatTemplate {
    default: Option<Named>,
    /// For conversations with tools, where the checkpoint has a template of its own for them.
    tool_use: Option<Named>,
    /// Special tokens and other variables that every conversation has.
    variables: Vec<(String, Value)>,
}

struct Named {
    file: PathBuf,
    template: jinja::Template,
}

impl ChatTemplate {
    /// The checkpoint's template, if there is one: `chat_template.jinja` and `additional_chat_templates/`, or else
    /// what stands in `tokenizer_config.json`.
    ///
    /// # Errors
    /// Exit code 3 where a file can't be read or a template does not compile.
    pub fn of(model: &Path) -> Result<Option<ChatTemplate>> {
        let config_file = model.join("tokenizer_config.json");
        let config = json_in(&config_file)?;
        let alone = |name: &str, file: &str| -> Result<Option<Named>> {
            let file = model.join(file);
            text_in(&file)?.map(|text| compiled(name, file, &text)).transpose()
        };
        let mut default = alone("default", "chat_template.jinja")?;
        let mut tool_use = alone("tool_use", "additional_chat_templates/tool_use.jinja")?;
        if default.is_none() && tool_use.is_none() {
            let named = |name: &str| {
                let template = template_in(&config["chat_template"], name);
                template.map(|text| compiled(name, config_file.clone(), text)).transpose()
            };
            (default, tool_use) = (named("default")?, named("tool_use")?);
        }
        if default.is_none() && tool_use.is_none() {
            if config["chat_template"].is_array() {
                return Err(Error::input("none of the chat templates is named default or tool_use")
                    .file(&config_file)
                    .fix(REMEDY));
            }
            return Ok(None);
        }
        let variables = special_tokens(config, &json_in(&model.join("special_tokens_map.json"))?);
        Ok(Some(ChatTemplate { default, tool_use, variables }))
    }

    /// A conversation as text, special tokens included; or why the template refuses this one.
    ///
    /// # Errors
    /// Exit code 3 where the template goes beyond what any template needs: others would fare no better.
    pub fn render(&self, conversation: &Conversation) -> Result<Result<String, String>> {
        let chosen = match &conversation.tools {
            Some(_) => self.tool_use.as_ref().or(self.default.as_ref()),
            None => self.default.as_ref(),
        };
        let Some(Named { file, template }) = chosen else {
            return Ok(Err("the checkpoint has a chat template only for conversations with tools".into()));
        };
        let none = Value::Null;
        let mut variables: Vec<(&str, &Value)> =
            self.variables.iter().map(|(name, value)| (name.as_str(), value)).collect();
        variables.extend([
            ("messages", &conversation.messages),
            ("tools", conversation.tools.as_ref().unwrap_or(&none)),
            ("documents", conversation.documents.as_ref().unwrap_or(&none)),
            ("add_generation_prompt", &Value::Bool(false)),
        ]);
        match on_a_deep_stack(|| jinja::render(template, &variables))? {
            Ok(text) => Ok(Ok(text)),
            Err(fault) if fault.limit => {
                Err(Error::input(format!("the chat template can't be rendered: {fault}"))
                    .file(file)
                    .fix(REMEDY))
            }
            Err(fault) => Ok(Err(format!("the chat template ({}) refuses it: {fault}", file.display()))),
        }
    }

    /// Whether a template asked for the date.
    pub fn asks_for_the_date(&self) -> bool {
        [&self.default, &self.tool_use]
            .into_iter()
            .flatten()
            .any(|named| named.template.mentions("strftime_now"))
    }
}

/// The date that `strftime_now` gives, for messages.
pub const TODAY: &str = jinja::TODAY;

fn on_a_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, work);
        let thread = thread.map_err(|e| Error::run(format!("can't start a thread: {e}")))?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn compiled(name: &str, file: PathBuf, text: &str) -> Result<Named> {
    match on_a_deep_stack(|| jinja::parse(text))? {
        Ok(template) => Ok(Named { file, template }),
        Err(fault) => Err(Error::input(format!("the chat template ({name}) does not compile: {fault}"))
            .file(file)
            .fix(REMEDY)),
    }
}

/// A template in the configuration is a string, which is the default one, or a list of named ones.
fn template_in<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    match value {
        Value::String(template) if name == "default" => Some(template),
        Value::Array(named) => named.iter().rfind(|entry| entry["name"] == name)?["template"].as_str(),
        _ => None,
    }
}

/// The variables that special tokens are: `bos_token` and whatever else ends with `_token`.
fn special_tokens(config: Value, map: &Value) -> Vec<(String, Value)> {
    let mut fields = match config {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    // The map is of old checkpoints; newer ones say everything in the configuration.
    if !fields.contains_key("added_tokens_decoder") {
        fields.extend(map.as_object().cloned().unwrap_or_default());
    }
    if let Some(Value::Object(more)) = fields.remove("extra_special_tokens") {
        fields.extend(more);
    }
    let token = |(name, value): (String, Value)| {
        let text = value.as_str().or(value["content"].as_str())?.to_string();
        name.ends_with("_token").then_some((name, Value::String(text)))
    };
    fields.into_iter().filter_map(token).collect()
}

/// A file's text; nothing where there is no such file.
fn text_in(path: &Path) -> Result<Option<String>> {
    let bad = |what: String| Err(Error::input(what).file(path).fix("download the file again"));
    let is_file = match std::fs::metadata(path) {
        Ok(metadata) => metadata.is_file() && metadata.len() <= LARGEST_FILE,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return bad(format!("can't be read: {e}")),
    };
    if !is_file {
        return bad("not a file of text of sensible size".into());
    }
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(LARGEST_FILE).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(e) => bad(format!("can't be read as text: {e}")),
    }
}

/// A file's JSON; null where there is no such file.
fn json_in(path: &Path) -> Result<Value> {
    let Some(text) = text_in(path)? else { return Ok(Value::Null) };
    serde_json::from_str(&text)
        .map_err(|e| Error::input(format!("not valid JSON: {e}")).file(path).fix("download the file again"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conversation(messages: Value) -> Conversation {
        Conversation { messages, tools: None, documents: None }
    }

    /// A directory with these files.
    fn model(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn rendered(template: &str, messages: Value) -> Result<Result<String, String>> {
        let dir = model(&[("chat_template.jinja", template)]);
        ChatTemplate::of(dir.path())?.unwrap().render(&conversation(messages))
    }

    #[test]
    fn special_tokens_are_variables() {
        let template =
            "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token is defined }}|{{ unk_token }}";
        let config = json!({"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>",
            "image_token": "<img>", "pad_token": null});
        let map = json!({"eos_token": {"content": "<end>"}, "unk_token": "<unk>"}).to_string();
        let old = model(&[("tokenizer_config.json", &config.to_string()), ("special_tokens_map.json", &map)]);
        let text = |dir: &tempfile::TempDir| {
            ChatTemplate::of(dir.path()).unwrap().unwrap().render(&conversation(json!([]))).unwrap().unwrap()
        };
        assert_eq!(text(&old), "<s>|<end>|<img>|False|<unk>");
        let mut config = config;
        config["added_tokens_decoder"] = json!({});
        let new = model(&[("tokenizer_config.json", &config.to_string()), ("special_tokens_map.json", &map)]);
        assert_eq!(text(&new), "<s>|</s>|<img>|False|");
    }

    #[test]
    fn a_template_is_chosen_as_transformers_does() {
        let config = json!({"chat_template": [{"name": "rag", "template": "RAG"}, {"name": "tool_use", "template": "TOOLS"},
            {"name": "default", "template": "DEFAULT"}]})
        .to_string();
        let in_config = ("tokenizer_config.json", config.as_str());
        let alone = ("chat_template.jinja", "FILE");
        let more = ("additional_chat_templates/tool_use.jinja", "TOOL FILE");
        for (files, plain, with_tools) in [
            (vec![in_config], "DEFAULT", "TOOLS"),
            (vec![in_config, alone], "FILE", "FILE"),
            (vec![in_config, alone, more], "FILE", "TOOL FILE"),
        ] {
            let template = ChatTemplate::of(model(&files).path()).unwrap().unwrap();
            let mut conversation = conversation(json!([{"role": "user", "content": "a"}]));
            assert_eq!(template.render(&conversation).unwrap().unwrap(), plain);
            conversation.tools = Some(json!([]));
            assert_eq!(template.render(&conversation).unwrap().unwrap(), with_tools);
        }
    }

    #[test]
    fn a_refusal_names_the_template_and_what_it_says() {
        let reason =
            rendered("\n{{ raise_exception('roles must alternate') }}", json!([])).unwrap().unwrap_err();
        for words in ["chat_template.jinja", "roles must alternate", "line 2"] {
            assert!(reason.contains(words), "{reason}");
        }
    }

    #[test]
    fn what_can_not_be_compiled_or_read_is_an_error() {
        let many = |part: &str| format!("{{{{ {}1 }}}}", part.repeat(60_000));
        let bad =
            ["{% for %}", "{{ 'a", &many("1+"), &many("not "), &many("-"), &many("("), &"x".repeat(2 << 20)];
        for template in bad {
            let error = rendered(template, json!([])).unwrap_err();
            assert_eq!(error.exit, crate::error::ExitCode::Input);
            let error = error.to_string();
            assert!(
                error.contains("chat_template.jinja") && error.contains("calibrate with text"),
                "{error}"
            );
        }
        let dir = model(&[("tokenizer_config.json", "{oops")]);
        assert!(ChatTemplate::of(dir.path()).err().unwrap().to_string().contains("tokenizer_config.json"));
    }

    #[test]
    fn a_template_without_end_is_an_error_within_seconds() {
        let began = std::time::Instant::now();
        for template in [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
            "{% set n = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "{% set n = namespace(s=[1]) %}{% for i in range(100) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
            "{% set n = namespace(s=[1]) %}{% for i in range(100) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s | tojson }}",
            "{% set n = namespace(s=[1]) %}{% for i in range(100) %}{% set n.s = [n.s, n.s] %}{% endfor %}{% set a = n.s %}{% set n.s = [1] %}{% for i in range(100) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s == a }}",
            "{{ 'a\\nb' | indent(4000000000) }}",
            "{{ ['a'] | tojson(indent=4000000000) }}",
            "{{ 'a' * 10000000000 }}",
            "{{ [1] * 10000000000 }}",
            "{{ 'a'.center(10000000000) }}",
            "{{ 'a'.replace('', 'b' * 20000000) * 30 }}",
            "{{ ('a' * 90000000).split('a') }}",
            "{{ [1] | batch(10000000000, 0) | list }}",
        ] {
            let error = rendered(template, json!([])).expect_err(template);
            assert!(error.to_string().contains("chat_template.jinja"), "{error}");
        }
        for template in [
            "{{ '%999999999d' | format(1) }}",
            "{{ '{:999999999}'.format(1) }}",
            "{{ range(1000000) }}",
            "{% set n = namespace(s=[1]) %}{% for i in range(99999) %}{% set n.s = [n.s, n.s] %}{% endfor %}",
            "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
            "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
            "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        ] {
            assert!(rendered(template, json!([])).unwrap().is_err(), "{template}");
        }
        assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
    }

    /// tests/fixtures/make_templates.py says where the expected ids come from.
    #[test]
    fn templates_of_many_families_give_the_tokens_that_transformers_gives() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates");
        let read = |name: &str| json_in(&fixtures.join(name)).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(fixtures.join("tokenizer.json")).unwrap();
        let (conversations, expected) = (read("conversations.json"), read("expected.json"));
        let bos = json!({"__type": "AddedToken", "content": "<s>", "special": true});
        let config = json!({"bos_token": bos, "eos_token": "</s>", "unk_token": null}).to_string();
        let (mut rendered, mut refused) = (0, 0);
        for (family, expected) in expected.as_object().unwrap() {
            let text = std::fs::read_to_string(fixtures.join(format!("{family}.jinja"))).unwrap();
            let dir = model(&[("tokenizer_config.json", &config), ("chat_template.jinja", &text)]);
            let template = ChatTemplate::of(dir.path()).unwrap().unwrap();
            for ((name, row), expected) in
                conversations.as_object().unwrap().iter().zip(expected.as_array().unwrap())
            {
                let conversation = Conversation::of_row(&row["messages"], row).unwrap();
                match template.render(&conversation).unwrap() {
                    Ok(text) => {
                        let ids = tokenizer.encode_fast(text.as_str(), false).unwrap();
                        assert_eq!(&json!(ids.get_ids()), expected, "{family}, {name}: {text}");
                        rendered += 1;
                    }
                    Err(reason) => {
                        assert!(expected.is_null(), "{family}, {name}: {reason}");
                        refused += 1;
                    }
                }
            }
        }
        assert!(rendered > 900 && refused > 200, "{rendered} rendered, {refused} refused");
    }

    #[test]
    fn expressions_and_statements_print_what_jinja2_prints() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates");
        let data = json_in(&fixtures.join("expressions.json")).unwrap();
        let context: Vec<(&str, &Value)> =
            data["context"].as_object().unwrap().iter().map(|(name, value)| (name.as_str(), value)).collect();
        let templates = data["templates"].as_object().unwrap();
        for (template, expected) in templates {
            let rendered = jinja::parse(template).and_then(|parsed| jinja::render(&parsed, &context));
            match rendered {
                Ok(text) => assert_eq!(&Value::String(text), expected, "{template}"),
                Err(fault) => assert!(expected.is_null(), "{template}: {fault}"),
            }
        }
        assert!(templates.len() > 1000, "{}", templates.len());
    }

    #[test]
    fn a_checkpoint_without_a_template_has_none() {
        assert!(ChatTemplate::of(tempfile::tempdir().unwrap().path()).unwrap().is_none());
    }
}
