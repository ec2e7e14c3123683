//! Directories as people have them, read as loaders read them: what differs from a clean checkpoint is taken and said, or
//! refused with the field, the file or the tensor that is wrong.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::support::{Case, Distq, Scene, Tensors, digests, set, spoil_weight};

const DOWN: &str = "model.layers.4.mlp.down_proj.weight";
const INDEX: &str = "model.safetensors.index.json";

/// Writes the scene's tensors as shards and removes the single file; returns what an index says of them.
fn shard(scene: &Scene, shards: usize) -> serde_json::Map<String, serde_json::Value> {
    let mut all = Tensors::new();
    scene.change_weights(|tensors| all = tensors.clone());
    fs::remove_file(scene.weights()).unwrap();
    let file = |i: usize| format!("model-{:05}-of-{shards:05}.safetensors", 1 + i % shards);
    for shard in 0..shards {
        let mine = all.iter().enumerate().filter(|(i, _)| i % shards == shard);
        let views = mine.map(|(_, (name, (dtype, shape, bytes)))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &scene.model().join(file(shard))).unwrap();
    }
    all.keys().enumerate().map(|(i, name)| (name.clone(), json!(file(i)))).collect()
}

fn write_index(scene: &Scene, map: &serde_json::Map<String, serde_json::Value>) {
    fs::write(scene.model().join(INDEX), json!({"weight_map": map}).to_string()).unwrap();
}

/// The scene's output without rounding to anything but max scales: the quickest.
fn quick(scene: &Scene, out: &str) -> Distq {
    scene.quantize(out).args(["--scheme", "nvfp4a16", "--method", "max"])
}

