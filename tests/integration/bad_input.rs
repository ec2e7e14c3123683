//! Bad input under mpirun: one message that names the place and the remedy, the documented exit code, all
//! ranks gone within seconds, no output directory.

use std::fs;

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Case, Distq, Scene, digests, is_open_mpi, mpirun, set, spoil_weight};

/// A tokenizer of one word with this part.
fn write_tokenizer(scene: &Scene, part: &str, value: Value) {
    let mut tokenizer =
        json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}});
    tokenizer[part] = value;
    fs::write(scene.model().join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn write_calib(scene: &Scene, lines: &str) {
    fs::write(scene.calib(), lines).unwrap();
}

const DOWN: &str = "model.layers.4.mlp.down_proj.weight";

const CASES: &[Case] = &[
    Case {
        name: "config.json is missing",
        spoil: |s| fs::remove_file(s.model().join("config.json")).unwrap(),
        args: &[],
        code: 3,
        words: &["config.json", "complete Hugging Face directory"],
    },
    Case {
        name: "config.json is cut short",
        spoil: |s| fs::write(s.model().join("config.json"), "{\"hidden_size\": ").unwrap(),
        args: &[],
        code: 3,
        words: &["config.json", "not valid JSON"],
    },
    Case {
        name: "an unsupported architecture",
        spoil: |s| set(s, "architectures", json!(["BloomForCausalLM"])),
        args: &[],
        code: 3,
        words: &["BloomForCausalLM", "LlamaForCausalLM, MistralForCausalLM"],
    },
    Case {
        name: "no weights",
        spoil: |s| fs::remove_file(s.weights()).unwrap(),
        args: &[],
        code: 3,
        words: &["model.safetensors", ".bin"],
    },
    Case {
        name: "the index names a missing file",
        spoil: |s| {
            let index = json!({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}});
            fs::write(s.model().join("model.safetensors.index.json"), index.to_string()).unwrap();
        },
        args: &[],
        code: 3,
        words: &["index", "model-00002-of-00002.safetensors", "missing", "download"],
    },
    Case {
        name: "the index names a missing tensor",
        spoil: |s| {
            let index = json!({"weight_map": {DOWN: "model.safetensors"}});
            fs::write(s.model().join("model.safetensors.index.json"), index.to_string()).unwrap();
            s.change_weights(|t| assert!(t.remove(DOWN).is_some()));
        },
        args: &[],
        code: 3,
        words: &["index", DOWN, "missing"],
    },
    Case {
        name: "a truncated file",
        spoil: |s| {
            let bytes = fs::read(s.weights()).unwrap();
            fs::write(s.weights(), &bytes[..bytes.len() - 10]).unwrap();
        },
        args: &[],
        code: 3,
        words: &["truncated", "model.safetensors", "tensor", "download"],
    },
    Case {
        name: "an oversized file",
        spoil: |s| {
            let mut bytes = fs::read(s.weights()).unwrap();
            bytes.extend([0; 8]);
            fs::write(s.weights(), bytes).unwrap();
        },
        args: &[],
        code: 3,
        words: &["oversized", "model.safetensors"],
    },
    Case {
        name: "a header that is no header",
        spoil: |s| fs::write(s.weights(), [0xFF; 64]).unwrap(),
        args: &[],
        code: 3,
        words: &["header", "model.safetensors"],
    },
    Case {
        name: "a missing tensor",
        spoil: |s| s.change_weights(|t| assert!(t.remove(DOWN).is_some())),
        args: &[],
        code: 3,
        words: &["missing", DOWN],
    },
    Case {
        name: "an unexpected tensor",
        spoil: |s| {
            s.change_weights(|t| {
                t.insert("model.layers.0.adapter.weight".into(), (Dtype::U8, vec![1], vec![0]));
            })
        },
        args: &[],
        code: 3,
        words: &["model.layers.0.adapter.weight", "no such tensor"],
    },
    Case {
        name: "a wrong shape",
        spoil: |s| set(s, "intermediate_size", json!(112)),
        args: &[],
        code: 3,
        words: &["shape", "model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[112, 64]"],
    },
    Case {
        name: "a wrong dtype",
        spoil: |s| {
            s.change_weights(|t| {
                let (dtype, shape, bytes) = t.get_mut(DOWN).unwrap();
                (*dtype, shape[1]) = (Dtype::I16, shape[1]);
                assert_eq!(bytes.len() % 2, 0);
            })
        },
        args: &[],
        code: 3,
        words: &["I16", DOWN, "BF16"],
    },
    Case {
        name: "a NaN weight",
        spoil: |s| spoil_weight(s, DOWN, 5, f32::NAN),
        args: &[],
        code: 5,
        words: &["NaN", DOWN, "rank 1"],
    },
    Case {
        name: "an infinite weight",
        spoil: |s| spoil_weight(s, "model.layers.0.self_attn.k_proj.weight", 0, f32::INFINITY),
        args: &["--scheme", "nvfp4a16"],
        code: 5,
        words: &["NaN or infinity", "model.layers.0.self_attn.k_proj.weight", "rank 0"],
    },
    Case {
        name: "an all-zero weight",
        spoil: |s| s.change_weights(|t| t.get_mut(DOWN).unwrap().2.fill(0)),
        args: &[],
        code: 5,
        words: &["zero", DOWN],
    },
    Case {
        name: "in-features that are not a multiple of 16",
        spoil: |s| {
            set(s, "intermediate_size", json!(90));
            s.change_weights(|tensors| {
                for (name, (_, shape, bytes)) in tensors.iter_mut().filter(|(name, _)| name.contains(".mlp."))
                {
                    let axis = usize::from(name.contains("down_proj"));
                    shape[axis] = 90;
                    bytes.truncate(2 * shape.iter().product::<usize>());
                }
            });
        },
        args: &[],
        code: 3,
        words: &["90", "multiple of 16", "model.layers.0.mlp.down_proj.weight", "--ignore"],
    },
    Case {
        name: "text and no tokenizer",
        spoil: |s| write_calib(s, "{\"text\": \"some words\"}\n"),
        args: &[],
        code: 3,
        words: &["tokenizer.json", "input_ids"],
    },
    Case { name: "no documents", spoil: |s| write_calib(s, ""), args: &[], code: 3, words: &["no document"] },
    Case {
        name: "no document long enough",
        spoil: |_| {},
        args: &["--calib-min-tokens", "150", "--calib-max-tokens", "200"],
        code: 3,
        words: &["124 tokens", "150", "--calib-min-tokens"],
    },
    Case {
        name: "no line that is a document",
        spoil: |s| write_calib(s, "{\"body\": 1}\n{\"text\": null}\n"),
        args: &[],
        code: 3,
        words: &["line 1", "its keys are body", "line 2", "calib.jsonl", "messages"],
    },
    Case {
        name: "a tokenizer over which its library panics",
        spoil: |s| {
            write_calib(s, "{\"text\": \"some words\"}\n");
            write_tokenizer(s, "pre_tokenizer", json!({"type": "FixedLength", "length": 0}));
        },
        args: &[],
        code: 3,
        words: &["tokenizer.json", "can't be used", "download"],
    },
    Case {
        name: "a tokenizer that asks for all memory",
        spoil: |s| {
            write_calib(s, "{\"text\": \"some words\"}\n");
            write_tokenizer(
                s,
                "normalizer",
                json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
            );
        },
        args: &[],
        code: 3,
        words: &["tokenizer.json", "2.00 GiB", "download"],
    },
    Case {
        name: "token ids beyond the vocabulary",
        spoil: |s| write_calib(s, "{\"input_ids\": [1, 2, 128]}\n"),
        args: &[],
        code: 3,
        words: &["128", "vocabulary", "line 1"],
    },
    Case {
        name: "an already quantized source",
        spoil: |s| {
            set(s, "quantization_config", json!({"quant_method": "gptq"}));
            s.change_weights(|t| _ = t.insert("x.qweight".into(), (Dtype::I32, vec![1], vec![0; 4])));
        },
        args: &[],
        code: 3,
        words: &["already quantized", "gptq", "x.qweight", "original"],
    },
    Case {
        name: "the output exists",
        spoil: |s| {
            fs::create_dir(s.path("out")).unwrap();
            fs::write(s.path("out/config.json"), "{}").unwrap();
        },
        args: &[],
        code: 2,
        words: &["exists", "--overwrite"],
    },
    Case {
        name: "a pattern that matches nothing",
        spoil: |_| {},
        args: &["--ignore", "model.layers.77.*"],
        code: 2,
        words: &["model.layers.77", "matches no linear"],
    },
    Case {
        name: "a split that does not add up",
        spoil: |_| {},
        args: &["--layers-per-rank", "3,4"],
        code: 4,
        words: &["3,4", "7 layers", "has 6"],
    },
    Case {
        name: "a split that leaves a rank idle",
        spoil: |_| {},
        args: &["--layers-per-rank", "6,0"],
        code: 4,
        words: &["6,0", "rank 1 without a layer"],
    },
    Case {
        name: "a split for other ranks",
        spoil: |_| {},
        args: &["--layers-per-rank", "2,2,2"],
        code: 4,
        words: &["3 ranks", "has 2"],
    },
    Case {
        name: "memory that is too small",
        spoil: |_| {},
        args: &["--memory-per-rank", "1GiB,1MiB"],
        code: 4,
        words: &["rank 1", "1.00 MiB", "--memory-per-rank"],
    },
    Case {
        name: "a layout that does not exist",
        spoil: |_| {},
        args: &["--layout", "gguf"],
        code: 2,
        words: &[],
    },
];

