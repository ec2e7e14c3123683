//! Each rule, broken on purpose: exactly that rule is reported.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::*;
use crate::model::Model;
use crate::nvfp4::{self, GlobalScale};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// What a linear's tensors are called: codes, block scales, global scales of weight and input; and the shape of the
/// global scales. Written out here, as loaders and the golden files of other programs have them, so that a slip in the
/// names that the writer uses is not repeated.
fn written_names(layout: Layout) -> ([&'static str; 4], Vec<usize>) {
    match layout {
        CT => (["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"], vec![1]),
        MO => (["weight", "weight_scale", "weight_scale_2", "input_scale"], vec![]),
    }
}

/// `quantization_config`, and hf_quant_config.json, as other programs were seen to write them.
fn written_config(layout: Layout) -> (Value, Option<Value>) {
    let example = match layout {
        CT => read_json(&golden("config_examples/compressed_tensors/minimal_w4a4.json")),
        MO => read_json(&golden("config_examples/modelopt/w4a4.json")),
    };
    match layout {
        CT => (example.get("quantization_config").unwrap_or(&example).clone(), None),
        MO => (
            example["config.json:quantization_config"].clone(),
            Some(example["hf_quant_config.json"].clone()),
        ),
    }
}

/// A good checkpoint of the golden source, written here and not by the writer under test.
struct Good {
    dir: tempfile::TempDir,
    source: tempfile::TempDir,
    method: &'static str,
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const O: &str = "model.layers.0.self_attn.o_proj";
const DOWN: &str = "model.layers.1.mlp.down_proj";

impl Good {
    fn new(layout: Layout) -> Good {
        Good::of(layout, "max", |_| {})
    }

    /// Max calibration of a changed source, whose files name another method where a case needs to differ from
    /// it.
    fn of(layout: Layout, method: &'static str, change: impl FnOnce(&mut Tensors)) -> Good {
        let good = Good { dir: tempfile::tempdir().unwrap(), source: tempfile::tempdir().unwrap(), method };
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden("src_bf16").join(name), good.source.path().join(name)).unwrap();
        }
        change_tensors(&good.source.path().join("model.safetensors"), "none", change);
        let mut config = read_json(&good.source.path().join("config.json"));
        let model = Model::parse(config.as_object().unwrap(), &|_| false).unwrap();
        let (names, scalar) = written_names(layout);
        let bytes = fs::read(good.source.path().join("model.safetensors")).unwrap();
        let source = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Tensors = source
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        for (i, group) in model.layers.iter().flat_map(crate::model::Layer::groups).enumerate() {
            let weights: Vec<Vec<bf16>> = group
                .members
                .iter()
                .map(|linear| bytemuck::pod_collect_to_vec(&tensors.remove(&linear.weight()).unwrap().2))
                .collect();
            let amax = weights.iter().map(|w| nvfp4::amax(w)).fold(0.0, f32::max);
            let stored = |amax: f32| if layout == CT { 1.0 / (amax / 2688.0) } else { amax / 2688.0 };
            let (global, input) = (stored(amax).to_le_bytes(), stored(2.5 + i as f32).to_le_bytes());
            for (linear, w) in group.members.iter().zip(&weights) {
                let (mut codes, mut scales) = (vec![0; w.len() / 2], vec![0; w.len() / 16]);
                nvfp4::quantize(w, GlobalScale::from_amax(amax), &mut codes, &mut scales);
                let made = [
                    (Dtype::U8, vec![linear.rows, linear.cols / 2], codes),
                    (Dtype::F8_E4M3, vec![linear.rows, linear.cols / 16], scales),
                    (Dtype::F32, scalar.clone(), global.to_vec()),
                    (Dtype::F32, scalar.clone(), input.to_vec()),
                ];
                for (name, tensor) in names.iter().zip(made) {
                    tensors.insert(format!("{}.{name}", linear.name), tensor);
                }
            }
        }
        write(&good.file(), &tensors, method);
        let (quantization, second) = written_config(layout);
        config["quantization_config"] = quantization;
        good.write_json("config.json", &config);
        if let Some(second) = second {
            good.write_json("hf_quant_config.json", &second);
        }
        good.write_json("tokenizer.json", &json!({}));
        good
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self) -> PathBuf {
        self.path("model.safetensors")
    }

    fn write_json(&self, name: &str, value: &Value) {
        fs::write(self.path(name), value.to_string()).unwrap();
    }

    /// Changes a JSON file.
    fn json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = read_json(&self.path(name));
        change(&mut value);
        self.write_json(name, &value);
    }

    fn quantization(&self, change: impl FnOnce(&mut Value)) {
        self.json("config.json", |config| change(&mut config["quantization_config"]));
    }

    /// Changes the tensors.
    fn tensors(&self, change: impl FnOnce(&mut Tensors)) {
        change_tensors(&self.file(), self.method, change);
    }

    /// Changes the bytes of one tensor.
    fn bytes(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        self.tensors(|tensors| change(&mut tensors.get_mut(name).unwrap_or_else(|| panic!("{name}")).2));
    }

    /// Sets scalars.
    fn scalars(&self, suffix: &str, value: f32) {
        self.tensors(|tensors| {
            for (_, (_, _, bytes)) in tensors.iter_mut().filter(|(name, _)| name.ends_with(suffix)) {
                *bytes = value.to_le_bytes().to_vec();
            }
        });
    }

    fn report(&self) -> Report {
        verify(self.dir.path(), Some(self.source.path())).unwrap()
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn change_tensors(path: &Path, method: &str, change: impl FnOnce(&mut Tensors)) {
    let bytes = fs::read(path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = read
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    write(path, &tensors, method);
}

fn write(path: &Path, tensors: &Tensors, method: &str) {
    write_with(path, tensors, &[("method", method), ("producer", "distq")]);
}

/// The same file, as another program would have written it.
fn write_as(path: &Path, producer: &str) {
    let bytes = fs::read(path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = read.tensors().into_iter();
    let tensors =
        tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())));
    write_with(path, &tensors.collect(), &[("producer", producer)]);
}

