//! What is mutated, and the command that reads it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Outcome, bytes, json as structure};
use crate::support::{Distq, Random, Scene, digests};

/// A parser: a valid set of files, the one that is damaged, and a command that reads it.
pub struct Target {
    /// What it is called in messages.
    pub name: &'static str,
    /// How many cases of a round are this target's.
    pub weight: usize,
    /// A directory of valid files; each case gets a copy.
    pub base: PathBuf,
    /// The damaged file, by its path in the copy; none where the arguments are.
    pub file: Option<String>,
    /// The damage.
    pub mutate: fn(&[u8], &mut Random) -> Vec<u8>,
    /// The command line, given the copy's directory.
    pub args: fn(&Path, &mut Random) -> Vec<String>,
    /// Arguments at the front that stay as they are where the arguments are damaged.
    pub fixed: usize,
    /// The exit codes that damage may lead to.
    pub codes: &'static [i32],
    /// An error about the input holds one of these words; empty where no file is to be named.
    pub names: &'static [&'static str],
    /// What else must hold: says what does not.
    pub check: fn(&Path, &Outcome) -> Option<String>,
}

/// Whether runs change this file in place, so that a hard link to it would change the original.
pub fn is_written_to(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "out.partial" || part.as_os_str() == "work")
}

const ACCEPTED_OR_REFUSED: &[i32] = &[0, 2, 3, 4];

/// All targets, with their valid files made under `scratch`.
pub fn targets(scratch: &Path) -> Vec<Target> {
    let [model, sharded, fp8, quantized, modelopt, unfinished, texts] =
        ["model", "sharded", "fp8", "quantized", "modelopt", "unfinished", "texts"]
            .map(|name| scratch.join(name));
    make_model(&model);
    make_fp8(&model, &fp8);
    make_sharded(&model, &sharded);
    make_quantized(&model, &quantized, "compressed-tensors");
    make_quantized(&model, &modelopt, "modelopt");
    make_unfinished(&model, &unfinished);
    make_texts(&model, &texts);
    let states = relative(&unfinished, &only_file_ending(&unfinished.join("work"), ".states"));
    let target = |name, weight, base: &Path, file: &str, mutate, args| Target {
        name,
        weight,
        base: base.to_path_buf(),
        file: Some(file.to_string()),
        mutate,
        args,
        fixed: 0,
        codes: ACCEPTED_OR_REFUSED,
        names: &[],
        check: |_, _| None,
    };
    vec![
        Target {
            names: &["config.json", "model.safetensors"],
            ..target("config.json", 6, &model, "model/config.json", structure::json, any_reader)
        },
        Target {
            names: &["index.json", "model-0000"],
            ..target("index", 3, &sharded, "model/model.safetensors.index.json", structure::json, any_reader)
        },
        Target {
            names: &["model.safetensors"],
            ..target("header", 5, &model, "model/model.safetensors", structure::safetensors, any_reader)
        },
        Target {
            names: &["config.json", "model.safetensors"],
            ..target("config.json of FP8", 3, &fp8, "model/config.json", structure::json, any_reader)
        },
        Target {
            names: &["model.safetensors"],
            ..target("header of FP8", 4, &fp8, "model/model.safetensors", structure::safetensors, any_reader)
        },
        Target {
            names: &["tokenizer.json", "text.txt"],
            ..target("tokenizer, BPE", 4, &texts, "model/tokenizer.json", structure::json, plan_text)
        },
        Target {
            names: &["tokenizer.json"],
            ..target("tokenizer, unigram", 3, &texts, "unigram/tokenizer.json", structure::json, plan_unigram)
        },
        Target {
            names: &["tokenizer_config.json", "chat_template"],
            ..target(
                "tokenizer_config.json",
                2,
                &texts,
                "model/tokenizer_config.json",
                structure::json,
                plan_chat,
            )
        },
        Target {
            names: &["chat_template.jinja"],
            ..target("template", 6, &texts, "model/chat_template.jinja", template_text, plan_chat)
        },
        Target {
            names: &["chat.jsonl", "chat_template.jinja"],
            ..target("conversations", 4, &texts, "chat.jsonl", structure::lines, plan_chat)
        },
        Target {
            names: &["calib.jsonl"],
            ..target("token ids", 2, &texts, "calib.jsonl", structure::lines, plan)
        },
        Target { names: &["text.txt"], ..target("text", 1, &texts, "text.txt", plain_text, plan_text) },
        Target {
            names: &["rows.parquet"],
            ..target("Parquet", 4, &texts, "rows.parquet", bytes::bytes, plan_parquet)
        },
        Target {
            codes: &[0, 3, 6],
            names: &["config.json", "model.safetensors"],
            ..target("quantization_config", 4, &quantized, "out/config.json", structure::json, checker)
        },
        Target {
            codes: &[0, 3, 6],
            names: &["hf_quant_config.json", "config.json"],
            ..target(
                "hf_quant_config.json",
                2,
                &modelopt,
                "out/hf_quant_config.json",
                structure::json,
                checker,
            )
        },
        Target {
            codes: &[0, 3, 6],
            names: &["model.safetensors"],
            ..target(
                "quantized header",
                3,
                &quantized,
                "out/model.safetensors",
                structure::safetensors,
                checker,
            )
        },
        Target {
            codes: &[3, 6],
            ..target("quantized bytes", 2, &quantized, "out/model.safetensors", bytes::flip, |room, _| {
                verify(room)
            })
        },
        Target {
            codes: &[0, 2, 3, 5],
            check: same_bytes,
            ..target("journal", 1, &unfinished, "out.partial/distq-journal.jsonl", structure::lines, resume)
        },
        Target {
            codes: &[0, 2, 3, 5],
            check: same_bytes,
            ..target("hidden states", 1, &unfinished, &states, bytes::bytes, resume)
        },
        Target {
            file: None,
            fixed: 1,
            ..target("arguments", 4, &model, "", argument_text, plan_with_options)
        },
    ]
}

fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().expect("scratch paths are UTF-8")
}

fn words(line: &str) -> impl Iterator<Item = String> + '_ {
    line.split_whitespace().map(String::from)
}

/// `distq plan` for an imagined machine, which measures nothing and so takes milliseconds.
fn plan_of(room: &Path, model: &str, calib: &str) -> Vec<String> {
    let mut args = vec!["plan".into(), text(room.join(model)), "--calib".into(), text(room.join(calib))];
    args.extend(words("--nodes 4GiB:cpu --calib-min-tokens 1"));
    args
}

fn plan(room: &Path, _: &mut Random) -> Vec<String> {
    plan_of(room, "model", "calib.jsonl")
}

fn plan_text(room: &Path, _: &mut Random) -> Vec<String> {
    plan_of(room, "model", "text.txt")
}

fn plan_unigram(room: &Path, _: &mut Random) -> Vec<String> {
    plan_of(room, "unigram", "text.txt")
}

fn plan_chat(room: &Path, _: &mut Random) -> Vec<String> {
    plan_of(room, "model", "chat.jsonl")
}

fn plan_parquet(room: &Path, random: &mut Random) -> Vec<String> {
    let mut args = plan_of(room, "model", "rows.parquet");
    if random.below(2) == 0 {
        args.extend(words("--seed 3"));
    }
    args
}

fn plan_with_options(room: &Path, random: &mut Random) -> Vec<String> {
    let mut args = plan(room, random);
    args.extend(words(
        "--memory-per-rank 1GiB --ignore *.down_proj --ignore re:.*layers.1.* --link 10Gbit --layers-per-rank 6 \
         --layout modelopt --scheme nvfp4a16 --method smooth+gptq --calib-samples 5 --calib-max-tokens 100 --seed 1",
    ));
    args
}

/// One of the commands that read a source checkpoint.
fn any_reader(room: &Path, random: &mut Random) -> Vec<String> {
    match random.below(4) {
        0 => vec!["inspect".into(), text(room.join("model"))],
        1 => evaluate(room, "model"),
        _ => plan(room, random),
    }
}

/// One of the commands that read a quantized checkpoint.
fn checker(room: &Path, random: &mut Random) -> Vec<String> {
    match random.below(4) {
        0 => vec!["inspect".into(), text(room.join("out"))],
        1 => evaluate(room, "out"),
        2 => [verify(room), vec!["--source".into(), text(room.join("model"))]].concat(),
        _ => verify(room),
    }
}

fn verify(room: &Path) -> Vec<String> {
    vec!["verify".into(), text(room.join("out"))]
}

fn evaluate(room: &Path, checkpoint: &str) -> Vec<String> {
    let mut args =
        vec!["eval".into(), text(room.join(checkpoint)), "--text".into(), text(room.join("text.txt"))];
    args.extend(words("--window-tokens 16 --windows 1 --device cpu"));
    args
}

fn resume(room: &Path, _: &mut Random) -> Vec<String> {
    let mut args = quantize(room);
    args.push("--resume".into());
    args
}

fn quantize(room: &Path) -> Vec<String> {
    let mut args = vec!["quantize".into(), text(room.join("model")), text(room.join("out"))];
    args.extend([
        "--calib".into(),
        text(room.join("calib.jsonl")),
        "--work-dir".into(),
        text(room.join("work")),
    ]);
    args.extend(words("--calib-min-tokens 1 --method max --device cpu"));
    args
}

