//! Every byte that is written for the small checkpoints of all families, held to digests that were recorded before:
//! a change of the structure of the program changes none of them.
//!
//! `DISTQ_RECORD=1 cargo test --release --test integration bytes` records them again, for processors like this one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::skipped::skipped;
use crate::support::{Distq, digests};

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
    let mut all: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn recorded_at() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/output_digests.json")
}

/// What of the processor decides in which order sums are taken.
fn processor() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
        ];
        let has: Vec<&str> = known.into_iter().filter_map(|(name, has)| has.then_some(name)).collect();
        format!("x86_64 {}", has.join(" "))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::env::consts::ARCH.to_string()
    }
}

/// A digest of everything that a run writes.
fn digest(model: &Path, calib: &Path, method: &str, layout: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    Distq::new(&["quantize"])
        .arg(model)
        .arg(&out)
        .args(["--method", method, "--layout", layout, "--calib-min-tokens", "1"])
        .arg("--calib")
        .arg(calib)
        .succeed();
    blake3::hash(json!(digests(&out)).to_string().as_bytes()).to_hex()[..32].to_string()
}

/// A copy of a fixture without what Transformers computed, and documents for it.
pub fn scene(fixture: &Path) -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (model, calib) = (dir.path().join("model"), dir.path().join("calib.jsonl"));
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(fixture).unwrap().map(|entry| entry.unwrap()) {
        if entry.file_name() != "expected.safetensors" {
            fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
        }
    }
    let mut random = crate::support::Random::new(11);
    let line = |length: usize, random: &mut crate::support::Random| {
        let ids: Vec<u32> = (0..length).map(|_| random.next() % 64).collect();
        json!({ "input_ids": ids }).to_string() + "\n"
    };
    let lines: String = [40, 70, 24, 9, 64, 33, 51, 17].iter().map(|&n| line(n, &mut random)).collect();
    fs::write(&calib, lines).unwrap();
    (dir, model, calib)
}

/// SmolLM2, as `make fixtures` puts it into .cache/, and a few of the recorded documents.
fn smollm2() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let recorded = fs::read(root.join("tests/fixtures/smollm2_amax.json")).unwrap();
    let recorded: Value = serde_json::from_slice(&recorded).unwrap();
    let documents = recorded["ids"].as_array().unwrap()[..4].iter();
    let short = documents.map(|ids| json!({ "input_ids": ids.as_array().unwrap()[..96] }).to_string() + "\n");
    let dir = tempfile::tempdir().unwrap();
    let calib = dir.path().join("calib.jsonl");
    fs::write(&calib, short.collect::<String>()).unwrap();
    (dir, root.join(".cache/smollm2"), calib)
}

/// Digests by method and layout.
fn all_digests(name: &str, model: &Path, calib: &Path) -> Vec<(String, String)> {
    let layouts = ["compressed-tensors", "modelopt"];
    let runs = ["max", "best"].into_iter().flat_map(|method| layouts.map(|layout| (method, layout)));
    runs.map(|(method, layout)| (format!("{name} {method} {layout}"), digest(model, calib, method, layout)))
        .collect()
}

#[test]
fn outputs_have_the_bytes_that_were_recorded() {
    let stored: Value =
        serde_json::from_slice(&fs::read(recorded_at()).unwrap_or_default()).unwrap_or_default();
    let processor = processor();
    let record = std::env::var_os("DISTQ_RECORD").is_some();
    let known = stored[&processor].as_object().cloned().unwrap_or_default();
    if known.is_empty() && !record {
        return skipped(&format!("no digests are recorded for processors with {processor:?}"));
    }
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for fixture in fixtures() {
        let name = fixture.file_name().unwrap().to_string_lossy().into_owned();
        if !record && !known.keys().any(|key| key.starts_with(&format!("{name} "))) {
            continue;
        }
        let (_dir, model, calib) = scene(&fixture);
        found.extend(all_digests(&name, &model, &calib));
    }
    let (_dir, model, calib) = smollm2();
    found.extend(all_digests("smollm2", &model, &calib));
    if record {
        let mut stored = stored.as_object().cloned().unwrap_or_default();
        stored.insert(processor, json!(found));
        fs::write(recorded_at(), serde_json::to_string_pretty(&stored).unwrap() + "\n").unwrap();
        return;
    }
    assert_eq!(found.len(), known.len(), "every recorded fixture is there");
    for (what, digest) in found {
        assert_eq!(known[&what], digest, "{what}: the bytes of the output are others than those recorded");
    }
}
