//! Runs that are stopped from outside, and what is left of them.

use std::fs;

use crate::support::{Distq, Scene, digests, signal};

/// A scene whose run takes long enough to be caught in the middle.
fn scene() -> Scene {
    let scene = Scene::new();
    let few = fs::read_to_string(scene.calib()).unwrap();
    fs::write(scene.calib(), few.repeat(1500)).unwrap();
    scene
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
    let scene = scene();
    let run = quantize(&scene, "out").ranks(3).start();
    // The launcher takes its time to pass a signal on.
    scene.until_finished(0, &run);
    signal("-TERM", run.pid());
    let ended = run.wait();
    assert_ne!(ended.code, 0);
    assert_eq!(ended.messages().len(), 1, "{}", ended.stderr);
    assert!(ended.messages()[0].contains("SIGTERM"), "{}", ended.stderr);
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
