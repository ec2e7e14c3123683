//! The life of a run: what exists when, resuming, overwriting, plans and reports.

use std::fs;

use serde_json::Value;

use distq::verify::Level;

use crate::bad_input::launch;
use crate::support::{Distq, Scene, digests, signal};

/// Runs until a weight of `layer` turns out to be NaN, then repairs the source: a run that died on the way.
fn stop_in_layer(scene: &Scene, layer: usize, method: &str) {
    let weights = fs::read(scene.weights()).unwrap();
    scene.change_weights(|tensors| {
        let (_, _, bytes) = tensors.get_mut(&format!("model.layers.{layer}.mlp.down_proj.weight")).unwrap();
        bytes[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    });
    let ended = scene.quantize("out").args(["--method", method]).run();
    assert_eq!(ended.code, 5, "{}", ended.stderr);
    fs::write(scene.weights(), weights).unwrap();
    assert!(!scene.path("out").exists(), "nothing looks finished");
}

#[test]
fn a_run_that_died_is_resumed_to_the_same_bytes() {
    for method in ["max", "best"] {
        let scene = Scene::new();
        let run = |out: &str| scene.quantize(out).args(["--method", method]);
        run("expected").succeed();
        stop_in_layer(&scene, 3, method);
        assert_eq!(scene.layers_finished(), 3);
        assert_eq!(run("out").run().code, 2, "an unfinished run is not started over silently");
        run("out").args(["--resume"]).ranks(2).succeed();
        assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")), "{method}");
        assert!(!scene.path("out.partial").exists());
    }
}

#[test]
fn parts_damaged_after_they_were_finished_are_made_again() {
    let scene = Scene::new();
    scene.quantize("expected").args(["--method", "max"]).succeed();
    stop_in_layer(&scene, 5, "max");
    let shard = scene.path("out.partial/model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 1000].fill(0xAB);
    fs::write(&shard, bytes).unwrap();
    scene.quantize("out").args(["--method", "max", "--resume"]).succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}

#[test]
fn resuming_something_else_is_refused_with_the_reason() {
    let scene = Scene::new();
    stop_in_layer(&scene, 5, "max");
    let refused = |command: Distq, word: &str| {
        let ended = command.args(["--resume"]).run();
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        assert!(ended.messages()[0].contains(word), "{}", ended.stderr);
    };
    refused(scene.quantize("out").args(["--layout", "modelopt"]), "options");
    refused(scene.quantize("out").args(["--calib-max-tokens", "30"]), "calibration data");
    refused(scene.quantize("other"), "no unfinished run");
    let mut config = scene.config();
    config["rope_theta"] = 5000.0.into();
    scene.write_config(&config);
    refused(scene.quantize("out"), "model");
}

/// Another fine-tune of the same base: some linears of one layer, and nothing else, differ by a little.
fn tune(scene: &Scene, layer: usize) {
    scene.change_weights(|tensors| {
        for name in ["self_attn.q_proj", "mlp.up_proj"] {
            let (_, _, bytes) = tensors.get_mut(&format!("model.layers.{layer}.{name}.weight")).unwrap();
            for value in bytes.chunks_exact_mut(2) {
                let tuned = half::bf16::from_le_bytes([value[0], value[1]]).to_f32() * 1.02;
                value.copy_from_slice(&half::bf16::from_f32(tuned).to_le_bytes());
            }
        }
    });
}

#[test]
fn layers_of_two_models_are_never_mixed() {
    for method in ["max", "best"] {
        let scene = Scene::new();
        stop_in_layer(&scene, 3, method);
        let resume = scene.quantize("out").args(["--method", method, "--resume"]);
        tune(&scene, 1);
        let ended = resume.run();
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        assert!(ended.messages()[0].contains("the model differs"), "{}", ended.stderr);
        // What is finished does not depend on the last layer.
        let scene = Scene::new();
        stop_in_layer(&scene, 3, method);
        tune(&scene, 5);
        scene.quantize("out").args(["--method", method, "--resume"]).succeed();
        scene.quantize("expected").args(["--method", method]).succeed();
        assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")), "{method}");
    }
    let (scene, other) = (Scene::new(), Scene::new());
    tune(&other, 5);
    let rank = |scene: &Scene| format!("-np 1 DISTQ plan {} --scheme nvfp4a16", scene.model().display());
    let (code, messages) = launch(&format!("{} : {}", rank(&scene), rank(&other)));
    assert_eq!((code, messages.len()), (Some(3), 1), "{messages:?}");
    assert!(messages[0].contains("rank 1") && messages[0].contains("another model"), "{messages:?}");
}

#[test]
fn a_second_run_on_an_output_is_refused_while_the_first_goes_on() {
    let scene = Scene::lasting(1.0);
    let run = || scene.quantize("out").args(["--method", "max", "--calib-samples", "100000"]);
    let first = run().start();
    scene.until_finished(1, &first);
    signal("-STOP", first.pid());
    for second in ["--resume", "--overwrite"] {
        let ended = run().args([second]).run();
        let holder = format!("process {} on host", first.pid());
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        assert!(ended.messages()[0].contains(&holder), "{}", ended.stderr);
    }
    signal("-CONT", first.pid());
    assert_eq!(first.wait().code, 0);
    run().args(["--overwrite"]).succeed();
}

#[test]
fn overwriting_leaves_alone_what_is_no_checkpoint() {
    let scene = Scene::new();
    fs::create_dir_all(scene.path("out/src")).unwrap();
    fs::write(scene.path("out/thesis.tex"), "x").unwrap();
    let ended = scene.quantize("out").args(["--overwrite"]).run();
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    assert!(scene.path("out/thesis.tex").exists() && scene.path("out/src").exists());
    let ended = Distq::new(&["quantize"]).arg(scene.model()).arg("/").run();
    assert_eq!(ended.code, 2, "{}", ended.stderr);
}

#[test]
fn a_place_that_is_no_use_for_a_report_is_named_before_anything_is_made() {
    let scene = Scene::new();
    fs::create_dir(scene.path("folder")).unwrap();
    for place in ["folder", "nowhere/report.json"] {
        let ended = scene.quantize("out").arg("--report").arg(scene.path(place)).ranks(2).run();
        assert_eq!((ended.code, ended.messages().len()), (2, 1), "{}", ended.stderr);
        assert!(ended.messages()[0].contains("--report"), "{}", ended.stderr);
        assert!(!scene.path("out").exists() && !scene.path("out.partial").exists());
    }
}

#[test]
fn every_flipped_bit_of_an_output_is_found_without_the_source() {
    let scene = Scene::new();
    fs::write(scene.model().join("chat_template.jinja"), "{{ messages }}").unwrap();
    scene.quantize("out").args(["--max-shard-size", "60KB"]).succeed();
    let out = scene.path("out");
    let judged = || {
        let report = distq::verify::verify(&out, None).unwrap();
        report.rules.iter().find(|rule| rule.id == "A19").map(|rule| (rule.level, report.passed())).unwrap()
    };
    assert_eq!(judged(), (Level::Pass, true));
    let mut flips = 0;
    for name in digests(&out).keys() {
        let (path, bytes) = (out.join(name), fs::read(out.join(name)).unwrap());
        // Ends and what lies between; of a safetensors file header and tensors.
        for i in 0..12 {
            let (mut flipped, at) = (bytes.clone(), i * (bytes.len() - 1) / 11);
            flipped[at] ^= 1 << (i % 8);
            fs::write(&path, flipped).unwrap();
            assert!(!judged().1, "{name}, byte {at}");
            flips += 1;
        }
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(!judged().1, "{name} is too short");
        fs::remove_file(&path).unwrap();
        assert!(name == "digests.json" || !judged().1, "{name} is missing");
        fs::write(&path, &bytes).unwrap();
    }
    assert!(flips > 70, "{flips}");
    fs::remove_file(out.join("digests.json")).unwrap();
    assert_eq!(judged(), (Level::NotApplicable, true));
}

#[test]
fn overwriting_replaces_and_nothing_else_does() {
    let scene = Scene::new();
    scene.quantize("out").succeed();
    let first = digests(&scene.path("out"));
    let again = scene.quantize("out").run();
    assert_eq!(again.code, 2);
    assert!(again.messages()[0].contains("--overwrite"), "{}", again.stderr);
    scene.quantize("out").args(["--layout", "modelopt", "--overwrite"]).ranks(2).succeed();
    assert_ne!(digests(&scene.path("out")), first);
    assert!(scene.path("out/hf_quant_config.json").exists());
    let left: Vec<_> = fs::read_dir(scene.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("out.")), "{left:?}");
}

#[test]
fn a_plan_says_who_would_own_what() {
    let scene = Scene::new();
    let plan = |args: &[&str], ranks| {
        let mut command =
            Distq::new(&["plan"]).arg(scene.model()).args(["--calib-min-tokens", "1", "--calib"]);
        command = command.arg(scene.calib());
        for arg in args {
            command = command.arg(arg);
        }
        command.ranks(ranks).succeed()
    };
    let json = plan(&["--json", "--layers-per-rank", "2,4"], 2).json();
    assert_eq!(json["stages"][1]["layers"]["start"], 2);
    assert_eq!(json["stages"][1]["layers"]["end"], 6);
    for field in ["bytes_read", "bytes_written", "peak_memory", "memory", "seconds"] {
        assert!(json["stages"][0][field].as_f64().unwrap() > 0.0, "{field}");
    }
    let table = plan(&[], 3).stdout;
    assert!(table.contains("expected time") && table.lines().count() == 5, "{table}");
}

#[test]
fn a_plan_for_machines_that_are_not_there_needs_none_of_them() {
    let scene = Scene::new();
    let plan = |args: &[&str]| {
        let command = Distq::new(&["plan"]).arg(scene.model()).args(["--calib-min-tokens", "1", "--calib"]);
        args.iter().fold(command.arg(scene.calib()), |command, arg| command.arg(*arg))
    };
    let nodes = ["--nodes", "128GiB:uma,24GiB:gpu:64GiB,64GiB:cpu", "--json"];
    let json = plan(&nodes).succeed().json();
    let stages = json["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 3);
    assert!(stages.iter().all(|stage| ["resident", "streamed"].contains(&stage["mode"].as_str().unwrap())));
    let json =
        plan(&nodes).args(["--layers-per-rank", "3,1,2", "--memory-per-rank", "1GiB"]).succeed().json();
    assert_eq!(json["stages"][1]["layers"]["start"], 3);
    assert_eq!(json["stages"][1]["memory"], 1 << 30);
    assert_eq!(plan(&nodes).args(["--memory-per-rank", "1MiB"]).run().code, 4);
    assert_eq!(plan(&["--nodes", "24GiB:tpu"]).run().code, 2);

    let slow = plan(&nodes).args(["--link", "1Mbit,1Mbit,10Gbit"]).succeed().json();
    let seconds = |json: &Value| json["seconds"].as_f64().unwrap();
    assert!(seconds(&slow) > 2.0 * seconds(&plan(&nodes).succeed().json()));
    assert_eq!(plan(&nodes).args(["--link", "1Gbit,1Gbit"]).run().code, 4);
    std::fs::remove_file(scene.weights()).unwrap();
    let described = plan(&nodes).args(["--link", "1Mbit,1Mbit,10Gbit"]).succeed().json();
    assert_eq!(described, slow, "config.json says as much as headers");
    assert_eq!(plan(&[]).run().code, 3, "machines at hand are for weights at hand");
}

#[test]
fn inspect_tells_source_from_output() {
    let scene = Scene::new();
    scene.quantize("out").succeed();
    let inspect = |dir: &str| Distq::new(&["inspect"]).arg(scene.path(dir)).args(["--json"]).succeed().json();
    let (source, out) = (inspect("model"), inspect("out"));
    assert_eq!(source["quantization"], Value::Null);
    assert_eq!(out["quantization"]["quant_method"], "compressed-tensors");
    assert_eq!(source["parameters"], out["parameters"]);
}

#[test]
fn verify_finds_a_changed_byte() {
    let scene = Scene::new();
    scene.quantize("out").args(["--method", "max"]).succeed();
    let verify =
        || Distq::new(&["verify"]).arg(scene.path("out")).arg("--source").arg(scene.model()).args(["--json"]);
    assert_eq!(verify().succeed().json()["summary"]["errors"], 0);
    crate::support::change_safetensors(&scene.path("out/model.safetensors"), |tensors| {
        let (_, _, bytes) = tensors.get_mut("model.layers.2.mlp.up_proj.weight_packed").unwrap();
        bytes[17] ^= 0x10;
    });
    let ended = verify().run();
    assert_eq!(ended.code, 6);
    assert!(ended.messages()[0].contains("S4"), "{}", ended.stderr);
}

#[test]
fn ignored_modules_stay_as_they_are() {
    let scene = Scene::new();
    for layout in ["compressed-tensors", "modelopt"] {
        let ignore = ["--ignore", "model.layers.0.*", "--ignore", "re:.*down_proj", "--layout", layout];
        scene.quantize(layout).args(ignore).ranks(2).succeed();
        let out = fs::read(scene.path(layout).join("model.safetensors")).unwrap();
        let out = safetensors::SafeTensors::deserialize(&out).unwrap();
        let source = fs::read(scene.weights()).unwrap();
        let source = safetensors::SafeTensors::deserialize(&source).unwrap();
        for name in ["model.layers.0.self_attn.q_proj.weight", "model.layers.4.mlp.down_proj.weight"] {
            assert_eq!(out.tensor(name).unwrap().data(), source.tensor(name).unwrap().data(), "{layout}");
        }
    }
}
