//! FP8 sources: read as the BF16 values that other programs make of them (tests/fixtures/make_fp8.py), and quantized to
//! the same bytes.

use std::fs;
use std::path::{Path, PathBuf};

use distq::checkpoint::Checkpoint;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::support::{Distq, Ended, Random, Tensors, change_safetensors, digests};

const FORMS: [&str; 7] =
    ["block", "block_bf16", "block_e8m0", "block_partial", "tensor_static", "tensor", "channel"];

fn fixture(form: &str, kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8").join(form).join(kind)
}

/// Bytes of the data of all safetensors files of a directory.
fn stored_bytes(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let weights = files.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
    weights.map(|path| fs::metadata(&path).unwrap().len() - header_bytes(&path)).sum()
}

fn header_bytes(path: &Path) -> u64 {
    let start: [u8; 8] = fs::read(path).unwrap()[..8].try_into().unwrap();
    8 + u64::from_le_bytes(start)
}

/// A scratch directory with calibration data.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let mut random = Random::new(3);
        let lines = (0..10).map(|i| {
            let ids: Vec<u32> = (0..20 + 7 * i).map(|_| random.next() % 64).collect();
            json!({ "input_ids": ids }).to_string() + "\n"
        });
        fs::write(place.path("calib.jsonl"), lines.collect::<String>()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn quantize(&self, model: &Path, out: &str, options: &[&str]) -> Distq {
        let run = Distq::new(&["quantize", "--calib-min-tokens", "1", "--device", "cpu", "--calib"]);
        let run = run.arg(self.path("calib.jsonl")).arg(model).arg(self.path(out));
        options.iter().fold(run, |run, option| run.arg(*option))
    }

    /// Both sources of a form, quantized in the same way on so many ranks, have the same files.
    fn compare(&self, form: &str, options: &[&str], ranks: usize) {
        let outputs = ["fp8", "bf16"].map(|kind| {
            let out = format!("{form}-{kind}-{ranks}{}", options.concat());
            self.quantize(&fixture(form, kind), &out, options).ranks(ranks).succeed();
            self.path(&out)
        });
        let [ours, theirs] = outputs.each_ref().map(|out| digests(out));
        assert!(ours.len() >= 2, "{ours:?}");
        assert_eq!(ours, theirs, "{form} {options:?} on {ranks} ranks");
        let config: Value =
            serde_json::from_slice(&fs::read(outputs[0].join("config.json")).unwrap()).unwrap();
        assert_ne!(config["quantization_config"]["quant_method"], "fp8");
        assert_ne!(config["quantization_config"]["format"], "float-quantized");
        for verified in outputs {
            let source = fixture(form, "fp8");
            Distq::new(&["verify"]).arg(&verified).arg("--source").arg(source).succeed();
        }
    }

    /// A copy of a form's FP8 source with other weights or another config.json.
    fn changed(
        &self,
        form: &str,
        change: impl FnOnce(&mut Tensors),
        config: impl FnOnce(&mut Value),
    ) -> PathBuf {
        let model = self.path("changed");
        let _ = fs::remove_dir_all(&model);
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixture(form, "fp8").join(name), model.join(name)).unwrap();
        }
        change_safetensors(&model.join("model.safetensors"), change);
        let path = model.join("config.json");
        let mut fields: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config(&mut fields);
        fs::write(path, fields.to_string()).unwrap();
        model
    }

    /// `distq quantize` refuses a model.
    fn refused(&self, model: &Path) -> Ended {
        let ended = self.quantize(model, "refused", &["--method", "max", "--overwrite"]).run();
        assert_eq!(ended.code, 3, "{}{}", ended.stdout, ended.stderr);
        ended
    }
}

