//! What a resumed run need not do again, with and without `--work-dir`; and runs whose hidden states go to files.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::skipped::skipped;
use crate::support::{Distq, Scene, digests, signal};

/// A scene of many micro-batches.
fn scene() -> Scene {
    let scene = Scene::new();
    let few = fs::read_to_string(scene.calib()).unwrap();
    fs::write(scene.calib(), few.repeat(150)).unwrap();
    fs::create_dir(scene.path("work")).unwrap();
    scene
}

fn quantize(scene: &Scene, out: &str, method: &str) -> Distq {
    let command = scene.quantize(out).args(["--method", method, "--calib-samples", "100000", "--report"]);
    command.arg(scene.path("report.json"))
}

fn with_dir(scene: &Scene, command: Distq) -> Distq {
    command.arg("--work-dir").arg(scene.path("work"))
}

fn report(scene: &Scene) -> Value {
    serde_json::from_slice(&fs::read(scene.path("report.json")).unwrap()).unwrap()
}

/// Micro-batches through layers, over all ranks of the last run.
fn passes(scene: &Scene) -> u64 {
    report(scene)["ranks"].as_array().unwrap().iter().map(|r| r["phases"]["passes"].as_u64().unwrap()).sum()
}

/// Calibration documents.
fn scene_documents(scene: &Scene) -> u64 {
    fs::read_to_string(scene.calib()).unwrap().lines().count() as u64
}

