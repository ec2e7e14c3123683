use serde::Deserialize;
use serde_json::json;

use super::*;
use crate::confined::Limits;

/// What tests/fixtures/make_tokenizers.py wrote: ids that other programs make of texts.
#[derive(Deserialize)]
struct Case {
    file: String,
    name: String,
    others: serde_json::Map<String, Value>,
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers").join(name)
}

#[test]
fn ids_are_those_of_other_programs() {
    let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(fixture("ids.json")).unwrap()).unwrap();
    for case in cases {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(&case.file), dir.path().join(&case.name)).unwrap();
        for (name, content) in &case.others {
            std::fs::write(dir.path().join(format!("{name}.json")), content.to_string()).unwrap();
        }
        let tokenizer = Tokenizer::of(dir.path()).unwrap();
        for (text, ids) in case.texts.iter().zip(&case.ids) {
            let others = serde_json::to_string(&case.others).unwrap();
            assert_eq!(
                &tokenizer.encode(text, true, 10_000).unwrap(),
                ids,
                "{text:?} {} {others}",
                case.file
            );
        }
    }
}

#[test]
fn the_beginning_of_a_long_text_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("bpe.model"), dir.path().join("tokenizer.model")).unwrap();
    let tokenizer = Tokenizer::of(dir.path()).unwrap();
    let text = "The man went down to the river, naïve. ".repeat(2000);
    let all = tokenizer.encode(&text, true, usize::MAX).unwrap();
    for enough in [1, 10, 333] {
        let some = tokenizer.encode(&text, true, enough).unwrap();
        assert!(some.len() < all.len() && some[..enough] == all[..enough]);
    }
}

#[test]
fn what_is_wrong_is_told_with_the_remedy() {
    let tekken = |change: Value| {
        let mut made =
            json!({"config": {"pattern": "."}, "vocab": [{"token_bytes": "QQ=="}], "special_tokens": []});
        made.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        made.to_string().into_bytes()
    };
    let long = format!("\n\u{2}\u{8}\n{}", "x".repeat(5));
    for (name, content, words) in [
        ("none", vec![], ["there is no tokenizer.json", "save_pretrained", "input_ids"]),
        ("tokenizer.json", b"{}".to_vec(), ["tokenizer.json", "can't be used", "download"]),
        (
            "tokenizer.model",
            b"hello".to_vec(),
            ["tokenizer.model", "not a SentencePiece file", "save_pretrained"],
        ),
        ("tokenizer.model", vec![], ["tokenizer.model", "no piece", "save_pretrained"]),
        (
            "tokenizer.model",
            long.into_bytes(),
            ["tokenizer.model", "not a SentencePiece file", "save_pretrained"],
        ),
        ("tekken.json", b"[]".to_vec(), ["tekken.json", "not a tekken file", "save_pretrained"]),
        (
            "tekken.json",
            tekken(json!({"vocab": [{"token_bytes": "?"}]})),
            ["tekken.json", "base64", "save_pretrained"],
        ),
        (
            "tekken.json",
            tekken(json!({"vocab": [{"token_bytes": "QUFB".repeat(1000)}]})),
            ["tekken.json", "token of 3000 bytes", "save_pretrained"],
        ),
        (
            "tekken.json",
            tekken(json!({"config": {"pattern": ".", "default_num_special_tokens": 1u64 << 40}})),
            ["tekken.json", "default_num_special_tokens", "save_pretrained"],
        ),
        (
            "tekken.json",
            tekken(json!({"special_tokens": [{"rank": 3, "token_str": "<s>"}]})),
            ["tekken.json", "gaps", "save_pretrained"],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        if name != "none" {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        let error = Tokenizer::of(dir.path()).err().unwrap().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn tokenizers_that_the_library_falls_over_are_errors_that_name_the_file() {
    let regex = |pattern: &str, content: String| json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content});
    let twice = json!({"type": "Sequence", "normalizers": vec![regex(".", "x".repeat(30)); 8]});
    let sequence = json!([{"Sequence": {"id": "B", "type_id": 0}}]);
    for (part, value) in [
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        (
            "post_processor",
            json!({"type": "TemplateProcessing", "single": sequence, "pair": [], "special_tokens": {}}),
        ),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="})),
        ("normalizer", twice),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut json: Value = serde_json::from_slice(&std::fs::read(fixture("words.json")).unwrap()).unwrap();
        json[part] = value;
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let model = dir.path().to_path_buf();
        let text = "a b c ".repeat(100);
        let error = confined::run(Limits::USUAL, move || Tokenizer::of(&model)?.encode(&text, true, 1000))
            .unwrap_err();
        let text = error.to_string();
        assert!(
            error.exit == crate::error::ExitCode::Input && text.contains("tokenizer.json"),
            "{part}: {text}"
        );
    }
}