#[test]
fn fp8_weights_are_the_bf16_values_that_transformers_makes_of_them() {
    for form in FORMS {
        let (fp8, bf16) = (fixture(form, "fp8"), fixture(form, "bf16"));
        let [ours, theirs] = [&fp8, &bf16].map(|dir| Checkpoint::open(dir).unwrap());
        assert!(ours.tensors.keys().eq(theirs.tensors.keys()), "{form}: {:?}", ours.tensors.keys());
        assert_eq!(Value::Object(ours.config.clone()), Value::Object(theirs.config.clone()), "{form}");
        assert_eq!(ours.total_bytes(), stored_bytes(&fp8), "{form}");
        for (name, entry) in &ours.tensors {
            let [mine, other] = [&ours, &theirs].map(|checkpoint| checkpoint.tensor(name).unwrap());
            assert_eq!((mine.dtype, &mine.shape), (other.dtype, &other.shape), "{form} {name}");
            assert_eq!((entry.dtype, &entry.shape), (other.dtype, &other.shape), "{form} {name}");
            // By ranges, before anything is decoded as a whole.
            for (at, elements) in [(0, other.shape[0]), (10, 7), (31, 1)] {
                let mut part = vec![0; 2 * elements];
                mine.read(2 * at, &mut part).unwrap();
                assert_eq!(part, other.bytes()[2 * at..][..part.len()], "{form} {name} at {at}");
            }
            assert!(mine.bytes() == other.bytes(), "{form} {name}");
            assert_eq!(mine.checked().unwrap().len(), other.bytes().len());
        }
        assert!(ours.bytes_mapped() <= stored_bytes(&fp8) && ours.bytes_mapped() < theirs.bytes_mapped());
        let same = ours.sample([ours.tensors.keys().cloned().collect()]).unwrap();
        assert_ne!(same, theirs.sample([theirs.tensors.keys().cloned().collect()]).unwrap(), "{form}");
    }
}

#[test]
fn every_form_is_quantized_to_the_bytes_of_its_bf16_export() {
    let place = Place::new();
    FORMS.iter().for_each(|form| place.compare(form, &["--method", "max"], 1));
}

#[test]
fn ranks_methods_and_layouts_make_no_difference() {
    let place = Place::new();
    for layout in ["modelopt", "compressed-tensors"] {
        for method in ["max", "best"] {
            for (ranks, form) in [(1, "block_partial"), (2, "tensor_static"), (2, "block")] {
                place.compare(form, &["--layout", layout, "--method", method], ranks);
            }
        }
    }
    // Linears that are left as they are come out in BF16, and lose their scales.
    let options = ["--method", "max", "--ignore", "model.layers.0.*"];
    place.compare("channel", &options, 2);
    let out = place.path(&format!("channel-fp8-2{}", options.concat())).join("model.safetensors");
    change_safetensors(&out, |tensors| {
        let (dtype, shape, _) = &tensors["model.layers.0.mlp.up_proj.weight"];
        assert_eq!((*dtype, shape.len()), (Dtype::BF16, 2));
        assert!(!tensors.contains_key("model.layers.0.mlp.up_proj.weight_scale"));
    });
}