/// Waits until the journal says that so many documents have passed a layer.
fn until_seen(scene: &Scene, layer: u64, documents: u64) {
    let started = std::time::Instant::now();
    let has_seen = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap_or_default();
        line["layer"] == layer && line["documents"].as_u64() >= Some(documents)
    };
    loop {
        let journal = fs::read_to_string(scene.path("out.partial/distq-journal.jsonl")).unwrap_or_default();
        if journal.lines().any(has_seen) {
            return;
        }
        assert!(started.elapsed().as_secs() < 80, "layer {layer} never sees {documents} documents");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// What is in a directory, and in those in it.
fn files(dir: &Path) -> Vec<String> {
    let names = |dir: &Path| -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let inside = |name: String| {
        let path = dir.join(&name);
        let files = if path.is_dir() { names(&path) } else { vec![] };
        files.iter().map(|file| format!("{name}/{file}")).chain([name.clone()]).collect::<Vec<_>>()
    };
    names(dir).into_iter().flat_map(inside).collect()
}

/// All that a process said.
fn said(ended: &std::process::Output) -> String {
    [&ended.stdout, &ended.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

const LAYERS: u64 = 6;

#[test]
fn with_a_directory_a_resumed_run_forwards_nothing_that_is_finished() {
    for method in ["max", "best"] {
        let scene = scene();
        quantize(&scene, "expected", method).succeed();
        let (all, expected) = (passes(&scene), digests(&scene.path("expected")));
        assert_eq!(all % LAYERS, 0, "one rank walks once");
        // The layers that are finished at the kill, and how many ranks go on.
        for (layers, ranks) in [(1, 1), (3, 1), (2, 2), (4, 3)] {
            let run = with_dir(&scene, quantize(&scene, "out", method)).start();
            scene.until_finished(layers, &run);
            signal("-KILL", run.pid());
            run.wait();
            if scene.path("out").exists() {
                panic!("{method}: finished before it was killed");
            }
            let finished = scene.layers_finished() as u64;
            let mut resume = with_dir(&scene, quantize(&scene, "out", method)).args(["--resume"]);
            if ranks > 1 {
                resume = resume.ranks(ranks);
            }
            resume.succeed();
            assert_eq!(digests(&scene.path("out")), expected, "{method}, killed after {layers} layers");
            let left = (LAYERS - finished.min(LAYERS)) * (all / LAYERS);
            // Stages that are waited for first forward alone.
            let sweeps = if method == "best" && ranks > 1 { 2 } else { 1 };
            assert!(passes(&scene) <= sweeps * left, "{method}: {} passes, {left} left", passes(&scene));
            assert_eq!(
                files(&scene.path("work")),
                Vec::<String>::new(),
                "nothing is left when it is published"
            );
            fs::remove_dir_all(scene.path("out")).unwrap();
        }
    }
}

#[test]
fn several_ranks_that_are_killed_go_on_with_any_number() {
    for method in ["max", "best"] {
        let scene = scene();
        quantize(&scene, "expected", method).succeed();
        let expected = digests(&scene.path("expected"));
        // Killed before its first byte, in its second layer, and in its third: a layer has about 17 KB.
        for (bytes, before, after) in [(0, 3, 3), (20_000, 3, 1), (40_000, 2, 3)] {
            let run = with_dir(&scene, quantize(&scene, "out", method)).ranks(before);
            let killed = run.broken(1, &format!("SHIM_FILE=model.safetensors SHIM_KILL={bytes}")).run();
            assert!(killed.code != 0 && !scene.path("out").exists(), "{}", killed.stderr);
            let resume = with_dir(&scene, quantize(&scene, "out", method)).args(["--resume"]);
            resume.ranks(after).succeed();
            assert_eq!(digests(&scene.path("out")), expected, "{method}: {before} ranks, then {after}");
            assert_eq!(files(&scene.path("work")), Vec::<String>::new());
            fs::remove_dir_all(scene.path("out")).unwrap();
        }
    }
}

/// The journal alone knows which documents every layer has seen.
#[test]
fn groups_that_have_passed_are_not_walked_again() {
    let scene = scene();
    let planned = |memory: u64| {
        quantize(&scene, "expected", "max")
            .args(["--overwrite", "--memory-per-rank", &memory.to_string()])
            .ranks(2)
            .succeed();
        let stage = report(&scene)["plan"]["stages"][0].clone();
        (stage["group"].as_u64().unwrap(), stage["peak_memory"].as_u64().unwrap())
    };
    // Groups are as large as the machine's rates have it. Room for ten micro-batches of 1024 tokens at most.
    let (group, peak) = planned(1 << 30);
    let memory = peak - group.saturating_sub(10) * 1024 * 64 * 2;
    let (group, _) = planned(memory);
    assert!(group <= 10, "{group}");
    let run =
        |out: &str| quantize(&scene, out, "max").args(["--memory-per-rank", &memory.to_string()]).ranks(2);
    let all = passes(&scene);
    let running = run("out").start();
    until_seen(&scene, LAYERS - 1, scene_documents(&scene) * 3 / 4);
    signal("-KILL", running.rank(1));
    running.wait();
    run("out").args(["--resume"]).succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
    // Three of four documents have passed the last layer, so they had passed all others.
    assert!(passes(&scene) * 2 < all, "{} of {all}", passes(&scene));
}

#[test]
fn damaged_states_are_ignored_with_a_warning() {
    let scene = scene();
    quantize(&scene, "expected", "best").succeed();
    let run = with_dir(&scene, quantize(&scene, "out", "best")).start();
    scene.until_finished(3, &run);
    signal("-KILL", run.pid());
    run.wait();
    let kept: Vec<_> =
        files(&scene.path("work")).into_iter().filter(|name| name.ends_with(".states")).collect();
    assert!((1..=3).contains(&kept.len()), "{kept:?}");
    for name in &kept {
        let path = scene.path("work").join(name);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let resumed = with_dir(&scene, quantize(&scene, "out", "best")).args(["--resume"]).succeed();
    assert!((resumed.stdout + &resumed.stderr).contains("damaged hidden states"));
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}

#[test]
fn hidden_states_that_have_no_room_go_to_files() {
    let scene = scene();
    let method = "smooth+wsweep";
    quantize(&scene, "expected", method).succeed();
    let least = {
        let refused = quantize(&scene, "least", method).args(["--memory-per-rank", "1MiB"]).run();
        assert_eq!(refused.code, 4);
        let plan =
            with_dir(&scene, quantize(&scene, "least", method)).args(["--memory-per-rank", "1MiB"]).run();
        assert_eq!(plan.code, 4, "{}", plan.stderr);
        let needed = |text: &str| -> f64 {
            let mib = text.split("up to ").nth(1).unwrap().split(" MiB").next().unwrap();
            mib.parse().unwrap_or_else(|_| panic!("{text}"))
        };
        let (without, with) = (needed(&refused.stderr), needed(&plan.stderr));
        assert!(with + 10.0 < without, "{with} MiB with a directory, {without} MiB without");
        format!("{}KiB", ((with + 1.0) * 1024.0) as u64)
    };
    for ranks in 1..=3 {
        let out = format!("spilled{ranks}");
        let run = with_dir(&scene, quantize(&scene, &out, method)).args(["--memory-per-rank", &least]);
        run.ranks(ranks).succeed();
        let plan = report(&scene)["plan"].clone();
        assert!(plan["stages"].as_array().unwrap().iter().all(|stage| stage["mode"] == "spilled"), "{plan}");
        assert_eq!(digests(&scene.path(&out)), digests(&scene.path("expected")), "{ranks} ranks");
        assert_eq!(files(&scene.path("work")), Vec::<String>::new());
    }
}

#[test]
fn a_directory_that_is_no_use_is_named_before_anything_is_made() {
    let scene = scene();
    fs::write(scene.path("file"), "x").unwrap();
    for wrong in ["nowhere", "file"] {
        let ended = scene.quantize("out").arg("--work-dir").arg(scene.path(wrong)).run();
        assert_eq!(ended.code, 5, "{}", ended.stderr);
        assert!(ended.messages()[0].contains("--work-dir"), "{}", ended.stderr);
        assert!(!scene.path("out.partial").exists());
    }
}

#[test]
fn a_full_directory_ends_a_run_only_where_it_needs_it() {
    let scene = scene();
    // The mount ends with its namespace.
    let on_small_disk = |arguments: &[&str]| {
        let script = "mount -t tmpfs -o size=256k none \"$WORK\" || exit 77; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_distq"), "quantize"]);
        command.arg(scene.model()).arg(scene.path("out")).arg("--calib").arg(scene.calib());
        command.args(["--calib-samples", "100000", "--calib-min-tokens", "1", "--method", "smooth+wsweep"]);
        command.arg("--work-dir").arg(scene.path("work")).args(arguments).env("WORK", scene.path("work"));
        command.env("OMP_NUM_THREADS", "1").output().expect("util-linux is there")
    };
    let ended = on_small_disk(&["--memory-per-rank", "100MiB"]);
    let text = said(&ended);
    if ended.status.code() == Some(77) || text.contains("unshare failed") {
        return skipped(&format!("this machine mounts nothing: {text}"));
    }
    assert!(ended.status.success() && text.contains("the run goes on"), "{text}");
    quantize(&scene, "expected", "smooth+wsweep").succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
    fs::remove_dir_all(scene.path("out")).unwrap();

    let ended = on_small_disk(&["--memory-per-rank", "73MiB"]);
    let text = said(&ended);
    assert_eq!(ended.status.code(), Some(5), "{text}");
    assert!(text.contains("can't keep hidden states") && text.contains("--work-dir"), "{text}");
    quantize(&scene, "out", "smooth+wsweep").args(["--resume"]).succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}