const CASES: &[Case] = &[
    Case {
        name: "what is left of another quantization",
        spoil: |s| {
            set(s, "quantization_config", json!({"quant_method": "bitsandbytes", "load_in_4bit": true}))
        },
        args: &[],
        code: 3,
        words: &["quantization_config", "bitsandbytes", "remove", "config.json"],
    },
    Case {
        name: "biases that config.json does not mention",
        spoil: |s| {
            s.change_weights(|t| {
                for (name, rows) in [("q", 64), ("k", 32), ("v", 32), ("o", 64)] {
                    let name = format!("model.layers.3.self_attn.{name}_proj.bias");
                    t.insert(name, (Dtype::BF16, vec![rows], vec![0; 2 * rows]));
                }
            })
        },
        args: &[],
        code: 3,
        words: &["attention_bias is absent in config.json", "set attention_bias to true"],
    },
    Case {
        name: "biases of the MLP in a family that has none",
        spoil: |s| {
            set(s, "architectures", json!(["MistralForCausalLM"]));
            s.change_weights(|t| {
                t.insert("model.layers.0.mlp.down_proj.bias".into(), (Dtype::BF16, vec![64], vec![0; 128]));
            })
        },
        args: &[],
        code: 3,
        words: &["mlp_bias", "MistralForCausalLM has no biases"],
    },
    Case {
        name: "biases that config.json promises",
        spoil: |s| set(s, "mlp_bias", json!(true)),
        args: &[],
        code: 3,
        words: &["missing", "mlp_bias is true", "set mlp_bias to false"],
    },
    Case {
        name: "more layers than config.json says",
        spoil: |s| set(s, "num_hidden_layers", json!(4)),
        args: &[],
        code: 3,
        words: &["num_hidden_layers is 4", "6 layers"],
    },
    Case {
        name: "fewer layers than config.json says",
        spoil: |s| set(s, "num_hidden_layers", json!(9)),
        args: &[],
        code: 3,
        words: &["num_hidden_layers is 9", "6 layers", "missing"],
    },
    Case {
        name: "more layers than anybody can plan for",
        spoil: |s| set(s, "num_hidden_layers", json!(20_000_000)),
        args: &[],
        code: 3,
        words: &["num_hidden_layers is 20000000"],
    },
    Case {
        name: "a vocabulary that overflows",
        spoil: |s| set(s, "vocab_size", json!(1u64 << 60)),
        args: &[],
        code: 3,
        words: &["vocab_size 1152921504606846976"],
    },
    Case {
        name: "another vocabulary",
        spoil: |s| set(s, "vocab_size", json!(130)),
        args: &[],
        code: 3,
        words: &["[128, 64]", "[130, 64]", "vocab_size", "model.embed_tokens.weight"],
    },
    Case {
        name: "no lm_head of its own and no word of a tie",
        spoil: |s| s.change_weights(|t| assert!(t.remove("lm_head.weight").is_some())),
        args: &[],
        code: 3,
        words: &["lm_head.weight", "tie_word_embeddings", "set tie_word_embeddings to true"],
    },
    Case {
        name: "a tie, and an lm_head that is not the embedding",
        spoil: |s| set(s, "tie_word_embeddings", json!(true)),
        args: &[],
        code: 3,
        words: &["lm_head.weight", "Transformers 5", "vLLM", "set tie_word_embeddings to false"],
    },
    Case {
        name: "a single file and the shards of an index",
        spoil: |s| {
            fs::copy(s.weights(), s.model().join("old-1-of-1.safetensors")).unwrap();
            let index = json!({"weight_map": {DOWN: "old-1-of-1.safetensors"}});
            fs::write(s.model().join("model.safetensors.index.json"), index.to_string()).unwrap();
        },
        args: &[],
        code: 3,
        words: &["two sets of weights", "model.safetensors.index.json"],
    },
    Case {
        name: "names for the model inside another",
        spoil: |s| {
            s.change_weights(|t| {
                let all: Vec<_> = std::mem::take(t).into_iter().collect();
                t.extend(all.into_iter().map(|(name, tensor)| (format!("language_model.{name}"), tensor)));
            })
        },
        args: &[],
        code: 3,
        words: &["language_model.model.embed_tokens.weight", "LlamaForCausalLM"],
    },
    Case {
        name: "git-lfs pointers",
        spoil: |s| {
            let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234567\n";
            fs::write(s.weights(), pointer).unwrap();
        },
        args: &[],
        code: 3,
        words: &["git-lfs pointer", "lfs pull", "model.safetensors"],
    },
    Case {
        name: "a side file that is a link to somewhere else",
        spoil: |s| {
            fs::write(s.path("secret"), "key").unwrap();
            std::os::unix::fs::symlink(s.path("secret"), s.model().join("LICENSE")).unwrap();
        },
        args: &[],
        code: 3,
        words: &["LICENSE", "secret", "out of the model's directory"],
    },
    Case {
        name: "a config.json without an end",
        spoil: |s| {
            fs::File::create(s.model().join("config.json")).unwrap().set_len(1 << 40).unwrap();
        },
        args: &[],
        code: 3,
        words: &["config.json", "1.00 TiB"],
    },
    Case {
        name: "names that steer a terminal",
        spoil: |s| {
            s.change_weights(|t| {
                t.insert("\u{1b}[2J\u{9b}31m".into(), (Dtype::BF16, vec![1], vec![0; 2]));
            })
        },
        args: &[],
        code: 3,
        words: &["\\u001b[2J\\u009b31m", "no such tensor"],
    },
    Case {
        name: "NaN in a row of the embedding that nothing reads",
        spoil: |s| {
            fs::write(s.calib(), "{\"input_ids\": [1, 2, 3]}\n").unwrap();
            spoil_weight(s, "model.embed_tokens.weight", 64 * 100 + 7, f32::NAN)
        },
        args: &["--method", "max"],
        code: 5,
        words: &["health check", "row 100, column 7", "model.embed_tokens.weight", "model.safetensors"],
    },
    Case {
        name: "infinity in lm_head",
        spoil: |s| spoil_weight(s, "lm_head.weight", 0, f32::NEG_INFINITY),
        args: &[],
        code: 5,
        words: &["health check", "lm_head.weight"],
    },
    Case {
        name: "NaN in a norm, and no inputs that would show it",
        spoil: |s| spoil_weight(s, "model.layers.2.post_attention_layernorm.weight", 3, f32::NAN),
        args: &["--scheme", "nvfp4a16", "--method", "max"],
        code: 5,
        words: &["health check", "model.layers.2.post_attention_layernorm.weight"],
    },
    Case {
        name: "NaN in a linear that is left alone",
        spoil: |s| spoil_weight(s, DOWN, 5, f32::NAN),
        args: &["--ignore", "model.layers.4.mlp.down_proj", "--scheme", "nvfp4a16", "--method", "max"],
        code: 5,
        words: &["health check", DOWN],
    },
];

#[test]
fn what_is_wrong_is_named_with_its_field_file_or_tensor() {
    for case in CASES {
        let scene = Scene::new();
        (case.spoil)(&scene);
        let mut command = scene.quantize("out");
        for arg in case.args {
            command = command.arg(arg);
        }
        let ended = command.run();
        assert_eq!(ended.code, case.code, "{}: {}", case.name, ended.stderr);
        assert!(!scene.path("out").exists(), "{}: no output directory", case.name);
        let messages = ended.messages();
        assert_eq!(messages.len(), 1, "{}: {}", case.name, ended.stderr);
        for word in case.words {
            assert!(messages[0].contains(word), "{}: no {word:?} in: {}", case.name, messages[0]);
        }
        assert!(messages[0].contains("; "), "{}: a remedy in: {}", case.name, messages[0]);
        assert!(messages[0].len() < 1500 && !messages[0].contains('\u{1b}'), "{}", case.name);
    }
}

