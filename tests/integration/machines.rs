//! What ranks use of their machines, and what they say of it.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::support::{Distq, Scene, mpirun};

const DISTQ: &str = env!("CARGO_BIN_EXE_distq");

/// Threads and crowding by rank of two ranks that are started by this command and mpirun, whose number of threads is
/// distq's choice.
fn shares(scene: &Scene, before: &[&str]) -> Vec<(u64, f64)> {
    let report = scene.path("report.json");
    let [model, out, calib] = [scene.model(), scene.path("out"), scene.calib()];
    let launcher = mpirun();
    let mut command = Command::new(before[0]);
    command.args(&before[1..]).arg(launcher.get_program()).args(["-np", "2", DISTQ, "quantize"]);
    command.arg(model).arg(out).arg("--calib").arg(calib).args([
        "--calib-min-tokens",
        "1",
        "--method",
        "max",
    ]);
    command.args(["--overwrite", "--report"]).arg(&report).env_remove("OMP_NUM_THREADS");
    command.envs(launcher.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let machines = report["ranks"].as_array().unwrap().iter().map(|rank| &rank["machine"]);
    machines.map(|m| (m["threads"].as_u64().unwrap(), m["crowding"].as_f64().unwrap())).collect()
}

#[test]
fn cores_that_ranks_share_are_divided_and_those_that_mpirun_may_not_use_stay_unused() {
    let scene = Scene::new();
    let cores = std::thread::available_parallelism().unwrap().get() as u64;
    let share = ((cores / 2).max(1), (2.0 / cores as f64).max(1.0));
    assert_eq!(shares(&scene, &["env"]), [share; 2]);
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let first: String = allowed.trim().chars().take_while(char::is_ascii_digit).collect();
    assert_eq!(shares(&scene, &["taskset", "-c", &first]), [(1, 2.0); 2]);
}

#[test]
fn warnings_of_any_thread_name_the_rank() {
    let scene = Scene::new();
    let ended = scene.quantize("out").args(["--calib-samples", "1"]).ranks(2).succeed();
    let warnings: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("WARN")).collect();
    for rank in ["rank 0 (", "rank 1 ("] {
        assert!(warnings.iter().any(|line| line.contains(rank)), "no layer of {rank}: {warnings:?}");
    }
    assert!(warnings.iter().all(|line| line.contains("WARN rank ")), "{warnings:?}");
}

#[test]
fn another_directory_for_the_model_is_named() {
    let scene = Scene::new();
    let plan = |model: &str, elsewhere: &str| {
        let mut command = Command::new(DISTQ);
        command.args(["plan", model, "--scheme", "nvfp4a16", "--method", "max"]);
        command.env("DISTQ_MODEL", elsewhere).output().unwrap()
    };
    let model = scene.model().display().to_string();
    let ended = plan("/no/such/model", &model);
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.success(), "{said}");
    for word in ["DISTQ_MODEL", &model, "/no/such/model"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    // An empty one counts as none.
    let ended = plan(&model, "");
    assert!(ended.status.success() && !String::from_utf8_lossy(&ended.stderr).contains("DISTQ_MODEL"));
}

#[test]
fn a_size_whose_unit_was_forgotten_is_refused_with_the_ways_to_write_it() {
    for (option, value) in [("--memory-per-rank", "118"), ("--nodes", "128:uma"), ("--nodes", "24GiB:gpu:64")]
    {
        let ended = Distq::new(&["plan", "model"]).arg(option).arg(value).run();
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        for part in [option, "without a unit", "GiB", "B if bytes are meant"] {
            assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
        }
    }
}