#[test]
fn plan_inspect_and_eval_know_fp8_sources() {
    let place = Place::new();
    let plan = |dir: &Path| {
        let run = Distq::new(&["plan", "--json", "--device", "cpu", "--calib-min-tokens", "1", "--calib"]);
        run.arg(place.path("calib.jsonl")).arg(dir).succeed().json()
    };
    let reads = |plan: &Value| plan["stages"][0]["bytes_read"].as_u64().unwrap_or_else(|| panic!("{plan}"));
    let (fp8, bf16) = (plan(&fixture("block", "fp8")), plan(&fixture("block", "bf16")));
    assert_eq!(reads(&fp8), stored_bytes(&fixture("block", "fp8")));
    assert_eq!(reads(&bf16), stored_bytes(&fixture("block", "bf16")));

    let inspected = Distq::new(&["inspect", "--json"]).arg(fixture("tensor_static", "fp8")).succeed().json();
    let elements = json!({"BF16": 2 * 64 * 32 + 5 * 32 + 28, "F8_E4M3": 15360});
    assert_eq!(inspected["elements"], elements, "{inspected}");
    assert_eq!(inspected["bytes"], stored_bytes(&fixture("tensor_static", "fp8")));
    assert_eq!(inspected["tensors"], 49);
    assert_eq!(inspected["parameters"], 2 * 64 * 32 + 5 * 32 + 15360);
    assert_eq!(inspected["quantization"]["activation_scheme"], "static");

    let vocab: serde_json::Map<String, Value> = (0..64).map(|i| (format!("w{i}"), i.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null, "decoder": null, "truncation": null, "padding": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    });
    let words: Vec<String> = (0..160).map(|i| format!("w{}", i * 7 % 64)).collect();
    fs::write(place.path("text.txt"), words.join(" ")).unwrap();
    let mut run = Distq::new(&["eval", "--json", "--window-tokens", "32", "--device", "cpu", "--text"]);
    run = run.arg(place.path("text.txt"));
    for kind in ["fp8", "bf16"] {
        let dir = place.path(kind);
        fs::create_dir(&dir).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixture("channel", kind).join(name), dir.join(name)).unwrap();
        }
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        run = run.arg(dir);
    }
    let measured = run.succeed().json();
    let perplexity =
        |i: usize| measured["models"][i]["perplexity"].as_f64().unwrap_or_else(|| panic!("{measured}"));
    assert_eq!(perplexity(0), perplexity(1));
}

