//! `distq eval`, and what it, `verify` and `inspect` refuse.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Distq, Random, Scene, change_safetensors};

/// A scene whose model has a tokenizer, of one word a token, and a text of ten windows of 32 tokens.
fn scene() -> Scene {
    let scene = Scene::new();
    let vocab: serde_json::Map<String, Value> = (0..128).map(|i| (format!("w{i}"), i.into())).collect();
    write_tokenizer(&scene.model(), &vocab);
    let mut random = Random::new(5);
    let words: Vec<String> = (0..10 * 32).map(|_| format!("w{}", random.next() % 128)).collect();
    fs::write(scene.path("text.txt"), words.join(" ")).unwrap();
    scene
}

fn write_tokenizer(dir: &Path, vocab: &serde_json::Map<String, Value>) {
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null, "decoder": null, "truncation": null, "padding": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// `distq eval` of directories of a scene.
fn eval(scene: &Scene, checkpoints: &[&str]) -> Distq {
    let run = Distq::new(&["eval"]).arg("--text").arg(scene.path("text.txt"));
    let run = run.args(["--window-tokens", "32", "--device", "cpu"]);
    checkpoints.iter().fold(run, |run, name| run.arg(scene.path(name)))
}

fn copy(scene: &Scene, from: &str, to: &str) {
    fs::create_dir(scene.path(to)).unwrap();
    for entry in fs::read_dir(scene.path(from)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), scene.path(to).join(entry.file_name())).unwrap();
    }
}

fn change_config(scene: &Scene, name: &str, change: impl FnOnce(&mut Value)) {
    let path = scene.path(name).join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn any_number_of_ranks_measures_the_same_and_a_reference_is_measured_once() {
    let scene = scene();
    scene.quantize("out").args(["--method", "max"]).succeed();
    let run = eval(&scene, &["model", "out", "out/../out"]).arg("--reference").arg(scene.path("model"));
    let alone = run.clone().args(["--json"]).succeed().json();
    let models = alone["models"].as_array().unwrap();
    assert_eq!(models.len(), 2, "each directory once: {alone}");
    assert!(models[0]["mean_kl"].is_null() && models[0]["loss_error"].as_f64().unwrap() > 0.0, "{alone}");
    assert!(models[1]["mean_kl"].as_f64().unwrap() > 0.0, "{alone}");
    let three = run.clone().args(["--json"]).ranks(3).succeed().json();
    for (one, other) in models.iter().zip(three["models"].as_array().unwrap()) {
        for field in ["loss", "loss_error", "perplexity", "mean_kl", "mean_kl_error", "p99_kl", "top1"] {
            assert_eq!(one[field], other[field], "{field}");
        }
    }
    let table = run.succeed().stdout;
    assert_eq!(table.matches("(reference)").count(), 1, "{table}");
}

#[test]
fn a_padded_vocabulary_is_compared_over_its_common_part() {
    let scene = scene();
    copy(&scene, "model", "padded");
    change_safetensors(&scene.path("padded/model.safetensors"), |tensors| {
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let (_, shape, bytes) = tensors.get_mut(name).unwrap();
            let row = bytes.len() / shape[0];
            bytes.extend(bytes[..24 * row].to_vec());
            shape[0] += 24;
        }
    });
    change_config(&scene, "padded", |config| config["vocab_size"] = 152.into());
    for (model, reference) in [("model", "padded"), ("padded", "model")] {
        let run = eval(&scene, &[model]).arg("--reference").arg(scene.path(reference)).args(["--json"]);
        let found = run.succeed().json()["models"][1].clone();
        assert_eq!(found["top1"], 1.0, "{found}");
        assert!(found["mean_kl"].as_f64().unwrap().abs() < 1e-6, "{found}");
        assert!(found["notes"][0].as_str().unwrap().contains("the first 128 are compared"), "{found}");
    }
}