/// A run that went on must come to the bytes of a run that was never stopped.
fn same_bytes(room: &Path, outcome: &Outcome) -> Option<String> {
    let expected = room.join("expected");
    (outcome.code == Some(0) && digests(&room.join("out")) != digests(&expected))
        .then(|| "the resumed run came to other bytes".into())
}

fn template_text(valid: &[u8], random: &mut Random) -> Vec<u8> {
    const WORDS: &[&str] = &[
        "{% for a in range(99999) %}",
        "{% for b in range(99999) %}",
        "{% endfor %}",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "-",
        "{% set x = x ~ x %}",
        "{{ x|indent(4000000000) }}",
        "{{ '%999999999d' % 1 }}",
        "1+",
        "not ",
        "(",
        "[",
        "|upper",
        ".a",
        "~",
        "{{ raise_exception('no') }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% if ",
        "messages",
        "{{ 'a' * 10000000000 }}",
        "{{ messages|tojson(indent=100000) }}",
        "{% include 'x' %}",
        "loop.index0",
        "{{ strftime_now('%Y') }}",
        "namespace(a=1)",
        "[::-1]",
        "{{ ''.join([]) }}",
        "\u{7f}",
    ];
    bytes::text(valid, WORDS, random)
}

fn plain_text(valid: &[u8], random: &mut Random) -> Vec<u8> {
    bytes::text(valid, &["\u{feff}", "\r\n\r\n", "\n\n", "\u{0}"], random)
}

fn argument_text(valid: &[u8], random: &mut Random) -> Vec<u8> {
    const WORDS: &[&str] = &[
        "-1",
        "0",
        "18446744073709551616",
        "GiB",
        "TiB",
        ",",
        ":",
        "*",
        "re:",
        "(",
        "\\",
        "((a+)+)+",
        "{9999}",
        "\\w{900}",
        "cpu",
        "uma",
        "gpu",
        "Gbit",
        "1e308",
        "nan",
        ".",
        "/",
        "--",
        "999999999999999",
        "=",
        "+",
        "é",
    ];
    bytes::text(valid, WORDS, random)
}

/// A model with weights, token ids and text.
fn make_model(base: &Path) {
    let scene = Scene::new();
    fs::create_dir_all(base).unwrap();
    copy(&scene.model(), &base.join("model"));
    fs::copy(scene.calib(), base.join("calib.jsonl")).unwrap();
    fs::write(base.join("text.txt"), "the cat sat on the mat and the cat ate the rat\n".repeat(8)).unwrap();
    fs::write(base.join("model/tokenizer.json"), byte_level().to_string()).unwrap();
}

/// A model whose linears are FP8 in blocks, with the texts of `model` and tokens below 64, its vocabulary.
fn make_fp8(model: &Path, base: &Path) {
    copy(model, base);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8/block_partial/fp8");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture.join(name), base.join("model").join(name)).unwrap();
    }
    let tokenizer = byte_level().to_string().replace("100", "50");
    fs::write(base.join("model/tokenizer.json"), tokenizer).unwrap();
    let line = json!({"input_ids": (0..40).collect::<Vec<u32>>()});
    fs::write(base.join("calib.jsonl"), format!("{line}\n").repeat(3)).unwrap();
}