#[test]
fn shards_give_the_same_output_with_an_index_without_one_and_with_one_that_is_out_of_step() {
    let scene = Scene::new();
    quick(&scene, "single").succeed();
    let expected = digests(&scene.path("single"));
    let map = shard(&scene, 3);

    let ended = quick(&scene, "without").succeed();
    assert!(ended.stderr.contains("3 shards that count themselves"), "{}", ended.stderr);
    assert_eq!(digests(&scene.path("without")), expected);

    write_index(&scene, &map);
    let ended = quick(&scene, "with").succeed();
    assert!(!ended.stderr.contains("shards"), "nothing to say: {}", ended.stderr);
    assert_eq!(digests(&scene.path("with")), expected);

    // A needed tensor that is not listed, one in another shard, one that nobody needs and no shard holds.
    let mut odd = map.clone();
    odd.remove(DOWN);
    odd["model.norm.weight"] = odd.values().find(|file| **file != map["model.norm.weight"]).unwrap().clone();
    odd.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), map[DOWN].clone());
    write_index(&scene, &odd);
    let ended = quick(&scene, "odd").succeed();
    for word in ["out of step", DOWN, "model.norm.weight", "rotary_emb.inv_freq"] {
        assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
    }
    assert_eq!(digests(&scene.path("odd")), expected);

    fs::remove_file(scene.model().join("model-00002-of-00003.safetensors")).unwrap();
    fs::remove_file(scene.model().join(INDEX)).unwrap();
    let ended = quick(&scene, "incomplete").run();
    assert_eq!(ended.code, 3);
    assert!(ended.messages()[0].contains("model-00002-of-00003.safetensors is missing"), "{}", ended.stderr);
}

#[test]
fn a_copy_of_the_embedding_as_lm_head_of_a_tied_model_is_left_out() {
    let scene = Scene::with(|config| config["tie_word_embeddings"] = json!(true));
    quick(&scene, "tied").succeed();
    scene.change_weights(|tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding);
    });
    let ended = quick(&scene, "copied").succeed();
    assert!(ended.stderr.contains("lm_head.weight is ignored"), "{}", ended.stderr);
    assert_eq!(digests(&scene.path("copied")), digests(&scene.path("tied")));
    Distq::new(&["verify"]).arg(scene.path("copied")).arg("--source").arg(scene.model()).succeed();
}

#[test]
fn side_files_are_carried_over_and_the_rest_is_named() {
    let scene = Scene::new();
    let carried = ["SYSTEM_PROMPT.txt", "additional_chat_templates/tool_use.jinja", "tokenizer.model.v7"];
    let left = ["optimizer.pt", "params.json", "pytorch_model.bin"];
    fs::create_dir(scene.model().join("additional_chat_templates")).unwrap();
    carried.iter().chain(&left).for_each(|name| fs::write(scene.model().join(name), "x").unwrap());
    let ended = quick(&scene, "out").succeed();
    let line = |what: &str| ended.stdout.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_default();
    assert_eq!(line("carried over: "), format!("{}, tokenizer_config.json", carried.join(", ")));
    assert_eq!(line("left behind: "), left.join(", "));
    for name in carried {
        assert_eq!(fs::read(scene.path("out").join(name)).unwrap(), b"x", "{name}");
    }
    assert!(left.iter().all(|name| !scene.path("out").join(name).exists()));
}

