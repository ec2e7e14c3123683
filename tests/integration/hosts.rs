//! Ranks on hosts that share a network and little else.

use std::process::Command;

use crate::support::Scene;

/// What the script ends with where the machine makes no network namespaces.
const SKIPPED: i32 = 77;

#[test]
#[allow(clippy::print_stderr)] // a skipped test says so
fn hosts_that_share_only_a_network_give_the_files_of_one_rank() {
    let scene = Scene::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosts/run");
    let run = Command::new("timeout")
        .args(["60", script, env!("CARGO_BIN_EXE_distq")])
        .arg(scene.model())
        .arg(scene.calib())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    if run.status.code() == Some(SKIPPED) {
        eprintln!("{said}");
        return;
    }
    assert!(run.status.success(), "{}{said}", String::from_utf8_lossy(&run.stdout));
}
