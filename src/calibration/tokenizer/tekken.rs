//! tekken.json, Mistral's files of byte-level tokens, as the tokenizer.json that Transformers makes of them.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::merges::merges;

#[derive(Deserialize)]
struct Tekken {
    config: Config,
    vocab: Vec<Token>,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: Option<usize>,
    default_num_special_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Token {
    token_bytes: String,
}

#[derive(Deserialize)]
struct Special {
    rank: usize,
    token_str: String,
}

/// The special tokens of files from before they were listed, in order.
const UNLISTED: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// Reserved ids beyond what vocabularies have are no vocabulary.
const MOST: usize = 1 << 20;

/// The tokenizer.json of a tekken.json. Special tokens come first; the others follow by rank.
///
/// # Errors
/// What is wrong with it.
pub fn converted(tekken: &[u8]) -> Result<Value, String> {
    let tekken: Tekken = serde_json::from_slice(tekken).map_err(|e| format!("not a tekken file: {e}"))?;
    let special = specials(&tekken)?;
    let kept = match tekken.config.default_vocab_size {
        Some(size) => {
            size.checked_sub(special.len()).ok_or("its special tokens are more than default_vocab_size")?
        }
        None => tekken.vocab.len(),
    };
    let letters = letters();
    let written = |token: &Token| {
        let bytes =
            STANDARD.decode(&token.token_bytes).map_err(|e| format!("token_bytes is not base64: {e}"))?;
        Ok(bytes.into_iter().map(|byte| letters[byte as usize]).collect())
    };
    let tokens: Vec<String> = tekken.vocab.iter().take(kept).map(written).collect::<Result<_, String>>()?;
    let ranks: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(rank, token)| (token.as_str(), rank)).collect();
    let merges = merges(&ranks, tokens.iter().map(String::as_str), |left, right, _| (left, right))?;
    let mut vocab: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(rank, token)| (token.clone(), (rank + special.len()).into()))
        .collect();
    vocab.extend(special.iter().enumerate().map(|(id, token)| (token.clone(), id.into())));
    let level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex});
    let added: Vec<Value> =
        special.iter().enumerate().map(|(id, token)| super::sentencepiece::added(id, token, true)).collect();
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tekken.config.pattern}, "behavior": "Isolated", "invert": false},
            level(false),
        ]},
        "post_processor": super::sentencepiece::frame(special.iter().position(|token| token == "<s>").map(|id| ("<s>", id)), None),
        "decoder": level(true),
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": true},
    }))
}

/// Special tokens by id: those that are listed, and reserved ones behind them.
fn specials(tekken: &Tekken) -> Result<Vec<String>, String> {
    let mut special: Vec<String> = match &tekken.special_tokens {
        None => UNLISTED.map(String::from).to_vec(),
        Some(listed) => {
            let mut listed: Vec<&Special> = listed.iter().collect();
            listed.sort_by_key(|token| token.rank);
            if listed.iter().enumerate().any(|(index, token)| token.rank != index) {
                return Err("the ranks of its special tokens have gaps".into());
            }
            listed.into_iter().map(|token| token.token_str.clone()).collect()
        }
    };
    let count = tekken.config.default_num_special_tokens.unwrap_or(special.len());
    if count > MOST {
        return Err(format!("default_num_special_tokens is {count}"));
    }
    special.extend((special.len()..count).map(|id| format!("<SPECIAL_{id}>")));
    Ok(special)
}

/// The characters by which byte-level tokenizers write bytes: those that can be printed are themselves.
fn letters() -> [char; 256] {
    let mut others = 0x100..;
    std::array::from_fn(|byte| {
        let is_printed = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if is_printed { byte as u32 } else { others.next().expect("the range has no end") };
        char::from_u32(code).expect("these are characters")
    })
}