fn write_with(path: &Path, tensors: &Tensors, metadata: &[(&str, &str)]) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (
            name.clone(),
            TensorView::new(*dtype, shape.clone(), bytes).unwrap_or_else(|e| panic!("{name}: {e}")),
        )
    });
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

fn f32_of(bytes: &[u8]) -> f32 {
    f32::from_le_bytes(bytes.try_into().unwrap())
}

const CT: Layout = Layout::CompressedTensors;
const MO: Layout = Layout::Modelopt;

/// The rule, the level it must reach, the layout, and what is done to a good checkpoint.
type Case = (&'static str, Level, Layout, fn(&Good));

const CASES: &[Case] = &[
    ("A1", Level::Error, CT, |g| fs::write(g.path("config.json"), "{\"a\": ").unwrap()),
    ("A1", Level::Error, CT, |g| g.quantization(|q| q["quantization_status"] = json!("frozen"))),
    ("A1", Level::Error, CT, |g| g.quantization(|q| q["format"] = json!("int-quantized"))),
    ("A1", Level::Error, CT, |g| g.quantization(|q| q["quant_method"] = json!("awq"))),
    ("A2", Level::Error, CT, |g| {
        g.quantization(|q| q["config_groups"]["group_0"]["weights"]["group_size"] = json!(32))
    }),
    ("A2", Level::Error, CT, |g| {
        g.quantization(|q| q["config_groups"]["group_0"]["weights"]["colour"] = json!(1))
    }),
    ("A2", Level::Error, CT, |g| {
        g.quantization(|q| q["config_groups"]["group_0"]["input_activations"]["dynamic"] = json!(true))
    }),
    ("A3", Level::Error, CT, |g| {
        g.tensors(|t| assert!(t.remove(&format!("{O}.input_global_scale")).is_some()))
    }),
    ("A3", Level::Error, CT, |g| {
        g.tensors(|t| {
            assert!(t.insert(format!("{O}.pre_quant_scale"), (Dtype::F32, vec![1], vec![0; 4])).is_none())
        })
    }),
    ("A3", Level::Error, CT, |g| {
        g.quantization(|q| q["config_groups"]["group_0"]["input_activations"] = Value::Null)
    }),
    ("A4", Level::Error, CT, |g| {
        g.tensors(|t| t.get_mut(&format!("{O}.weight_scale")).unwrap().0 = Dtype::U8)
    }),
    ("A4", Level::Error, CT, |g| {
        g.tensors(|t| t.get_mut(&format!("{O}.weight_packed")).unwrap().0 = Dtype::I8)
    }),
    ("A4", Level::Error, MO, |g| {
        g.tensors(|t| t.get_mut(&format!("{O}.weight_scale")).unwrap().0 = Dtype::U8)
    }),
    ("A5", Level::Error, CT, |g| {
        g.tensors(|t| t.get_mut(&format!("{O}.weight_packed")).unwrap().1 = vec![32, 64])
    }),
    ("A5", Level::Error, MO, |g| {
        g.tensors(|t| t.get_mut(&format!("{O}.weight_scale_2")).unwrap().1 = vec![1])
    }),
    ("A5", Level::Error, CT, |g| {
        g.tensors(|t| {
            let (_, shape, bytes) = t.get_mut("model.norm.weight").unwrap();
            (shape[0], _) = (32, bytes.truncate(64));
        })
    }),
    ("A19", Level::Error, CT, |g| {
        let files = json!({"config.json": "another digest", "model.safetensors": {}});
        g.write_json("digests.json", &json!({"algorithm": "blake3", "files": files}))
    }),
    ("A6", Level::Error, CT, |g| g.bytes(&format!("{O}.input_global_scale"), |b| b.fill(0))),
    ("A6", Level::Warning, CT, |g| {
        // An input of the size of 1e5 is legal and odd.
        g.bytes(&format!("{O}.input_global_scale"), |b| *b = (2688.0f32 / 1e5).to_le_bytes().to_vec())
    }),
    ("A9", Level::Error, CT, |g| {
        g.bytes(&format!("{Q}.input_global_scale"), |b| *b = (f32_of(b) * 1.5).to_le_bytes().to_vec())
    }),
    ("A10", Level::Error, CT, |g| g.quantization(|q| q["ignore"] = json!(["lm_head", O]))),
    ("A10", Level::Error, MO, |g| {
        for (file, key) in [("config.json", "ignore"), ("hf_quant_config.json", "exclude_modules")] {
            let part = if file == "config.json" { "quantization_config" } else { "quantization" };
            g.json(file, |v| v[part][key].as_array_mut().unwrap().push(json!("model.layers.1.*")));
        }
    }),
    ("A10", Level::Warning, CT, |g| {
        g.quantization(|q| q["ignore"] = json!(["lm_head", "model.layers.9.mlp.up_proj"]))
    }),
    ("A11", Level::Error, CT, |g| {
        g.quantization(|q| {
            q["kv_cache_scheme"] = json!({"num_bits": 8, "type": "float", "strategy": "tensor"})
        })
    }),
    ("A11", Level::Error, CT, |g| {
        let name = "model.layers.0.self_attn.k_scale";
        g.tensors(|t| {
            assert!(t.insert(name.into(), (Dtype::F32, vec![1], 1f32.to_le_bytes().into())).is_none())
        })
    }),
    ("A12", Level::Error, CT, |g| {
        g.tensors(|t| {
            assert!(t.insert("model.extra.weight".into(), (Dtype::F32, vec![1], vec![0; 4])).is_none())
        })
    }),
    ("A13", Level::Error, CT, |g| {
        let bytes = fs::read(g.file()).unwrap();
        fs::write(g.file(), &bytes[..bytes.len() - 1]).unwrap();
    }),
    ("A13", Level::Error, MO, |g| {
        let bytes = fs::read(g.file()).unwrap();
        fs::write(g.path("model-00009-of-00009.safetensors"), bytes).unwrap();
    }),
    ("A13", Level::Error, CT, |g| {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": {"a": "b.safetensors"}});
        g.write_json("model.safetensors.index.json", &index);
    }),
    ("A14", Level::Error, CT, |g| fs::write(g.path("params.json"), "{}").unwrap()),
    ("A14", Level::Error, MO, |g| fs::write(g.path("pytorch_model.bin"), "").unwrap()),
    ("A14", Level::Warning, CT, |g| fs::write(g.path("hf_quant_config.json"), "{}").unwrap()),
    ("A15", Level::Error, CT, |g| {
        g.json("config.json", |c| c["tie_word_embeddings"] = json!(true));
        let path = g.source.path().join("config.json");
        let mut config = read_json(&path);
        config["tie_word_embeddings"] = json!(true);
        fs::write(path, config.to_string()).unwrap();
    }),
    ("A16", Level::Warning, CT, |g| fs::remove_file(g.path("tokenizer.json")).unwrap()),
    ("A16", Level::Warning, MO, |g| {
        g.write_json("generation_config.json", &json!({"cache_implementation": "hybrid"}))
    }),
    ("A18", Level::Warning, CT, |g| g.scalars("input_global_scale", 1.0)),
    ("B1", Level::Error, MO, |g| {
        g.quantization(|q| q["quant_algo"] = json!("NVFP4_AWQ"));
        g.json("hf_quant_config.json", |v| v["quantization"]["quant_algo"] = json!("NVFP4_AWQ"));
    }),
    ("B1", Level::Error, MO, |g| {
        g.quantization(|q| q["config_groups"]["group_0"]["weights"]["group_size"] = json!(32))
    }),
    ("B2", Level::Error, MO, |g| fs::remove_file(g.path("hf_quant_config.json")).unwrap()),
    ("B2", Level::Error, MO, |g| g.write_json("hf_quant_config.json", &json!({}))),
    ("B2", Level::Error, MO, |g| g.write_json("hf_quant_config.json", &json!({"quantization": []}))),
    ("B2", Level::Error, MO, |g| {
        g.json("hf_quant_config.json", |v| v["quantization"]["group_size"] = json!(32))
    }),
    ("B3", Level::Error, MO, |g| g.tensors(|t| assert!(t.remove(&format!("{O}.input_scale")).is_some()))),
    ("B3", Level::Error, MO, |g| {
        let name = format!("{O}.weight_global_scale");
        g.tensors(|t| assert!(t.insert(name, (Dtype::F32, vec![], vec![0; 4])).is_none()))
    }),
    ("B4", Level::Error, MO, |g| g.scalars("input_scale", 1.0)),
    ("B4", Level::Error, MO, |g| {
        g.bytes(&format!("{O}.input_scale"), |b| *b = f32::NAN.to_le_bytes().to_vec())
    }),
    ("B5", Level::Error, MO, |g| {
        g.bytes(&format!("{Q}.input_scale"), |b| *b = (f32_of(b) * 1.5).to_le_bytes().to_vec())
    }),
    ("B6", Level::Error, MO, |g| {
        for (file, part, key) in [
            ("config.json", "quantization_config", "ignore"),
            ("hf_quant_config.json", "quantization", "exclude_modules"),
        ] {
            g.json(file, |v| v[part][key] = json!(["model.embed_tokens"]));
        }
    }),
    ("B7", Level::Error, MO, |g| {
        g.json("hf_quant_config.json", |v| v["quantization"]["kv_cache_quant_algo"] = json!("FP8"))
    }),
    ("B7", Level::Warning, MO, |g| {
        // What nvidia-modelopt writes for an NVFP4 cache.
        g.quantization(|q| q["kv_cache_scheme"] = json!("NVFP4"));
        g.json("hf_quant_config.json", |v| v["quantization"]["kv_cache_quant_algo"] = json!("NVFP4"));
    }),
    ("B8", Level::Error, MO, |g| {
        // Everything listed in config.json, one linear missing in the second file.
        let linears: Vec<String> = (0..2)
            .flat_map(|l| {
                let names = [
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.o_proj",
                    "mlp.gate_proj",
                    "mlp.up_proj",
                    "mlp.down_proj",
                ];
                names.map(|n| format!("model.layers.{l}.{n}"))
            })
            .collect();
        let list = |names: &[String]| {
            let how = json!({"quant_algo": "NVFP4", "group_size": 16});
            Value::Object(names.iter().map(|name| (name.clone(), how.clone())).collect())
        };
        g.quantization(|q| {
            q["quant_algo"] = json!("MIXED_PRECISION");
            q["ignore"] = json!([]);
            q["quantized_layers"] = list(&linears);
        });
        g.json("hf_quant_config.json", |v| {
            v["quantization"]["quant_algo"] = json!("MIXED_PRECISION");
            v["quantization"]["quantized_layers"] = list(&linears[1..]);
        });
    }),
    ("S1", Level::Error, CT, |g| g.bytes("model.norm.weight", |b| b[0] ^= 1)),
    ("S1", Level::Error, MO, |g| g.bytes("model.embed_tokens.weight", |b| b[100] ^= 1)),
    // The source lacks a weight: nothing was compared, which is not the same as being close.
    ("S2", Level::Error, CT, |g| {
        let source = g.source.path().join("model.safetensors");
        change_tensors(&source, "none", |t| assert!(t.remove(&format!("{O}.weight")).is_some()));
    }),
    ("S3", Level::Error, CT, |g| g.json("config.json", |c| c["rope_theta"] = json!(77.0))),
    ("S4", Level::Error, CT, |g| g.bytes(&format!("{DOWN}.weight_packed"), |b| b[9] ^= 0x10)),
    ("S4", Level::Error, MO, |g| g.bytes(&format!("{DOWN}.weight_scale"), |b| b[9] -= 1)),
];

/// Cases that differ from max calibration, so that only files of another method show one rule alone.
const SEARCHED: &[Case] = &[
    ("A7", Level::Error, CT, |g| g.bytes(&format!("{O}.weight_scale"), |b| b[3] |= 0x80)),
    ("A8", Level::Warning, CT, |g| smaller_scales(g, 2)),
    ("A8", Level::Error, CT, |g| smaller_scales(g, 4)),
    ("S2", Level::Error, MO, |g| {
        g.bytes(&format!("{DOWN}.weight"), |b| b.iter_mut().for_each(|byte| *byte = byte.rotate_left(4)))
    }),
];

/// Cases in which norms may hold factors.
const FOLDED: &[Case] = &[
    ("S1", Level::Error, CT, |g| {
        g.bytes("model.layers.1.input_layernorm.weight", |b| b[2 * 5..2 * 6].fill(0)) // no factor makes that
    }),
    ("S2", Level::Error, CT, |g| scaled_channel(g, 1.5)),
    ("S2", Level::Error, MO, |g| scaled_channel(g, 0.6)),
];

/// One channel of a norm is another than the weights that read it make up for.
fn scaled_channel(g: &Good, factor: f32) {
    g.bytes("model.layers.0.post_attention_layernorm.weight", |bytes| {
        let element = &mut bytes[2 * 7..2 * 8];
        let weight = bf16::from_le_bytes(element.try_into().unwrap()).to_f32();
        element.copy_from_slice(&bf16::from_f32(factor * weight).to_le_bytes());
    });
}

/// The same weights with block scales smaller by powers of two and a global scale larger by as much.
fn smaller_scales(g: &Good, octaves: u8) {
    g.tensors(|tensors| {
        let scales = &mut tensors.get_mut(&format!("{O}.weight_scale")).unwrap().2;
        scales.iter_mut().for_each(|scale| *scale -= 8 * octaves);
        let global = &mut tensors.get_mut(&format!("{O}.weight_global_scale")).unwrap().2;
        *global = (f32_of(global) * 0.5f32.powi(octaves as i32)).to_le_bytes().to_vec();
    });
}

fn check(report: &Report, &(id, level, layout, _): &Case) {
    let rule = report.rules.iter().find(|rule| rule.id == id).unwrap();
    assert_eq!(rule.level, level, "{id} in {layout}: {report}");
    assert!(!rule.findings.is_empty(), "{id} says what it found");
    let broken: Vec<&str> = report.failed_rules().into_iter().filter(|other| *other != id).collect();
    assert!(broken.is_empty(), "{id} in {layout} also broke {broken:?}: {report}");
}

#[test]
fn each_corruption_breaks_exactly_its_rule() {
    for (method, cases) in [("max", CASES), ("sweep", SEARCHED), ("smooth+sweep", FOLDED)] {
        for case in cases {
            let good = Good::of(case.2, method, |_| {});
            (case.3)(&good);
            check(&good.report(), case);
        }
    }
}

#[test]
fn zero_is_an_ordinary_weight_of_a_norm_that_adds_one_to_it() {
    use rules::folds::holds_factor;

    use crate::backend::Gamma;
    for (gamma, here, there, holds) in [
        (Gamma::Weight, 0.5, 0.0, false),
        (Gamma::Weight, 0.0, 0.0, true),
        (Gamma::Weight, 0.5, 0.25, true),
        (Gamma::Weight, -0.5, 0.25, false),
        (Gamma::OnePlus, 0.5, 0.0, true),
        (Gamma::OnePlus, 0.0, 0.5, true),
        (Gamma::OnePlus, -0.5, 0.25, true),
        (Gamma::OnePlus, -1.5, 0.25, false),
        (Gamma::OnePlus, -1.0, -1.0, true),
        (Gamma::OnePlus, 0.0, -1.0, false),
    ] {
        assert_eq!(holds_factor(Dtype::BF16, gamma, here, there), holds, "{gamma:?}: {here} for {there}");
    }
}

#[test]
fn degenerate_content_is_a_warning() {
    // Most weights zero in the source already: legal, and worth a look.
    let good = Good::of(CT, "max", |tensors| {
        let bytes = &mut tensors.get_mut(&format!("{DOWN}.weight")).unwrap().2;
        bytes.chunks_exact_mut(2).enumerate().filter(|(i, _)| i % 5 != 0).for_each(|(_, b)| b.fill(0));
    });
    check(&good.report(), &("A17", Level::Warning, CT, |_| {}));
}

#[test]
fn every_rule_is_broken_by_some_case() {
    let report = Good::new(CT).report();
    let cases: Vec<&str> = CASES.iter().chain(SEARCHED).map(|case| case.0).chain(["A17"]).collect();
    let untested: Vec<&str> =
        report.rules.iter().map(|rule| rule.id).filter(|id| !cases.contains(id)).collect();
    assert!(untested.is_empty(), "{untested:?}");
    assert_eq!(report.rules.len(), 19 + 8 + 4);
}

/// The level of a rule.
fn level(report: &Report, id: &str) -> Level {
    report.rules.iter().find(|rule| rule.id == id).unwrap().level
}

#[test]
fn good_checkpoints_break_no_rule() {
    for layout in [CT, MO] {
        let report = Good::new(layout).report();
        assert!(report.passed(), "{report}");
        assert_eq!(report.tensors.len(), 14);
        assert!((0.08..0.11).contains(&report.summary.mean_relative_error.unwrap()));
    }
}

#[test]
fn what_other_programs_made_of_the_same_source_is_good() {
    for (name, producer) in [(".", "modelopt 0.43.0"), ("peer", "compressed-tensors 0.19.0")] {
        let report = verify(&golden(name), Some(&golden("src_bf16"))).unwrap();
        assert!(report.passed(), "{report}");
        assert_eq!(report.description.producer.as_deref(), Some(producer));
        assert_eq!(report.description.kv_cache.as_deref(), Some("fp8"));
        assert_eq!(level(&report, "S4"), Level::NotApplicable);
        assert!(report.advice().contains(producer), "{}", report.advice());
    }
}

#[test]
fn rules_without_anything_to_judge_do_not_apply() {
    let report = Good::new(CT).report();
    assert_eq!(level(&report, "S4"), Level::Pass);
    let names = |report: &Report, which: Level| {
        let rules = report.rules.iter().filter(|rule| rule.level == which);
        rules.map(|rule| rule.id).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(names(&report, Level::NotApplicable), "A11 A19 B1 B2 B3 B4 B5 B6 B7 B8");
    assert_eq!(report.summary.judged, report.rules.len() - 10);
    assert_eq!(names(&Good::new(MO).report(), Level::NotApplicable), "A2 A3 A6 A9 A11 A18 A19 B7 B8");
    let other = Good::of(CT, "sweep", |_| {}).report();
    assert_eq!(level(&other, "S4"), Level::NotApplicable);

    // Weights only: there are no input scales.
    let good = Good::new(CT);
    good.quantization(|q| q["config_groups"]["group_0"]["input_activations"] = Value::Null);
    good.tensors(|tensors| tensors.retain(|name, _| !name.ends_with("input_global_scale")));
    let report = good.report();
    assert!(report.passed(), "{report}");
    assert_eq!(level(&report, "A18"), Level::NotApplicable);
    assert_eq!(report.description.scheme.as_deref(), Some("nvfp4a16"));

    // Without a source nothing was measured, and nothing is said of it.
    let report = verify(good.dir.path(), None).unwrap();
    assert!(names(&report, Level::NotApplicable).ends_with("S1 S2 S3 S4"));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["summary"]["max_relative_error"], Value::Null);
    let text = report.to_string();
    assert!(text.starts_with("layout compressed-tensors, nvfp4a16, method max, written by distq"), "{text}");
    assert!(!text.contains("\nS1"), "{text}");
    assert!(text.contains("nothing to judge: A11, A18, A19, B1"), "{text}");

    // A failure keeps later rules from being judged, which is another thing.
    fs::write(good.path("config.json"), "{").unwrap();
    let report = verify(good.dir.path(), None).unwrap();
    assert_eq!(level(&report, "A5"), Level::NotApplicable, "no layout is known");
    good.write_json("config.json", &read_json(&golden("peer/config.json")));
    fs::write(good.path("model-00009-of-00009.safetensors"), "").unwrap();
    let report = verify(good.dir.path(), None).unwrap();
    assert_eq!(level(&report, "A5"), Level::NotJudged);
    assert!(report.to_string().contains("not judged because of what is broken: A3, A4"), "{report}");
}

#[test]
fn what_is_no_quantized_checkpoint_is_unusable_input() {
    let scratch = tempfile::tempdir().unwrap();
    fs::write(scratch.path().join("a_file"), "").unwrap();
    let refused = |dir: &Path| {
        let error = verify(dir, None).unwrap_err();
        assert_eq!(error.exit as i32, 3, "{error}");
        error.to_string()
    };
    refused(&scratch.path().join("missing"));
    refused(&scratch.path().join("a_file"));
    assert!(refused(scratch.path()).contains("neither a config.json nor a safetensors file"));
    assert!(refused(&golden("src_bf16")).contains("not quantized"));
}

#[test]
fn peers_may_spell_config_json_anew_but_not_change_it() {
    let respelled = |g: &Good| {
        change_tensors(&g.file(), "none", |_| {});
        g.json("config.json", |c| {
            let config = c.as_object_mut().unwrap();
            for key in ["rope_theta", "rope_scaling", "transformers_version", "pretraining_tp"] {
                config.remove(key);
            }
            c["rope_parameters"] = json!({"rope_theta": 10000.0, "rope_type": "default"});
            c["transformers_version"] = json!("5.17.0");
        });
    };
    let judged = |change: &dyn Fn(&Good)| {
        let good = Good::new(CT);
        respelled(&good);
        change(&good);
        level(&good.report(), "S3")
    };
    // distq itself changes nothing.
    assert_eq!(judged(&|_| {}), Level::Error);
    let by_a_peer = |g: &Good| write_as(&g.file(), "a peer");
    assert_eq!(judged(&by_a_peer), Level::Pass);
    let with = |key: &'static str, value: Value| {
        judged(&move |g: &Good| {
            by_a_peer(g);
            g.json("config.json", |c| c[key] = value.clone());
        })
    };
    assert_eq!(with("rope_parameters", json!({"rope_theta": 500000.0})), Level::Error);
    assert_eq!(with("max_position_embeddings", json!(512)), Level::Error);
    assert_eq!(with("rms_norm_eps", json!(1e-5)), Level::Error);
    assert_eq!(with("a_field_of_another_program", json!(1)), Level::Warning);
}