/// The same model in two files with an index.
fn make_sharded(model: &Path, base: &Path) {
    copy(model, base);
    let whole = base.join("model/model.safetensors");
    let bytes = fs::read(&whole).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    for (number, halves) in [(1, 0), (2, 1)] {
        let name = format!("model-0000{number}-of-00002.safetensors");
        let mine =
            read.tensors().into_iter().enumerate().filter(|(i, _)| i % 2 == halves).map(|(_, tensor)| tensor);
        let mine: Vec<_> = mine.collect();
        map.extend(mine.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        safetensors::serialize_to_file(mine, None, &base.join("model").join(&name)).unwrap();
    }
    fs::remove_file(whole).unwrap();
    let index = json!({"metadata": {"total_size": bytes.len()}, "weight_map": map});
    fs::write(base.join("model/model.safetensors.index.json"), index.to_string()).unwrap();
}

/// The model beside what it was quantized to.
fn make_quantized(model: &Path, base: &Path, layout: &str) {
    copy(model, base);
    fs::create_dir_all(base.join("work")).unwrap();
    let mut args = quantize(base);
    args.extend(["--layout".into(), layout.into()]);
    let outcome = super::run(&args);
    assert_eq!(outcome.code, Some(0), "{}", outcome.said);
}

/// A run that found the disk full after a few layers, beside what it should have come to.
fn make_unfinished(model: &Path, base: &Path) {
    make_quantized(model, base, "compressed-tensors");
    fs::rename(base.join("out"), base.join("expected")).unwrap();
    let size = fs::metadata(base.join("expected/model.safetensors")).unwrap().len();
    let stopped = Distq::from(quantize(base))
        .broken(0, &format!("SHIM_FILE=model.safetensors SHIM_WRITE={}", size / 2))
        .run();
    assert_eq!(stopped.code, 5, "{}", stopped.stderr);
}

/// Texts, conversations and rows, with tokenizers and a template that read them.
fn make_texts(model: &Path, base: &Path) {
    copy(model, base);
    let chat = [
        json!({"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat <b>"}]}),
        json!({"messages": [
            {"role": "system", "content": "the"},
            {"role": "user", "content": [{"type": "text", "text": "rat"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": 1.5, "b": ["c"]}}}]},
            {"role": "tool", "name": "f", "content": "mat"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        json!({"text": "the mat"}),
    ];
    fs::write(base.join("chat.jsonl"), chat.iter().map(|row| format!("{row}\n")).collect::<String>())
        .unwrap();
    let template = "{%- if tools %}{{ tools|tojson(indent=2) }}{% endif %}\n{%- for m in messages -%}\n\
        {{ bos_token if loop.first }}<{{ m.role|upper }}>\n{%- if m.content is string %}{{ m['content'].strip() }}\n\
        {%- else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}\n\
        {%- for call in m.tool_calls or [] %}{{ call.function|tojson }}{% endfor %}{{ '%s|%d' % (m.role, loop.index) }}\n\
        {%- endfor %}{% set ns = namespace(n=0) %}{% set ns.n = messages|length %}{{ ns.n }}";
    fs::write(base.join("model/chat_template.jinja"), template).unwrap();
    let config = json!({
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "model_max_length": 1e30,
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": false,
        "added_tokens_decoder": {"100": {"content": "<s>", "special": true}},
    });
    fs::write(base.join("model/tokenizer_config.json"), config.to_string()).unwrap();
    copy(&base.join("model"), &base.join("unigram"));
    fs::write(base.join("unigram/tokenizer.json"), unigram().to_string()).unwrap();
    fs::write(base.join("rows.parquet"), parquet_rows()).unwrap();
}

/// A small byte-level BPE tokenizer with what real ones have.
fn byte_level() -> serde_json::Value {
    let letters = "abcdefghijklmnopqrstuvwxyzĠĊ".chars().map(String::from);
    let merges = [["t", "h"], ["th", "e"], ["a", "t"], ["Ġ", "the"], ["c", "at"]];
    let vocab: serde_json::Map<String, serde_json::Value> = letters
        .chain(merges.iter().map(|pair| pair.concat()))
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 100, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"String": "\u{a0}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\s?\\p{L}+|[^\\s\\p{L}]+|\\s+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [100], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
}

/// A small unigram tokenizer, as SentencePiece models become.
fn unigram() -> serde_json::Value {
    // The length of a trie of zeros in base64, and the trie: it replaces nothing.
    let charsmap = format!("AAQAAA{}=", "A".repeat(1365));
    let pieces = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁cat", "at", "a", "c", "e", "h", "t", "s"];
    let vocab: Vec<_> =
        pieces.iter().enumerate().map(|(i, piece)| json!([piece, -(i as f64) / 3.0])).collect();
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "</s>"},
        "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": true,
            "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": charsmap}, {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab": vocab},
    })
}

/// Rows of text with a null among them, in one compressed column.
fn parquet_rows() -> Vec<u8> {
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    let schema =
        parquet::schema::parser::parse_message_type("message schema { OPTIONAL BYTE_ARRAY text (UTF8); }");
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut writer =
        SerializedFileWriter::new(Vec::new(), schema.unwrap().into(), properties.into()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let rows: Vec<ByteArray> = ["the cat sat", "on the mat", "the rat"].map(ByteArray::from).to_vec();
    column.typed::<ByteArrayType>().write_batch(&rows, Some(&[1, 1, 0, 1]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.into_inner().unwrap()
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "{} can't be copied", from.display());
}

/// The file below `dir` whose name ends so; the first by name where there are several.
fn only_file_ending(dir: &Path, ending: &str) -> PathBuf {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => dirs.push(path),
                false if path.to_string_lossy().ends_with(ending) => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found.into_iter().next().expect("the stopped run kept hidden states")
}

fn relative(base: &Path, path: &Path) -> String {
    text(path.strip_prefix(base).unwrap().to_path_buf())
}
