//! Ranks on hosts that share a network and little else.

use std::process::Command;

use crate::skipped::skipped;
use crate::support::Scene;

/// What the script ends with where the machine makes no network namespaces.
const SKIPPED: i32 = 77;

/// Runs a script of `tests/hosts/` with at most `seconds`; skipped where it can't do its work.
fn script(name: &str, scene: &Scene, seconds: u32) {
    let script = format!("{}/tests/hosts/{name}", env!("CARGO_MANIFEST_DIR"));
    let run = Command::new("timeout")
        .args([&seconds.to_string(), &script, env!("CARGO_BIN_EXE_distq")])
        .arg(scene.model())
        .arg(scene.calib())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    if run.status.code() == Some(SKIPPED) {
        return skipped(&said);
    }
    assert!(run.status.success(), "{}{said}", String::from_utf8_lossy(&run.stdout));
}

#[test]
fn hosts_that_share_only_a_network_give_the_files_of_one_rank() {
    script("run", &Scene::new(), 120);
}

#[test]
fn a_link_that_goes_down_at_any_time_ends_the_job_by_name() {
    script("links", &Scene::lasting(8.0), 600);
}