#[test]
fn patterns_that_cannot_be_used_are_findings_and_end_soon() {
    let started = std::time::Instant::now();
    for pattern in ["re:(", r"re:(?:\w{300}){300}", r"re:(?=x)y"] {
        let good = Good::new(CT);
        good.quantization(|q| q["ignore"].as_array_mut().unwrap().push(json!(pattern)));
        let report = good.report();
        let a1 = report.rules.iter().find(|rule| rule.id == "A1").unwrap();
        assert!(a1.level == Level::Error && a1.findings[0].contains("the expression"), "{report}");
    }
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn a_number_of_layers_beyond_all_tensors_is_a_finding() {
    let good = Good::new(CT);
    good.json("config.json", |c| c["num_hidden_layers"] = json!(1u64 << 40));
    let report = good.report();
    let a1 = report.rules.iter().find(|rule| rule.id == "A1").unwrap();
    assert!(a1.findings[0].contains("num_hidden_layers is 1099511627776"), "{report}");
}

/// The distance that max scales would have is no excuse for a scale that is far too small for the weights.
#[test]
fn a_global_scale_that_is_far_too_small_is_found() {
    for layout in [Layout::CompressedTensors, Layout::Modelopt] {
        let good = Good::new(layout);
        let ([_, _, global, _], _) = written_names(layout);
        good.bytes(&format!("{O}.{global}"), |bytes| {
            let scale = f32_of(bytes);
            let smaller = if layout == Layout::Modelopt { scale / 8.0 } else { scale * 8.0 };
            bytes.copy_from_slice(&smaller.to_le_bytes());
        });
        assert_eq!(level(&good.report(), "S2"), Level::Error, "{layout}");
    }
}

#[test]
fn a_global_scale_in_place_of_its_reciprocal_is_found_and_large_weights_are_none() {
    for (layout, rule, suffix) in [(CT, "A6", "weight_global_scale"), (MO, "B4", "weight_scale_2")] {
        let large = |tensors: &mut Tensors| {
            let bytes = &mut tensors.get_mut(&format!("{DOWN}.weight")).unwrap().2;
            bytes[..2].copy_from_slice(&bf16::from_f32(3000.0).to_le_bytes());
        };
        let good = Good::of(layout, "max", large);
        assert!(good.report().passed(), "{}", good.report());
        good.bytes(&format!("{O}.{suffix}"), |b| *b = (1.0 / f32_of(b)).to_le_bytes().to_vec());
        let report = verify(good.dir.path(), None).unwrap();
        assert_eq!(report.failed_rules(), [rule], "{report}");
    }
}