#[test]
fn a_description_without_weights_is_planned_with_a_byte_for_each_element() {
    let place = Place::new();
    let plan = |form: &str, kind: &str| {
        let dir = place.path(&format!("{form}-{kind}"));
        fs::create_dir(&dir).unwrap();
        fs::copy(fixture(form, kind).join("config.json"), dir.join("config.json")).unwrap();
        let run =
            Distq::new(&["plan", "--json", "--nodes", "8GiB:cpu", "--calib-min-tokens", "1", "--calib"]);
        let plan = run.arg(place.path("calib.jsonl")).arg(dir).succeed().json();
        plan["stages"][0]["bytes_read"].as_u64().unwrap()
    };
    assert_eq!(plan("channel", "bf16") - plan("channel", "fp8"), 15360);
    // One linear of 48 times 32 is left in BF16.
    assert_eq!(plan("block_bf16", "bf16") - plan("block_bf16", "fp8"), 15360 - 48 * 32);
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn scales_that_do_not_fit_are_refused_by_name() {
    let place = Place::new();
    let scales = format!("{UP}_scale_inv");
    let keep = |_: &mut Value| {};
    type Spoil = fn(&mut Tensors, &str);
    let cases: [(&str, Spoil, &[&str]); 8] = [
        ("block", |t, name| _ = t.remove(name), &["its scales are missing", UP]),
        ("block", |t, _| _ = t.remove(UP), &["which is missing", "up_proj.weight_scale_inv"]),
        ("block", |t, name| t.get_mut(name).unwrap().1.reverse(), &["[2, 3]", "[48, 32]", "16 times 16"]),
        (
            "block",
            |t, name| *t.get_mut(name).unwrap() = (Dtype::F32, vec![1], vec![0; 4]),
            &["[1]", "16 times 16"],
        ),
        (
            "block",
            |t, name| t.get_mut(name).unwrap().0 = Dtype::I32,
            &["I32", "F8_E8M0", "up_proj.weight_scale_inv"],
        ),
        (
            "block",
            |t, _| *t.get_mut(UP).unwrap() = (Dtype::BF16, vec![48, 32], vec![0; 48 * 32 * 2]),
            &["BF16, not FP8", "up_proj.weight_scale_inv"],
        ),
        (
            "block",
            |t, name| _ = t.insert(name.replace("_inv", ""), (Dtype::F32, vec![], vec![0; 4])),
            &["two tensors of scales", UP],
        ),
        (
            "tensor_static",
            |t, name| *t.get_mut(name).unwrap() = (Dtype::BF16, vec![2], vec![0; 4]),
            &["[2]", "one for each matrix"],
        ),
    ];
    for (form, spoil, words) in cases {
        let ended = place.refused(&place.changed(form, |tensors| spoil(tensors, &scales), keep));
        assert!(words.iter().all(|word| ended.stderr.contains(word)), "{words:?}: {}", ended.stderr);
    }
    let norm =
        |t: &mut Tensors| *t.get_mut("model.norm.weight").unwrap() = (Dtype::F8_E4M3, vec![32], vec![0; 32]);
    let ended = place.refused(&place.changed("block", norm, keep));
    assert!(
        ended.stderr.contains("model.norm.weight") && ended.stderr.contains("missing"),
        "{}",
        ended.stderr
    );
}

#[test]
fn codes_and_scales_that_make_no_numbers_are_refused_by_name() {
    let place = Place::new();
    let keep = |_: &mut Value| {};
    for (scale, words) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (0.0, "0e0"), (-0.25, "-2.5e-1")] {
        let spoil = |t: &mut Tensors| {
            t.get_mut(&format!("{UP}_scale_inv")).unwrap().2[8..12].copy_from_slice(&scale.to_le_bytes())
        };
        let ended = place.refused(&place.changed("block", spoil, keep));
        let said = [words, "scale 2 is", "up_proj.weight_scale_inv"].map(|word| ended.stderr.contains(word));
        assert_eq!(said, [true; 3], "{}", ended.stderr);
    }
    for code in [0x7F, 0xFF] {
        // Quantized, and only copied.
        for ignored in ["model.layers.0.*", "model.layers.1.*"] {
            let spoil = |t: &mut Tensors| t.get_mut(UP).unwrap().2[3 * 32 + 5] = code;
            let model = place.changed("block", spoil, keep);
            let options = ["--method", "max", "--overwrite", "--ignore", ignored];
            let ended = place.quantize(&model, "refused", &options).run();
            assert_eq!(ended.code, 3, "{}{}", ended.stdout, ended.stderr);
            let said = ["row 3, column 5", UP].map(|word| ended.stderr.contains(word));
            assert_eq!(said, [true; 2], "{}", ended.stderr);
        }
    }
    // A source that can't be decoded proves nothing against an output.
    place.quantize(&fixture("block", "fp8"), "out", &["--method", "max"]).succeed();
    let model = place.changed("block", |t| t.get_mut(UP).unwrap().2[7] = 0x7F, keep);
    let ended = Distq::new(&["verify"]).arg(place.path("out")).arg("--source").arg(&model).run();
    assert!(ended.code == 3 && ended.stderr.contains(UP), "{} {}", ended.code, ended.stderr);
}

#[test]
fn other_quantized_sources_are_refused_as_ever() {
    let place = Place::new();
    let nvfp4 = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let ended = place.refused(&nvfp4);
    assert!(ended.stderr.contains("already quantized"), "{}", ended.stderr);
    let described = |method: &'static str| {
        move |config: &mut Value| config["quantization_config"] = json!({ "quant_method": method })
    };
    let ended = place.refused(&place.changed("block", |_| {}, described("quark")));
    assert!(ended.stderr.contains("already quantized") && ended.stderr.contains("quark"), "{}", ended.stderr);
    // Described as FP8, and nothing is.
    let model = place.path("described");
    fs::create_dir(&model).unwrap();
    fs::copy(fixture("block", "bf16").join("model.safetensors"), model.join("model.safetensors")).unwrap();
    fs::copy(fixture("block", "fp8").join("config.json"), model.join("config.json")).unwrap();
    let ended = place.refused(&model);
    assert!(ended.stderr.contains("left the description behind"), "{}", ended.stderr);
}
