//! Tiny checkpoints of all dense families and of the wrappers around them (tests/fixtures/dense): what comes out is
//! proven against what went in, and everything beside the decoder is carried over.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use distq::checkpoint::Checkpoint;
use distq::model::Model;
use serde_json::{Map, Value, json};

use crate::bytes::scene;
use crate::support::{Distq, digests};

/// A fixture with documents for it, in a scratch directory.
struct Fixture {
    name: String,
    model: PathBuf,
    calib: PathBuf,
    dir: tempfile::TempDir,
}

const LAYOUTS: [&str; 2] = ["compressed-tensors", "modelopt"];

impl Fixture {
    fn of(source: &Path) -> Fixture {
        let (dir, model, calib) = scene(source);
        let vocab: Map<String, Value> = (0..64).map(|i| (format!("w{i}"), i.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": null, "decoder": null, "truncation": null, "padding": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
        });
        fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let text: Vec<String> = (0..96).map(|i| format!("w{}", i * i % 61)).collect();
        fs::write(dir.path().join("text.txt"), text.join(" ")).unwrap();
        let name = source.file_name().unwrap().to_string_lossy().into_owned();
        Fixture { name, model, calib, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn quantize(&self, out: &str, args: &[&str]) -> Distq {
        let run = Distq::new(&["quantize"]).arg(&self.model).arg(self.path(out));
        let run = run.args(["--calib-min-tokens", "1"]).arg("--calib").arg(&self.calib);
        args.iter().fold(run, |run, arg| run.arg(arg))
    }

    /// What `quantize` makes is proven, alone and against the source, and has everything that is not quantized.
    fn check(&self, out: &str) {
        let verify = || Distq::new(&["verify", "--quiet"]).arg(self.path(out));
        verify().succeed();
        verify().arg("--source").arg(&self.model).succeed();
        let (source, output) = (self.open(&self.model), self.open(&self.path(out)));
        let what = format!("{} {out}", self.name);
        let model = Model::of(&source).unwrap();
        let outside =
            model.tensors().filter(|spec| model.layer_of(&spec.name).is_none()).map(|spec| spec.name);
        let carried = source.tensors.keys().filter(|name| model.is_carried(name)).cloned();
        for name in outside.chain(carried) {
            let (there, here) = (source.tensor(&name).unwrap(), output.tensor(&name).unwrap());
            assert!((there.dtype, &there.shape) == (here.dtype, &here.shape), "{what}: {name}");
            assert!(there.bytes() == here.bytes(), "{what}: {name} is another");
        }
        let mut config = output.config.clone();
        let quantization = config.remove("quantization_config").unwrap();
        assert_eq!(config, source.config, "{what}");
        let ignore = quantization["ignore"].as_array().unwrap();
        assert!(ignore.iter().any(|entry| entry.as_str().unwrap().contains("lm_head")), "{what}: {ignore:?}");
        assert_eq!(
            model.is_wrapped,
            ignore.iter().any(|entry| entry.as_str().unwrap().contains('*')),
            "{what}"
        );
    }

    fn open(&self, dir: &Path) -> Checkpoint {
        Checkpoint::open(dir).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    fn prove(&self) {
        for method in ["max", "best"] {
            for layout in LAYOUTS {
                let out = format!("{method}-{layout}");
                self.quantize(&out, &["--method", method, "--layout", layout]).succeed();
                self.check(&out);
            }
        }
        let inspected = Distq::new(&["inspect", "--json"]).arg(self.path("best-modelopt")).succeed().json();
        assert!(inspected["supported"] == true && inspected["layers"].is_u64(), "{}: {inspected}", self.name);
        let planned =
            Distq::new(&["plan", "--json", "--memory-per-rank", "1GiB"]).arg(&self.model).succeed().json();
        assert!(planned["stages"].is_array(), "{}: {planned}", self.name);
        let run = Distq::new(&["eval", "--json", "--window-tokens", "32", "--device", "cpu"]).arg("--text");
        let run = run.arg(self.path("text.txt")).arg(self.path("best-modelopt")).arg("--reference");
        let measured = run.arg(&self.model).succeed().json();
        assert!(measured["models"][0]["perplexity"].is_f64(), "{}: {measured}", self.name);
    }
}

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dense");
    let mut all: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn fixture(name: &str) -> Fixture {
    Fixture::of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dense").join(name))
}

#[test]
fn outputs_of_every_family_are_proven_and_carry_what_is_beside_the_decoder() {
    let (fixtures, next, failed) = (fixtures(), AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let prove = || {
        while let Some(dir) = fixtures.get(next.fetch_add(1, Ordering::Relaxed)) {
            let proven = std::panic::catch_unwind(|| Fixture::of(dir).prove());
            if let Err(panic) = proven {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                failed.lock().unwrap().insert(dir.clone(), text);
            }
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(prove))));
    let failed = failed.into_inner().unwrap();
    assert!(fixtures.len() >= 47, "the fixtures are there");
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), fixtures.len());
}

#[test]
fn a_wrapper_has_the_same_bytes_on_any_number_of_ranks() {
    let fixture = fixture("gemma3");
    for method in ["max", "best"] {
        let run = |out: &str| fixture.quantize(&format!("{method}-{out}"), &["--method", method]);
        let of = |out: &str| digests(&fixture.path(&format!("{method}-{out}")));
        run("1").succeed();
        run("2").ranks(2).succeed();
        run("3").ranks(3).succeed();
        assert!(of("2") == of("1") && of("3") == of("1"), "{method}");
    }
}

/// Engines merge q, k and v also where v is what k's linear gives: what is left of them is listed for all three.
#[test]
fn where_keys_are_values_leaving_keys_lists_values() {
    let fixture = fixture("gemma4");
    for layout in LAYOUTS {
        let keys = r"re:.*layers\.5\.self_attn\.[qk]_proj";
        let args =
            ["--ignore", keys, "--ignore", "re:.*vision_tower.*", "--method", "max", "--layout", layout];
        fixture.quantize(layout, &args).succeed();
        fixture.check(layout);
        let config = fixture.open(&fixture.path(layout)).config;
        let listed = config["quantization_config"]["ignore"].to_string();
        for part in ["q_proj", "k_proj", "v_proj"] {
            assert!(
                listed.contains(&format!("\"model.language_model.layers.5.self_attn.{part}\"")),
                "{listed}"
            );
        }
    }
}
