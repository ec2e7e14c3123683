//! Models that are healthy and hard to quantize: the default method publishes an output that proves, and that is no
//! worse than max scales for any linear on the rows that judge.
//!
//! `DISTQ_EXTREMES=FIRST..END` runs the models of these seeds instead of the few that every test run makes.

use std::fs;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Distq, Random, Scene};

/// Seeds of the models that every test run makes.
const SEEDS: std::ops::Range<u32> = 1..41;

/// One random model with its data, and the options to quantize it with.
struct Extreme {
    scene: Scene,
    options: [&'static str; 4],
    /// What makes it hard.
    about: String,
}

impl Extreme {
    fn new(seed: u32) -> Extreme {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9) | 1);
        (0..8).for_each(|_| _ = random.next());
        let (dtype, weights_only) =
            ([Dtype::BF16, Dtype::F32, Dtype::F16][random.below(3)], random.chance(0.3));
        let (heads, hidden) = [(2, 32), (4, 64), (8, 128)][random.below(3)];
        let (key_value_heads, intermediate) =
            ([1, 2, heads][random.below(3)], [48, 96, 160][random.below(3)]);
        let config = json!({
            "hidden_size": hidden, "num_attention_heads": heads, "head_dim": 16,
            "num_key_value_heads": key_value_heads, "intermediate_size": intermediate,
            "num_hidden_layers": 1 + random.below(2), "attention_bias": random.chance(0.4), "mlp_bias": random.chance(0.4),
            "vocab_size": 64,
        });
        let scene = Scene::with(|given| {
            config.as_object().unwrap().iter().for_each(|(key, value)| given[key] = value.clone());
        });
        let mut about = format!("{dtype:?} {config}");
        scene.change_weights(|tensors| {
            for (name, (stored, shape, bytes)) in tensors.iter_mut() {
                let halves =
                    bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32());
                let mut values: Vec<f32> = halves.collect();
                let change = match shape[..] {
                    [_] if name.ends_with("bias") => bias(&mut values, &mut random),
                    [_] => norm(&mut values, &mut random),
                    [_, cols] if name.contains("layers") => {
                        // Two vanishing factors of the MLP would leave down nothing to scale its inputs by.
                        let vanish = weights_only || !name.contains("mlp") || name.contains("down");
                        let tiny = if dtype == Dtype::F16 { [1e-3, 1e-5] } else { [1e-30, 1e-38] };
                        matrix(&mut values, cols, if vanish { tiny } else { [1.0; 2] }, &mut random)
                    }
                    _ => "",
                };
                if !change.is_empty() {
                    about += &format!("; {name}: {change}");
                }
                *stored = dtype;
                *bytes = values.into_iter().flat_map(|x| narrow(dtype, x)).collect();
            }
        });
        about += &format!("; data: {}", data(&scene, &mut random));
        let scheme = if weights_only { "nvfp4a16" } else { "nvfp4" };
        let layout = ["compressed-tensors", "modelopt"][random.below(2)];
        Extreme { scene, options: ["--scheme", scheme, "--layout", layout], about }
    }
}

fn narrow(dtype: Dtype, x: f32) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x.clamp(-60000.0, 60000.0)).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    }
}

/// From 1 to a hundred thousand, evenly in powers of ten.
fn large(random: &mut Random) -> f32 {
    10f32.powf(5.0 * random.uniform())
}

fn norm(values: &mut [f32], random: &mut Random) -> &'static str {
    let (n, kind) = (values.len(), random.below(8));
    for (i, x) in values.iter_mut().enumerate() {
        match kind {
            0 | 1 if random.chance(3.0 / n as f32) => *x *= large(random),
            2 if random.chance(0.1) => *x = 0.0,
            3 if random.chance(0.5) => *x = -*x,
            4 if i < 16 => *x = 0.0,
            _ => {}
        }
    }
    ["massive channels", "massive channels", "zeros", "signs", "a block of zeros", "", "", ""][kind]
}

fn bias(values: &mut [f32], random: &mut Random) -> &'static str {
    let kind = random.below(5);
    for x in values {
        *x -= 1.0;
        match kind {
            0 => *x = 0.0,
            1 if random.chance(0.1) => *x = 0.0,
            2 if random.chance(0.1) => *x *= large(random),
            3 => *x *= 1e-6,
            _ => {}
        }
    }
    ["zero", "zeros", "massive", "tiny", ""][kind]
}