#[test]
fn a_cache_folder_stands_for_the_snapshot_that_its_main_names() {
    let scene = Scene::new();
    let hub = scene.path("models--a--b");
    for (name, config) in [("aaa", "{}"), ("bbb", r#"{"architectures": ["Other", "LlamaForCausalLM"]}"#)] {
        let snapshot = hub.join("snapshots").join(name);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(hub.join("blobs")).unwrap();
        fs::write(snapshot.join("config.json"), config).unwrap();
        fs::copy(scene.weights(), hub.join("blobs/123")).unwrap();
        std::os::unix::fs::symlink("../../blobs/123", snapshot.join("model.safetensors")).unwrap();
    }
    let inspect = || Distq::new(&["inspect"]).arg(&hub);
    let ended = inspect().run();
    assert_eq!(ended.code, 3);
    assert!(ended.messages()[0].contains("2 snapshots"), "{}", ended.stderr);
    fs::create_dir(hub.join("refs")).unwrap();
    fs::write(hub.join("refs/main"), "bbb\n").unwrap();
    let ended = inspect().succeed();
    assert!(ended.stdout.contains("refs/main names bbb"), "{}", ended.stdout);
    // As quantize does, inspect takes the architecture that it knows.
    assert!(ended.stdout.contains("LlamaForCausalLM\n"), "{}", ended.stdout);
    fs::write(hub.join("refs/main"), "../../../etc").unwrap();
    assert_eq!(inspect().run().code, 3);
}

#[test]
fn a_name_that_is_no_directory_is_answered_with_what_to_do() {
    let scene = Scene::new();
    for (model, words) in [
        (
            Path::new("meta-llama/Llama-3.1-8B"),
            "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B",
        ),
        (&scene.weights(), "this is a file"),
        (Path::new("/no/such/model"), "there is no such directory"),
    ] {
        let ended = Distq::new(&["inspect"]).arg(model).run();
        assert_eq!(ended.code, 3);
        assert!(ended.messages()[0].contains(words), "{}", ended.stderr);
    }
}

/// Heads, heads of keys, size of a head, hidden size, intermediate size, and what is left alone: the proportions of
/// models that there are, and sizes that are no whole blocks.
const SIZES: [([usize; 5], &[&str]); 11] = [
    ([4, 4, 100, 400, 96], &[]),
    ([9, 3, 64, 576, 96], &[]),
    ([4, 2, 8, 64, 80], &[]),
    ([6, 3, 24, 144, 96], &[]),
    ([4, 2, 40, 48, 112], &[]),
    ([2, 2, 72, 144, 96], &["*.o_proj"]),
    ([2, 1, 120, 16, 96], &[]),
    ([4, 1, 4, 32, 48], &[]),
    ([1, 1, 256, 64, 16], &[]),
    ([3, 1, 10, 48, 80], &["*.o_proj"]),
    ([5, 5, 6, 40, 96], &["re:.*(q|k|v|o|gate|up)_proj"]),
];

#[test]
fn every_size_that_a_model_can_have_is_planned_and_quantized() {
    for ([heads, kv_heads, head_dim, hidden, intermediate], ignored) in SIZES {
        let scene = Scene::with(|config| {
            config["num_hidden_layers"] = json!(1);
            config["num_attention_heads"] = json!(heads);
            config["num_key_value_heads"] = json!(kv_heads);
            config["head_dim"] = json!(head_dim);
            config["hidden_size"] = json!(hidden);
            config["intermediate_size"] = json!(intermediate);
        });
        let options = ignored.iter().flat_map(|pattern| ["--ignore", pattern]);
        let quantize = options.clone().fold(scene.quantize("out"), Distq::arg);
        quantize.succeed();
        let plan = Distq::new(&["plan", "--nodes", "24GiB:gpu"])
            .arg(scene.model())
            .arg("--calib")
            .arg(scene.calib());
        options.fold(plan.args(["--calib-min-tokens", "1"]), Distq::arg).succeed();
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let scene = Scene::new();
    let model = scene.model();
    let plan = ["plan", "--scheme", "nvfp4a16", "--method", "max"];
    for (arguments, out) in [
        (&["inspect"][..], None),
        (&plan, None),
        (&["quantize", plan[1], plan[2], plan[3], plan[4]], Some(scene.path("out"))),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_distq"));
        command.args(arguments).arg(&model).args(&out).stdout(writer).stdin(Stdio::null());
        let ended = command.output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(0), "{arguments:?}: {said}");
        assert!(!said.contains("error") && out.is_none_or(|out| out.join("config.json").exists()), "{said}");
    }
    // Nor is one of standard error.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_distq"));
    command
        .args(["quantize", plan[1], plan[2], plan[3], plan[4], "-vv"])
        .arg(&model)
        .arg(scene.path("unheard"));
    let ended =
        command.stdout(writer.try_clone().unwrap()).stderr(writer).stdin(Stdio::null()).status().unwrap();
    assert_eq!((ended.code(), scene.path("unheard/config.json").exists()), (Some(0), true));
    // A disk that is full is one: half a result must not look like a whole one.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let ended = Command::new(env!("CARGO_BIN_EXE_distq"))
        .args(["inspect", "--json"])
        .arg(&model)
        .stdout(full)
        .output();
    let ended = ended.unwrap();
    assert_eq!(ended.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("standard output"), "{ended:?}");
}

#[test]
fn a_low_limit_of_open_files_is_raised_or_said() {
    let scene = Scene::new();
    write_index(&scene, &shard(&scene, 40));
    let limited = |kind: &str| {
        let line = format!("ulimit {kind} 30; exec \"$0\" inspect \"$1\"");
        let mut command = Command::new("sh");
        command.args(["-c", &line, env!("CARGO_BIN_EXE_distq")]).arg(scene.model());
        command.output().unwrap()
    };
    let raised = limited("-Sn");
    assert_eq!(raised.status.code(), Some(0), "{raised:?}");
    let refused = limited("-n");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains("ulimit -n"), "{said}");
}