#[test]
fn each_is_one_clear_message_with_its_exit_code() {
    for case in CASES {
        let scene = Scene::new();
        (case.spoil)(&scene);
        let existed = scene.path("out").exists();
        let mut command = scene.quantize("out").ranks(2);
        for arg in case.args {
            command = command.arg(arg);
        }
        let ended = command.run();
        assert_eq!(ended.code, case.code, "{}: {}", case.name, ended.stderr);
        assert_eq!(scene.path("out").exists(), existed, "{}: no output directory", case.name);
        if case.words.is_empty() {
            assert_eq!(ended.stderr.matches("error:").count(), 1, "{}: {}", case.name, ended.stderr);
            continue;
        }
        let messages = ended.messages();
        assert_eq!(messages.len(), 1, "{}: {}", case.name, ended.stderr);
        for word in case.words {
            assert!(messages[0].contains(word), "{}: no {word:?} in: {}", case.name, messages[0]);
        }
        assert!(messages[0].contains("; "), "{}: a remedy in: {}", case.name, messages[0]);
    }
}

#[test]
fn outputs_that_can_not_be_written_are_refused() {
    let scene = Scene::new();
    let inside = Distq::new(&["quantize"]).arg(scene.model()).arg(scene.model().join("out"));
    let ended = inside.arg("--calib").arg(scene.calib()).ranks(2).run();
    assert_eq!((ended.code, ended.messages().len()), (2, 1), "{}", ended.stderr);
    assert!(ended.messages()[0].contains("overlap"));

    // /proc takes no directories from anyone, root included.
    let ended =
        Distq::new(&["quantize"]).arg(scene.model()).arg("/proc/out").arg("--calib").arg(scene.calib());
    let ended = ended.args(["--calib-min-tokens", "1"]).ranks(2).run();
    assert_eq!((ended.code, ended.messages().len()), (5, 1), "{}", ended.stderr);
    assert!(ended.messages()[0].contains("/proc/out"), "{}", ended.stderr);
}