fn matrix(values: &mut [f32], cols: usize, tiny: [f32; 2], random: &mut Random) -> &'static str {
    let (rows, kind) = (values.len() / cols, random.below(26));
    let mut lines = |n: usize| -> Vec<f32> {
        (0..n).map(|_| if random.chance(0.1) { large(random) } else { 1.0 }).collect()
    };
    let (by_row, by_column) = (lines(rows), lines(cols));
    for (i, x) in values.iter_mut().enumerate() {
        let (row, column) = (i / cols, i % cols);
        match kind {
            0 if column < 16 => *x = 0.0,
            1 if column + 16 >= cols => *x = 0.0,
            2 => *x *= by_column[column],
            3 => *x *= by_row[row],
            4 if by_row[row] > 1.0 => *x = 0.0,
            5 if by_column[column] > 1.0 => *x = 0.0,
            6 if i == 0 => *x = 3000.0,
            7 => *x *= 1e4,
            8 => *x *= tiny[0],
            9 => *x *= tiny[1],
            10 if random.chance(0.7) => *x = 0.0,
            11 => *x *= 10f32.powf(5.0 * random.uniform() - 3.0),
            12 => *x = (*x * 8.0).round() / 4.0,
            _ => {}
        }
    }
    [
        "first block zero",
        "last block zero",
        "massive columns",
        "massive rows",
        "zero rows",
        "zero columns",
        "one of 3000",
        "large",
        "tiny",
        "subnormal",
        "sparse",
        "heavy tails",
        "coarse",
    ]
    .get(kind)
    .unwrap_or(&"")
}

fn data(scene: &Scene, random: &mut Random) -> &'static str {
    let (kind, documents) = (random.below(6), [1, 3, 9, 12][random.below(4)]);
    let lines = (0..documents).map(|document| {
        let length = if kind == 1 { 5 } else { 10 + random.below(80) };
        let once = kind == 0 || (kind == 2 && document > 0);
        let ids: Vec<usize> = (0..length).map(|_| if once { 7 } else { random.below(64) }).collect();
        json!({ "input_ids": ids }).to_string() + "\n"
    });
    fs::write(scene.calib(), lines.collect::<String>()).unwrap();
    ["one token", "few tokens", "one token held out", "random", "random", "random"][kind]
}

/// Quantizes and verifies; what is wrong, where something is.
fn fault(model: &Extreme) -> Option<String> {
    let (scene, report) = (&model.scene, model.scene.path("report.json"));
    let ended = scene.quantize("out").args(model.options).arg("--report").arg(&report).run();
    if ended.code != 0 {
        return Some(format!("quantize ended with {}\n{}{}", ended.code, ended.stdout, ended.stderr));
    }
    for against in [vec![], vec!["--source".into(), scene.model().into_os_string()]] {
        let verify = Distq::new(&["verify"]).arg(scene.path("out"));
        let ended = against.into_iter().fold(verify, Distq::arg).run();
        if ended.code != 0 {
            return Some(format!("verify ended with {}\n{}{}", ended.code, ended.stdout, ended.stderr));
        }
    }
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let mut judged = 0;
    for group in
        report["parts"].as_array().unwrap().iter().flat_map(|part| part["groups"].as_array().unwrap())
    {
        for verdict in group["chosen"]["verdicts"].as_array().unwrap() {
            let error = |name: &str| verdict[name].as_f64().unwrap();
            if error("output_error") > error("output_error_max") * (1.0 + 1e-9) {
                return Some(format!("worse than max scales: {group}"));
            }
            judged += 1;
        }
    }
    let linears = 7 * scene.config()["num_hidden_layers"].as_u64().unwrap();
    (judged != linears).then(|| format!("{judged} of {linears} linears were judged"))
}

#[test]
fn the_default_method_proves_and_is_no_worse_than_max_on_hard_models() {
    let seeds = match std::env::var("DISTQ_EXTREMES") {
        Err(_) => SEEDS,
        Ok(range) => {
            let (first, end) = range.split_once("..").expect("DISTQ_EXTREMES is FIRST..END");
            first.parse().unwrap()..end.parse().unwrap()
        }
    };
    let faults: Vec<String> = seeds
        .filter_map(|seed| {
            let model = Extreme::new(seed);
            fault(&model).map(|fault| format!("seed {seed}: {}\n{fault}", model.about))
        })
        .collect();
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
}

#[test]
fn inputs_that_are_all_zero_stop_only_what_scales_them_and_name_the_linears() {
    let scene = Scene::new();
    scene.change_weights(|tensors| {
        tensors.get_mut("model.layers.2.input_layernorm.weight").unwrap().2.fill(0);
    });
    let ended = scene.quantize("out").run();
    assert_eq!(ended.code, 5, "{}{}", ended.stdout, ended.stderr);
    for part in
        ["model.layers.2.self_attn.q_proj", "read from the calibration data is zero", "--scheme nvfp4a16"]
    {
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
    }
    scene.quantize("weights").args(["--scheme", "nvfp4a16"]).succeed();
}
