//! Runs that are stopped from outside, and what is left of them.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::{Distq, Scene, digests, listens_to_the_end, signal};

/// A scene whose run takes long enough to be caught in the middle.
fn scene() -> Scene {
    Scene::lasting(4.0)
}

fn quantize(scene: &Scene, out: &str) -> Distq {
    scene.quantize(out).args(["--method", "max", "--calib-samples", "100000"])
}

/// The unfinished run is not taken for a finished one, and goes on to the same bytes.
fn resumes(scene: &Scene, ranks: usize) {
    assert!(!scene.path("out").exists());
    let resumed = quantize(scene, "out").args(["--resume"]);
    if ranks > 1 {
        resumed.ranks(ranks).succeed()
    } else {
        resumed.succeed()
    };
    quantize(scene, "expected").succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}

#[test]
fn signals_end_a_run_alone_with_exit_code_5() {
    for (name, text) in [("-TERM", "SIGTERM"), ("-INT", "SIGINT")] {
        let scene = scene();
        let run = quantize(&scene, "out").start();
        scene.until_finished(1, &run);
        signal(name, run.pid());
        let ended = run.wait();
        assert_eq!(ended.code, 5, "{}", ended.stderr);
        assert!(ended.messages()[0].contains(text), "{}", ended.stderr);
        resumes(&scene, 1);
    }
}

#[test]
fn a_signal_to_the_launcher_ends_all_ranks_with_one_message() {
    // The launcher takes its time to pass a signal on.
    let scene = Scene::lasting(12.0);
    let run = quantize(&scene, "out").ranks(3).start();
    scene.until_finished(0, &run);
    signal("-TERM", run.pid());
    let ended = run.wait();
    assert_ne!(ended.code, 0);
    if listens_to_the_end() {
        assert_eq!(ended.messages().len(), 1, "{}", ended.stderr);
        assert!(ended.messages()[0].contains("SIGTERM"), "{}", ended.stderr);
    }
    resumes(&scene, 1);
}

#[test]
fn a_rank_that_is_killed_ends_the_job_which_goes_on_with_other_ranks() {
    let scene = scene();
    let run = quantize(&scene, "out").ranks(3).start();
    scene.until_finished(1, &run);
    signal("-KILL", run.rank(1));
    assert_ne!(run.wait().code, 0);
    resumes(&scene, 2);
}

#[test]
fn a_launcher_that_is_killed_leaves_no_rank_behind() {
    let scene = scene();
    let run = quantize(&scene, "out").ranks(3).start();
    scene.until_finished(1, &run);
    let ranks = [0, 1, 2].map(|rank| run.rank(rank));
    signal("-KILL", run.pid());
    let killed = Instant::now();
    // A process that has ended, and that nobody has asked for yet, has no environment.
    let lives = |pid: &u32| fs::read(format!("/proc/{pid}/environ")).is_ok_and(|bytes| !bytes.is_empty());
    while ranks.iter().any(lives) {
        assert!(killed.elapsed() < Duration::from_secs(60), "{ranks:?} are still there");
        sleep(Duration::from_millis(10));
    }
    if scene.path("out").exists() {
        // Open MPI 5's ranks come to the end without it.
        quantize(&scene, "expected").succeed();
        assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
    } else {
        resumes(&scene, 2);
    }
}

#[test]
fn a_silent_rank_ends_the_job_by_name() {
    for silent in [1, 0] {
        let scene = scene();
        let run = quantize(&scene, "out").args(["--link-timeout", "3"]).ranks(3).start();
        scene.until_finished(1, &run);
        let pid = run.rank(silent);
        signal("-STOP", pid);
        let ended = run.wait();
        signal("-KILL", pid);
        assert_eq!(ended.code, 5, "{}", ended.stderr);
        let expected = format!("rank {silent} (");
        let message = ended.messages().join(" ");
        assert!(message.contains(&expected) && message.contains("silent for 3 s"), "{}", ended.stderr);
        resumes(&scene, 3);
    }
}

