//! Any number of ranks, any split, any way to the disk: the same bytes; and each rank reads only its own.

use std::path::Path;

use crate::support::{Distq, Scene, digests};

#[test]
fn every_number_of_ranks_and_every_split_gives_the_same_files() {
    let scene = Scene::new();
    for layout in ["compressed-tensors", "modelopt"] {
        let run = |name: &str| scene.quantize(name).args(["--layout", layout, "--max-shard-size", "40KB"]);
        let name = |case: &str| format!("{layout}-{case}");
        run(&name("alone")).succeed();
        let expected = digests(&scene.path(&name("alone")));
        assert!(expected.len() > 4, "several shards: {expected:?}");
        let cases: [(&str, usize, &[&str]); 7] = [
            ("1", 1, &[]),
            ("2", 2, &[]),
            ("3", 3, &["--layers-per-rank", "1,4,1"]),
            ("5", 5, &[]),
            ("6", 6, &[]),
            ("gather", 3, &["--gather"]),
            ("gather-uneven", 2, &["--gather", "--layers-per-rank", "5,1"]),
        ];
        for (case, ranks, extra) in cases {
            let mut command = run(&name(case)).ranks(ranks);
            for arg in extra {
                command = command.arg(arg);
            }
            command.succeed();
            assert_eq!(digests(&scene.path(&name(case))), expected, "{layout}, {case}");
        }
    }
}

#[test]
fn methods_that_walk_twice_give_the_same_files_on_any_ranks() {
    let scene = Scene::new();
    for (method, scheme) in
        [("best", "nvfp4"), ("smooth+wsweep", "nvfp4"), ("best", "nvfp4a16"), ("sweep", "nvfp4")]
    {
        let name = |case: &str| format!("{method}-{scheme}-{case}");
        let run = |case: &str| scene.quantize(&name(case)).args(["--method", method, "--scheme", scheme]);
        run("alone").succeed();
        let expected = digests(&scene.path(&name("alone")));
        run("2").ranks(2).succeed();
        run("3").ranks(3).args(["--layers-per-rank", "1,4,1", "--gather"]).succeed();
        run("6").ranks(6).succeed();
        for case in ["2", "3", "6"] {
            assert_eq!(digests(&scene.path(&name(case))), expected, "{method} {scheme}, {case} ranks");
        }
    }
}

#[test]
fn stages_that_stand_in_another_order_than_ranks_give_the_same_files() {
    let scene = Scene::new();
    // An embedding and a head far larger than a layer, and a first rank without room for either.
    scene.widen_vocabulary(16384);
    // Several groups of micro-batches, so that keeping weights is worth it.
    let calib = std::fs::read_to_string(scene.calib()).unwrap();
    std::fs::write(scene.calib(), calib.repeat(8)).unwrap();
    scene.quantize("alone").args(["--method", "max"]).succeed();
    let report = scene.path("report.json");
    let memory = ["--method", "max", "--memory-per-rank", "66MiB,1GiB,1GiB", "--report"];
    scene.quantize("three").args(memory).arg(&report).ranks(3).succeed();
    assert_eq!(digests(&scene.path("three")), digests(&scene.path("alone")));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let stages = report["plan"]["stages"].as_array().unwrap();
    let ranks: Vec<_> = stages.iter().map(|stage| stage["rank"].as_u64().unwrap()).collect();
    // Which of the others comes first depends on how fast each was measured to be.
    assert_eq!((ranks.len(), ranks[1]), (3, 0), "rank 0 has room for neither end: {ranks:?}");
    assert!(stages.iter().any(|stage| stage["mode"] == "resident"), "{stages:?}");
}

#[test]
fn weight_only_output_is_the_same_on_any_ranks_and_needs_no_data() {
    let scene = Scene::new();
    let run = |name: &str| {
        let [model, out] = [scene.model(), scene.path(name)];
        Distq::new(&["quantize"]).arg(model).arg(out).args([
            "--scheme",
            "nvfp4a16",
            "--method",
            "max",
            "--calib",
            "no/such/file.jsonl",
        ])
    };
    run("alone").succeed();
    run("three").ranks(3).succeed();
    assert_eq!(digests(&scene.path("alone")), digests(&scene.path("three")));
    let verified = Distq::new(&["verify"]).arg(scene.path("three")).arg("--source").arg(scene.model());
    verified.succeed();
}

#[test]
fn each_rank_reads_the_bytes_of_its_slice_and_no_others() {
    let scene = Scene::new();
    let report = scene.path("report.json");
    let run = scene.quantize("out").args(["--layers-per-rank", "1,3,2", "--report"]).arg(&report).ranks(3);
    run.succeed();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let bytes = std::fs::read(scene.weights()).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut expected = [0u64; 3];
    for (name, view) in tensors.tensors() {
        let owner = match name.strip_prefix("model.layers.") {
            None if name == "model.embed_tokens.weight" => 0,
            None => 2,
            Some(rest) => match rest.split('.').next().unwrap().parse::<usize>().unwrap() {
                0 => 0,
                1..4 => 1,
                _ => 2,
            },
        };
        expected[owner] += view.data().len() as u64;
    }
    for rank in 0..3 {
        assert_eq!(report["ranks"][rank]["bytes_read"].as_u64(), Some(expected[rank]), "rank {rank}");
        assert_eq!(
            report["plan"]["stages"][rank]["bytes_read"].as_u64(),
            Some(expected[rank]),
            "rank {rank}"
        );
        let health = &report["health"][rank.to_string()];
        let layers = [1, 3, 2][rank];
        assert_eq!(health["weights_good"], 7 * layers, "rank {rank}");
        assert_eq!(health["inputs_good"], 7 * layers, "rank {rank}");
    }
    assert_eq!(report["calibration"]["samples"], 9);
}

#[test]
fn the_output_is_what_other_programs_made_of_the_same_source() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let scene = Scene::new();
    let ids = std::fs::read(golden.join("calib_ids.json")).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_slice(&ids).unwrap();
    let lines: String =
        ids.iter().map(|ids| serde_json::json!({ "input_ids": ids }).to_string() + "\n").collect();
    std::fs::write(scene.calib(), lines).unwrap();
    let out = scene.path("out");
    let source = golden.join("src_bf16");
    let run = Distq::new(&["quantize"]).arg(&source).arg(&out).args([
        "--layout",
        "modelopt",
        "--method",
        "max",
        "--calib-min-tokens",
        "1",
    ]);
    run.arg("--calib").arg(scene.calib()).ranks(2).succeed();
    let read = |path: &Path| std::fs::read(path.join("model.safetensors")).unwrap();
    let (ours, theirs) = (read(&out), read(&golden));
    let ours = safetensors::SafeTensors::deserialize(&ours).unwrap();
    for (name, view) in safetensors::SafeTensors::deserialize(&theirs).unwrap().tensors() {
        if name.ends_with("k_scale") || name.ends_with("v_scale") {
            continue; // that export also calibrated the cache
        }
        let mine = ours.tensor(&name).unwrap();
        assert_eq!((mine.dtype(), mine.shape()), (view.dtype(), view.shape()), "{name}");
        if name.ends_with("input_scale") {
            let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
            let ratio = number(mine.data()) / number(view.data());
            assert!((ratio - 1.0).abs() < 0.01, "{name}: {ratio}");
        } else {
            assert_eq!(mine.data(), view.data(), "{name}");
        }
    }
}
