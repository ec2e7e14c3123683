//! Methods on checkpoints that make them difficult, and what the report says of them.

use std::fs;

use serde_json::Value;

use crate::support::{Distq, Scene, change_safetensors};

fn report(scene: &Scene, args: &[&str]) -> Value {
    let path = scene.path("report.json");
    let mut run = scene.quantize("out").args(["--method", "best", "--overwrite", "--report"]).arg(&path);
    for arg in args {
        run = run.arg(*arg);
    }
    run.succeed();
    serde_json::from_slice(&fs::read(&path).unwrap()).unwrap()
}

/// Every group that a method chose for.
fn groups(report: &Value) -> Vec<Value> {
    let parts = report["parts"].as_array().unwrap().iter();
    parts.flat_map(|part| part["groups"].as_array().unwrap().clone()).collect()
}

#[test]
fn biases_of_v_and_up_take_their_folds_and_verification_undoes_them() {
    let scene = Scene::with(|config| {
        config["attention_bias"] = true.into();
        config["mlp_bias"] = true.into();
    });
    let report = report(&scene, &[]);
    assert!(report["verification"]["summary"]["max_relative_error"].as_f64().unwrap() < 0.15);
    let folded = groups(&report).iter().filter(|g| g["chosen"]["smoothing"]["candidate"] != "none").count();
    assert!(folded > 4, "some sites fold: {folded}");
    // A bias that lost its fold is another model.
    let verify = || Distq::new(&["verify"]).arg(scene.path("out")).arg("--source").arg(scene.model()).run();
    assert_eq!(verify().code, 0);
    let folded_up = |layer: usize| {
        let down = groups(&report)[layer * 4 + 3].clone();
        down["chosen"]["smoothing"]["candidate"] != "none"
    };
    let layer = (0..6).find(|&layer| folded_up(layer)).expect("a fold between up and down");
    let name = format!("model.layers.{layer}.mlp.up_proj.bias");
    let mut source = Vec::new();
    change_safetensors(&scene.weights(), |tensors| source = tensors[&name].2.clone());
    change_safetensors(&scene.path("out/model.safetensors"), |tensors| {
        tensors.get_mut(&name).unwrap().2 = source
    });
    let ended = verify();
    assert!(
        ended.code == 6 && ended.stdout.contains(&format!("layers.{layer}.mlp.up_proj")),
        "{}{}",
        ended.stdout,
        ended.stderr
    );
}

#[test]
fn a_norm_that_nothing_makes_up_for_is_found() {
    let scene = Scene::new();
    report(&scene, &[]);
    change_safetensors(&scene.path("out/model.safetensors"), |tensors| {
        let (_, _, bytes) = tensors.get_mut("model.layers.2.input_layernorm.weight").unwrap();
        for pair in bytes.chunks_exact_mut(2) {
            let x = half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32();
            pair.copy_from_slice(&half::bf16::from_f32(x * 2.0).to_le_bytes());
        }
    });
    let ended = Distq::new(&["verify"]).arg(scene.path("out")).arg("--source").arg(scene.model()).run();
    assert!(ended.code == 6 && ended.stdout.contains("layers.2.self_attn"), "{}", ended.stdout);
}

#[test]
fn too_few_tokens_for_a_hessian_fall_back_by_name() {
    let scene = Scene::new();
    fs::write(scene.calib(), "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]}\n").unwrap();
    let report = report(&scene, &[]);
    for group in groups(&report) {
        let chosen = &group["chosen"];
        assert!(chosen["fallback"].as_str().unwrap().contains("12 calibration tokens"), "{group}");
        assert!(chosen["verdicts"].as_array().unwrap().iter().all(|v| v["codes"] == "wsweep"), "{group}");
    }
    let ended = scene.quantize("again").args(["--method", "gptq"]).run();
    assert!(ended.stderr.contains("needs 64"), "{}", ended.stderr);
}

#[test]
fn headroom_scales_inputs_and_nothing_else() {
    let scene = Scene::new();
    let tensors = |method: &str| {
        let path = scene.path("report.json");
        scene
            .quantize(method)
            .args(["--method", method, "--layout", "modelopt", "--report"])
            .arg(&path)
            .succeed();
        let mut found = Default::default();
        change_safetensors(&scene.path(&format!("{method}/model.safetensors")), |tensors| {
            found = tensors.clone()
        });
        let report: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        (found, groups(&report))
    };
    let ((tight, tight_groups), (roomy, roomy_groups)) = (tensors("max"), tensors("max+headroom"));
    let value = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    for (name, (_, _, bytes)) in &tight {
        let Some(module) = name.strip_suffix(".input_scale") else {
            assert_eq!(*bytes, roomy[name].2, "{name}");
            continue;
        };
        let group = roomy_groups.iter().find(|group| group["members"].to_string().contains(module)).unwrap();
        let headroom = group["chosen"]["headroom"].as_f64().unwrap() as f32;
        assert!(headroom > 1.0, "{group}");
        assert_eq!(value(&roomy[name].2), headroom * value(bytes), "{name}");
    }
    let maxima =
        |groups: &[Value]| groups.iter().map(|group| group["input_amax"].clone()).collect::<Vec<_>>();
    assert_eq!(maxima(&tight_groups), maxima(&roomy_groups), "the report tells maximum and room apart");
}

#[test]
fn linears_that_stay_as_they_are_leave_their_neighbours_unfolded() {
    let scene = Scene::new();
    // Without q, k, v nothing can carry o's fold, and without down nothing can take up's.
    let report = report(&scene, &["--ignore", "re:.*(q|k|v)_proj", "--ignore", "*.down_proj"]);
    for group in groups(&report) {
        let folded = group["chosen"]["smoothing"].is_object();
        assert_eq!(folded, group["site"] == "gate_up", "{group}");
    }
}

#[test]
fn dead_and_constant_channels_are_survived() {
    let scene = Scene::new();
    scene.change_weights(|tensors| {
        for name in
            ["model.layers.1.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight"]
        {
            tensors.get_mut(name).unwrap().2[..8].fill(0);
        }
        // A row of v, and with it an input of o, that is always zero.
        tensors.get_mut("model.layers.4.self_attn.v_proj.weight").unwrap().2[..128].fill(0);
    });
    report(&scene, &[]);
}

#[test]
fn the_page_shows_every_linear_and_where_the_loss_sits() {
    let scene = Scene::new();
    let page = scene.path("report.html");
    scene.quantize("out").args(["--method", "best", "--report"]).arg(&page).succeed();
    let page = fs::read_to_string(page).unwrap();
    for part in [
        "<svg",
        "Where the loss sits",
        "When each rank did what",
        "layer 5, quantizing",
        "model.layers.5.mlp.down_proj",
        "output error (relative)",
        "its gain",
        "input headroom",
        "method best",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("http"), "nothing is fetched");
}