#[test]
fn a_source_that_shrinks_is_named() {
    let scene = scene();
    let whole = fs::read(scene.weights()).unwrap();
    let run = quantize(&scene, "out").start();
    scene.until_finished(0, &run);
    fs::File::options().write(true).open(scene.weights()).unwrap().set_len(whole.len() as u64 / 3).unwrap();
    let ended = run.wait();
    assert_eq!(ended.code, 5, "{}", ended.stderr);
    assert!(ended.messages()[0].contains("model.safetensors"), "{}", ended.stderr);
    fs::write(scene.weights(), whole).unwrap();
    resumes(&scene, 1);
}

#[test]
fn a_rank_out_of_memory_says_so_and_ends_the_job() {
    let scene = scene();
    let run = quantize(&scene, "out").ranks(3).start();
    scene.until_finished(1, &run);
    // From now on it gets nothing more.
    let pid = run.rank(1);
    let limited = Command::new("prlimit").args(["--as=1", "--pid", &pid.to_string()]).status();
    assert!(limited.unwrap().success());
    let ended = run.wait();
    assert_eq!((ended.code, ended.messages().len()), (5, 1), "{}", ended.stderr);
    let message = ended.messages()[0];
    // What is refused first is chance: an allocation, or the mapping of a tensor.
    assert!(message.starts_with("rank 1 ("), "{message}");
    assert!(message.contains("out of memory") || message.contains("Cannot allocate memory"), "{message}");
    resumes(&scene, 3);
}

#[test]
fn a_disk_that_is_full_is_named_and_the_run_goes_on_when_it_is_not() {
    // A file, after how many bytes, and the rank that writes it. Space for weights is reserved ahead, which some file
    // systems can't.
    let cases = [
        ("out.partial/model.safetensors", 10_000, 1),
        ("distq-journal", 2_000, 0),
        ("out.partial/config.json", 0, 0),
        ("out.partial/digests.json", 0, 0),
    ];
    for (file, bytes, rank) in cases {
        let scene = Scene::new();
        let run = |out: &str| scene.quantize(out).args(["--method", "max"]);
        let full = format!("SHIM_FILE={file} SHIM_WRITE={bytes}");
        let ended = run("out").ranks(3).broken(rank, &full).run();
        assert_eq!((ended.code, ended.messages().len()), (5, 1), "{file}: {}", ended.stderr);
        let message = ended.messages()[0];
        let words = [&format!("rank {rank} ("), file, "No space left", "--resume"];
        assert!(words.iter().all(|word| message.contains(*word)), "{file}: {message}");
        assert!(!scene.path("out").exists(), "{file}");
        run("out").args(["--resume"]).succeed();
        run("expected").succeed();
        assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")), "{file}");
    }
}

#[test]
fn a_report_that_can_not_be_written_costs_no_output() {
    let scene = Scene::new();
    let report = scene.path("report.json");
    let run = scene.quantize("out").args(["--method", "max", "--report"]).arg(&report);
    let ended = run.broken(0, "SHIM_FILE=report.json SHIM_WRITE=0").run();
    assert_eq!((ended.code, ended.messages().len()), (5, 1), "{}", ended.stderr);
    assert!(ended.messages()[0].contains("report.json"), "{}", ended.stderr);
    scene.quantize("expected").args(["--method", "max"]).succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}

#[test]
fn a_source_that_can_not_be_read_is_told_from_a_wrong_output() {
    // Through a mapping while a layer is walked, and through a read while the output is proven.
    for (way, rank) in [("map", 1), ("read", 0)] {
        let scene = Scene::new();
        let run = |out: &str| scene.quantize(out).args(["--method", "max"]);
        // To learn which model it is, a rank reads each of its 57 tensors, and the disk's rate is at most 32 reads.
        let bad = format!("SHIM_FILE=model/model.safetensors SHIM_READ={way} SHIM_READS=89");
        let ended = run("out").ranks(3).broken(rank, &bad).run();
        assert_eq!((ended.code, ended.messages().len()), (5, 1), "{way}: {}", ended.stderr);
        let message = ended.messages()[0];
        let words = [&format!("rank {rank} ("), "the source", "--resume"];
        assert!(words.iter().all(|word| message.contains(*word)), "{way}: {message}");
        run("out").args(["--resume"]).ranks(2).succeed();
        run("expected").succeed();
        assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")), "{way}");
    }
}