/// Runs mpirun with these arguments, where `DISTQ` stands for the binary: exit code and distq's messages.
pub fn launch(arguments: &str) -> (Option<i32>, Vec<String>) {
    let arguments = arguments.replace("DISTQ", env!("CARGO_BIN_EXE_distq"));
    let output = mpirun().args(arguments.split_whitespace()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let messages =
        stderr.lines().filter_map(|line| line.strip_prefix("distq: ")).map(str::to_string).collect();
    (output.status.code(), messages)
}

#[test]
fn more_ranks_than_layers_is_refused_with_the_numbers() {
    let ended = Scene::new().quantize("out").ranks(7).run();
    assert_eq!(ended.code, 4);
    assert!(ended.messages()[0].contains("7 ranks for 6 layers"), "{}", ended.stderr);
}

#[test]
fn a_hostfile_with_more_slots_than_layers_is_refused_with_the_numbers() {
    let scene = Scene::new();
    // Either launcher's way to say it; without -np, one rank starts in every slot.
    let hosts = if is_open_mpi() { "localhost slots=8\n" } else { "localhost:8\n" };
    fs::write(scene.path("hosts"), hosts).unwrap();
    let (hosts, model) = (scene.path("hosts").display().to_string(), scene.model().display().to_string());
    let every_slot = if is_open_mpi() { "" } else { "-np 8" };
    let (code, messages) =
        launch(&format!("--hostfile {hosts} {every_slot} DISTQ plan {model} --scheme nvfp4a16 --method max"));
    assert_eq!((code, messages.len()), (Some(4), 1), "{messages:?}");
    assert!(messages[0].contains("8 ranks for 6 layers"), "{messages:?}");
}

#[test]
fn ranks_that_do_not_belong_together_are_refused_by_name() {
    // The same names, another configuration; no directory at all; other options; a misspelled one; another command.
    let (scene, other) = (Scene::new(), Scene::new());
    let mut config = other.config();
    config["rope_theta"] = json!(1234.0);
    other.write_config(&config);
    let plan = |model: &str, scheme: &str| format!("plan {model} --scheme {scheme} --method max");
    let (model, other) = (scene.model().display().to_string(), other.model().display().to_string());
    let cases = [
        (plan(&other, "nvfp4a16"), 3, "another model"),
        (plan("/no/such/model", "nvfp4a16"), 3, "/no/such/model"),
        (plan(&model, "nvfp4"), 2, "with --scheme nvfp4, rank 0 with --scheme nvfp4a16"),
        (plan(&model, "nvfp4a16") + " --seed 5", 2, "with --seed 5, rank 0 with --seed 0"),
        (plan(&model, "nvfp4a16") + " --sed 5", 2, "'--sed'"),
        (format!("inspect {model}"), 2, "as distq inspect, rank 0 as distq plan"),
    ];
    for (second, code, part) in cases {
        let first = plan(&model, "nvfp4a16");
        let (ended, messages) = launch(&format!("-np 1 DISTQ {first} : -np 1 DISTQ {second}"));
        assert_eq!((ended, messages.len()), (Some(code), 1), "{messages:?}");
        assert!(messages[0].contains("rank 1") && messages[0].contains(part), "{messages:?}");
    }
    // A rank that writes where its own shards begin would spoil what the others wrote.
    let out = scene.path("out").display().to_string();
    let quantize = |size: &str| format!("quantize {model} {out} --method max --max-shard-size {size}");
    let (code, messages) =
        launch(&format!("-np 1 DISTQ {} : -np 1 DISTQ {}", quantize("70KB"), quantize("61KB")));
    assert_eq!((code, messages.len()), (Some(2), 1), "{messages:?}");
    assert!(
        messages[0].contains("with --max-shard-size 61KB, rank 0 with --max-shard-size 70KB"),
        "{messages:?}"
    );
    assert!(!scene.path("out.partial").exists());
    let ended = scene.quantize("out").ranks(3).broken(2, "SHIM_MPI=Fast_MPI_9").run();
    assert_eq!((ended.code, ended.messages().len()), (5, 1), "{}", ended.stderr);
    let words = ["rank 2", "Fast_MPI_9", "same MPI on every host"];
    assert!(words.iter().all(|word| ended.messages()[0].contains(word)), "{}", ended.stderr);
}

#[test]
fn clocks_that_are_years_apart_change_nothing() {
    let scene = Scene::new();
    scene.quantize("alone").succeed();
    scene.quantize("three").ranks(3).broken(1, "SHIM_CLOCK=-100000000").succeed();
    assert_eq!(digests(&scene.path("three")), digests(&scene.path("alone")));
}
