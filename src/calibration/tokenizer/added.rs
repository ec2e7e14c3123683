//! Tokens that stand beside the tokenizer: in tokenizer_config.json, added_tokens.json and special_tokens_map.json.
//! Transformers adds them when it loads a tokenizer, in this order.

use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::json_in;

/// The names under which tokenizer_config.json has single special tokens.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The names under which it has lists of them.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Adds them to the tokenizer of the checkpoint in `model`. Tokens that it has keep their ids, others get the next ones.
///
/// # Errors
/// What is wrong with them.
pub fn add(tokenizer: &mut Tokenizer, model: &Path, config: &Value) -> Result<(), String> {
    let map = json_in(&model.join("special_tokens_map.json"));
    let decoder = config["added_tokens_decoder"].as_object();
    // Where the configuration has no list of its own, the older files count.
    let sources: &[&Value] = if decoder.is_some() { &[config] } else { &[&map, config] };
    let named = NAMED.iter().filter_map(|key| sources.iter().find_map(|source| token(&source[*key], true)));
    let lists =
        LISTS.iter().flat_map(|key| sources.iter().filter_map(|source| source[*key].as_array())).flatten();
    let special: Vec<AddedToken> = named.chain(lists.filter_map(|value| token(value, true))).collect();

    let mut numbered: Vec<(u64, AddedToken)> = match decoder {
        Some(decoder) => {
            let entries = decoder.iter().map(|(id, value)| {
                let id = id.parse().map_err(|_| format!("added_tokens_decoder has the id {id:?}"))?;
                let token =
                    token(value, false).ok_or(format!("added_tokens_decoder has no token for id {id}"))?;
                Ok((id, token))
            });
            entries.collect::<Result<_, String>>()?
        }
        None => json_in(&model.join("added_tokens.json"))
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(content, id)| {
                let is_special = special.iter().any(|token| token.content == *content);
                Some((id.as_u64()?, AddedToken::from(content, is_special)))
            })
            .collect(),
    };
    numbered.sort_by_key(|(id, _)| *id);
    let mut tokens: Vec<AddedToken> = numbered.into_iter().map(|(_, token)| token).collect();
    let known = tokenizer.get_added_tokens_decoder();
    for token in special {
        match tokens.iter_mut().find(|known| known.content == token.content) {
            Some(known) => known.special = true,
            None if known.values().any(|known| known.content == token.content) => {}
            None => tokens.push(token),
        }
    }
    tokenizer.add_tokens(tokens).map(|_| ()).map_err(|e| e.to_string())
}

/// A token is written as a string, or as an object with its properties.
fn token(value: &Value, is_special: bool) -> Option<AddedToken> {
    if let Some(content) = value.as_str() {
        return Some(AddedToken::from(content, true));
    }
    let flag = |key: &str, default| value[key].as_bool().unwrap_or(default);
    let special = is_special || flag("special", false);
    Some(
        AddedToken::from(value["content"].as_str()?, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}