/// A rank alone whose layers come one at a time, while groups of micro-batches pass: everything waits for everything.
#[test]
fn a_disk_that_fills_up_ends_a_streamed_run_at_once() {
    let scene = Scene::with(|config| {
        for (field, size) in [("hidden_size", 256), ("intermediate_size", 512), ("num_attention_heads", 8)] {
            config[field] = size.into();
        }
    });
    let lines = (0..60).map(|i| {
        let ids: Vec<u32> = (0..110).map(|j| (i * 7 + j * j) % 128).collect();
        serde_json::json!({ "input_ids": ids }).to_string() + "\n"
    });
    fs::write(scene.calib(), lines.collect::<String>()).unwrap();
    let run = |memory: &str| quantize(&scene, "out").args(["--memory-per-rank", memory]);
    let refused = run("1MiB").run();
    let least = refused.stderr.split("needs up to ").nth(1).unwrap().split(' ').next().unwrap();
    // Room for some micro-batches, and not for the six layers.
    let memory = format!("{}KiB", (1024.0 * (least.parse::<f64>().unwrap() + 0.6)) as u64);
    let report = scene.path("report.json");
    run(&memory).args(["--report"]).arg(&report).succeed();
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let stage = &report["plan"]["stages"][0];
    assert!(stage["mode"] == "streamed" && stage["group"].as_u64().unwrap() < 7, "{stage}");
    fs::rename(scene.path("out"), scene.path("expected")).unwrap();
    let started = Instant::now();
    let ended = run(&memory).broken(0, "SHIM_FILE=out.partial/model SHIM_WRITE=600000").run();
    assert_eq!((ended.code, ended.messages().len()), (5, 1), "{}", ended.stderr);
    assert!(ended.messages()[0].contains("No space left"), "{}", ended.stderr);
    assert!(started.elapsed() < Duration::from_secs(60));
    run(&memory).args(["--resume"]).succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}

#[test]
fn a_slow_disk_of_rank_0_does_not_make_it_silent() {
    let scene = Scene::new();
    let run =
        |out: &str| scene.quantize(out).args(["--method", "max", "--gather", "--link-timeout", "3"]).ranks(2);
    run("out").broken(0, "SHIM_FILE=out.partial/model SHIM_SLOW=5").succeed();
    run("expected").succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}

#[test]
fn an_output_that_can_not_be_published_is_published_by_resuming() {
    let scene = Scene::new();
    scene.quantize("expected").args(["--method", "max"]).succeed();
    let report = scene.path("report.json");
    for fault in ["SHIM_FILE=out.partial SHIM_RENAME=1", "SHIM_FILE=out.partial SHIM_SYNC=1"] {
        let run = scene.quantize("out").args(["--method", "max", "--report"]).arg(&report);
        let ended = run.clone().broken(0, fault).run();
        assert_eq!((ended.code, ended.messages().len()), (5, 1), "{fault}: {}", ended.stderr);
        assert!(ended.messages()[0].contains("--resume"), "{fault}: {}", ended.stderr);
        assert!(!scene.path("out").exists() && !report.exists(), "{fault}");
        run.args(["--resume"]).succeed();
        assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")), "{fault}");
        let text: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
        assert_eq!(text["ranks"][0]["phases"]["passes"], 0, "nothing is computed again");
        fs::remove_file(&report).unwrap();
        fs::remove_dir_all(scene.path("out")).unwrap();
    }
}

#[test]
fn a_rank_that_can_not_open_the_output_says_that_it_goes_through_rank_0() {
    let scene = Scene::new();
    let run = |out: &str| scene.quantize(out).args(["--method", "max"]);
    let ended = run("out").ranks(2).broken(1, "SHIM_FILE=out.partial/model SHIM_OPEN=1").succeed();
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("Too many open files") && said.contains("through rank 0"), "{said}");
    run("expected").broken(0, "SHIM_SPACE=unknown").succeed();
    assert_eq!(digests(&scene.path("out")), digests(&scene.path("expected")));
}
