//! tokenizer.model, SentencePiece's files, as the tokenizer.json that Transformers makes of them.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde_json::{Map, Value, json};

use super::merges::merges;

/// The parts of SentencePiece's protobuf that say how text becomes ids.
#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

// Kinds of pieces and of models in the protobuf.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNIGRAM: i32 = 1;
const BPE: i32 = 2;

/// Stands for a space.
const SPACE: &str = "\u{2581}";

/// The tokenizer.json of a tokenizer.model, with the settings in tokenizer_config.json, and the characters to remove at
/// the beginning of a text: where the library removes them, it puts no space before the first word.
///
/// # Errors
/// What is wrong with it.
pub fn converted(model: &[u8], config: &Value) -> Result<(Value, &'static [char]), String> {
    let model = Model::decode(model).map_err(|e| format!("not a SentencePiece file: {e}"))?;
    let trainer = model.trainer.unwrap_or_default();
    if trainer.treat_whitespace_as_suffix.unwrap_or(false) {
        return Err("it writes spaces behind words, which is not supported".into());
    }
    let pieces: Vec<(&str, f32, i32)> = model
        .pieces
        .iter()
        .map(|piece| {
            (
                piece.piece.as_deref().unwrap_or_default(),
                piece.score.unwrap_or(0.0),
                piece.kind.unwrap_or(NORMAL),
            )
        })
        .collect();
    let ids: HashMap<&str, usize> = pieces.iter().enumerate().map(|(id, (piece, ..))| (*piece, id)).collect();
    let unknown = usize::try_from(trainer.unk_id.unwrap_or(0)).ok().filter(|&id| id < pieces.len());
    let unknown = unknown.ok_or("it has no piece for what is unknown")?;
    let byte_fallback = trainer.byte_fallback.unwrap_or(false);
    let vocabulary = match trainer.model_type.unwrap_or(UNIGRAM) {
        UNIGRAM => json!({
            "type": "Unigram",
            "unk_id": unknown,
            "byte_fallback": byte_fallback,
            "vocab": pieces
                .iter()
                .map(|(piece, score, _)| json!([piece, score]))
                .collect::<Vec<_>>(),
        }),
        BPE => {
            let made = pieces.iter().filter(|(.., kind)| [NORMAL, USER_DEFINED].contains(kind));
            let merges = merges(&ids, made.map(|(piece, ..)| *piece), |_, _, left| left.len())?;
            let vocab: Map<String, Value> =
                ids.iter().map(|(piece, id)| (piece.to_string(), (*id).into())).collect();
            json!({
                "type": "BPE",
                "unk_token": pieces[unknown].0,
                "fuse_unk": true,
                "byte_fallback": byte_fallback,
                "vocab": vocab,
                "merges": merges,
            })
        }
        other => return Err(format!("its model type is {other}: unigram (1) and BPE (2) are supported")),
    };
    let normalizer = model.normalizer.unwrap_or_default();
    let removes_spaces = normalizer.remove_extra_whitespaces.unwrap_or(true);
    let added: Vec<Value> = pieces
        .iter()
        .enumerate()
        .filter(|(_, (.., kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
        .map(|(id, (piece, _, kind))| added(id, piece, *kind != USER_DEFINED))
        .map(|mut token| {
            // Spaces are removed at the ends of the text and not of what stands between tokens of the user's: such
            // tokens are looked for afterwards.
            token["normalized"] = (removes_spaces && token["special"] == false).into();
            token
        })
        .collect();
    let special = |id: Option<i32>, default| {
        let id = usize::try_from(id.unwrap_or(default)).ok()?;
        Some((pieces.get(id)?.0, id))
    };
    let wanted = |key: &str, default| config[key].as_bool().unwrap_or(default);
    let first = special(trainer.bos_id, 1).filter(|_| wanted("add_bos_token", true));
    let last = special(trainer.eos_id, 2).filter(|_| wanted("add_eos_token", false));
    let prefix = wanted("add_prefix_space", normalizer.add_dummy_prefix.unwrap_or(true));
    let scheme = match (prefix, wanted("legacy", false)) {
        (false, _) => "never",
        (true, false) => "first",
        (true, true) => "always",
    };
    let has_map = normalizer.charsmap.as_ref().is_some_and(|charsmap| !charsmap.is_empty());
    let removed: &[char] = match (removes_spaces, has_map) {
        (false, _) => &[],
        (true, false) => &[' '],
        // Maps of characters make spaces of all of these.
        (true, true) => &[' ', '\n', '\r', '\t'],
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers(&normalizer, removes_spaces)},
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false},
        "post_processor": frame(first, last),
        "decoder": null,
        "model": vocabulary,
    });
    Ok((json, removed))
}

fn normalizers(normalizer: &Normalizer, removes_spaces: bool) -> Vec<Value> {
    let mut steps = Vec::new();
    if let Some(charsmap) = normalizer.charsmap.as_ref().filter(|charsmap| !charsmap.is_empty()) {
        steps.push(json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(charsmap)}));
    }
    if removes_spaces {
        steps.push(json!({"type": "Replace", "pattern": {"Regex": "\\A +| +\\z"}, "content": ""}));
        steps.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    steps
}

/// An entry of tokenizer.json's added tokens.
pub fn added(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}

/// What puts special tokens around a text.
pub fn frame(first: Option<(&str, usize)>, last: Option<(&str, usize)>) -> Value {
    let token = |token: Option<(&str, usize)>| {
        token.map(|(content, _)| json!({"SpecialToken": {"id": content, "type_id": 0}}))
    };
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let special: Map<String, Value> = [first, last]
        .into_iter()
        .flatten()
        .map(|(content, id)| (content.to_string(), json!({"id": content, "ids": [id], "tokens": [content]})))
        .collect();
    let parts: Vec<Value> = [token(first), Some(text), token(last)].into_iter().flatten().collect();
    json!({"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": special})
}