#[test]
fn a_perplexity_beyond_numbers_is_a_result_and_a_loss_that_is_none_is_refused() {
    let scene = scene();
    let set_norm = |value: f32| {
        change_safetensors(&scene.weights(), |tensors| {
            let (_, _, bytes) = tensors.get_mut("model.norm.weight").unwrap();
            *bytes = half::bf16::from_f32(value).to_le_bytes().repeat(bytes.len() / 2);
        })
    };
    set_norm(3e4);
    for ranks in [None, Some(2)] {
        let run = eval(&scene, &["model"]);
        let run = if let Some(ranks) = ranks { run.ranks(ranks) } else { run };
        let found = run.clone().args(["--json"]).succeed().json()["models"][0].clone();
        assert!(found["perplexity"].is_null() && found["loss"].as_f64().unwrap() > 709.0, "{found}");
        let table = run.succeed().stdout;
        assert!(table.contains(" inf ") && table.contains("the mean loss is"), "{table}");
    }
    set_norm(f32::NAN);
    let ended = eval(&scene, &["model"]).ranks(2).run();
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(ended.stderr.contains("the loss is NaN at token"), "{}", ended.stderr);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_computed() {
    let scene = scene();
    scene.quantize("out").args(["--method", "max"]).succeed();
    for (field, value) in [("num_key_value_heads", 4), ("num_hidden_layers", 3), ("vocab_size", 1 << 30)] {
        copy(&scene, "out", "changed");
        change_config(&scene, "changed", |config| config[field] = value.into());
        let ended = eval(&scene, &["model", "changed"]).run();
        assert_eq!((ended.code, ended.messages().len()), (3, 1), "{}", ended.stderr);
        assert!(ended.stderr.contains("tensor ") && ended.stderr.contains("changed"), "{}", ended.stderr);
        fs::remove_dir_all(scene.path("changed")).unwrap();
    }
    // FP8 linears beside NVFP4.
    change_config(&scene, "out", |config| {
        let groups = &mut config["quantization_config"]["config_groups"];
        groups["group_1"] = json!({"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8}});
    });
    let ended = eval(&scene, &["out"]).run();
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("layers.0.self_attn.q_proj is FP8, which distq can't evaluate"),
        "{}",
        ended.stderr
    );
    // A tokenizer that numbers words otherwise.
    copy(&scene, "model", "other");
    let vocab = (0..128).map(|i| (format!("w{i}"), (127 - i).into())).collect();
    write_tokenizer(&scene.path("other"), &vocab);
    let ended = eval(&scene, &["model", "other"]).run();
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(ended.stderr.contains("its tokenizer makes other tokens"), "{}", ended.stderr);
    // No tokenizer: nothing is said of options that eval does not have.
    fs::remove_file(scene.model().join("tokenizer.json")).unwrap();
    let ended = eval(&scene, &["model"]).run();
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("copy tokenizer.json") && !ended.stderr.contains("--calib"),
        "{}",
        ended.stderr
    );
}

#[test]
fn what_is_no_checkpoint_is_unusable_input_for_every_command() {
    let scene = scene();
    fs::create_dir(scene.path("empty")).unwrap();
    for name in ["missing", "calib.jsonl", "empty"] {
        for command in ["verify", "inspect"] {
            let ended = Distq::new(&[command]).arg(scene.path(name)).run();
            assert_eq!((ended.code, ended.messages().len()), (3, 1), "{command} {name}: {ended:?}");
            assert_eq!(ended.stdout, "");
        }
        let ended = eval(&scene, &["model", name]).run();
        assert_eq!((ended.code, ended.messages().len()), (3, 1), "{name}: {ended:?}");
        assert!(ended.stderr.contains(name), "{}", ended.stderr);
    }
}

#[test]
fn hosts_whose_copies_differ_are_told_so() {
    let scene = scene();
    copy(&scene, "model", "other");
    change_safetensors(&scene.path("other/model.safetensors"), |tensors| {
        tensors.get_mut("model.norm.weight").unwrap().0 = Dtype::F16;
    });
    let mut command = crate::support::mpirun();
    for (i, model) in ["model", "other"].into_iter().enumerate() {
        command.args(if i == 0 { &["-np", "1"][..] } else { &[":", "-np", "1"] });
        command.arg(env!("CARGO_BIN_EXE_distq")).arg("eval").arg(scene.path(model)).arg("--text");
        command.arg(scene.path("text.txt")).args(["--device", "cpu", "--window-tokens", "32"]);
    }
    let ended = command.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(3), "{said}");
    assert!(said.contains("ranks 0 and 1 have different checkpoints"), "{said}");
}
