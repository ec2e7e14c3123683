//! A checkpoint's weights: checked against its configuration, and dequantized where they are NVFP4.

use std::collections::HashSet;
use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::backend::Compute;
use crate::checkpoint::{
    Checkpoint, Declared, FLOATS, Layout, LinearScheme, SourceTensor, declared_layout, narrow, widen,
};
use crate::error::{Error, Result};
use crate::model::{Group, Layer, LinearSpec, Model, TensorSpec, is_dispensable};
use crate::nvfp4::{BLOCK, GlobalScale, dequantize};

/// A checkpoint to evaluate, every tensor of which has the dtype and the shape that its configuration says.
pub struct Weights {
    checkpoint: Checkpoint,
    /// The model.
    pub model: Model,
    /// The dtype of activations.
    pub compute: Compute,
    layout: Layout,
    declared: Declared,
    /// What of the checkpoint has no part in the evaluation.
    pub notes: Vec<String>,
}

/// Elements that one thread dequantizes at a time: whole blocks.
const PART: usize = 1 << 16;

impl Weights {
    /// Opens a BF16, F16 or F32 checkpoint, or an NVFP4 one in either layout, to be computed with in `compute`. Only
    /// headers and global scales are read.
    ///
    /// # Errors
    /// Exit code 3: anything that is not such a checkpoint, and a tensor that is missing or has another dtype or shape
    /// than the configuration says.
    pub fn open(dir: &Path, compute: Compute) -> Result<Weights> {
        let checkpoint = Checkpoint::open(dir)?;
        let model = Model::of(&checkpoint)?;
        check_unquantized(&checkpoint, &model)?;
        let (config, said) = quantization(&checkpoint);
        let mut notes = [checkpoint.notes.clone(), model.oddities(&checkpoint)?, said].concat();
        let (layout, declared) = match config {
            None => (Layout::Modelopt, Declared::default()),
            Some(config) => {
                let layout = declared_layout(&config).ok_or_else(|| {
                    Error::input(format!(
                        "the checkpoint is quantized with {}, not to NVFP4",
                        config["quantization_config"]["quant_method"]
                    ))
                    .file(checkpoint.dir.join("config.json"))
                    .fix("evaluate BF16, F16, F32 or NVFP4 checkpoints")
                })?;
                let linears: Vec<String> = model.linears().map(|linear| linear.name.clone()).collect();
                let declared = Declared::of(Some(layout), &config, &linears, &[]);
                if let Some(fault) = declared.faults.first() {
                    return Err(Error::input(format!("quantization_config: {fault}"))
                        .file(checkpoint.dir.join("config.json"))
                        .fix("correct the pattern"));
                }
                if !config["quantization_config"]["kv_cache_scheme"].is_null() {
                    notes.push("its KV cache is quantized, which is not part of the evaluation".into());
                }
                (layout, declared)
            }
        };
        let weights = Weights { checkpoint, model, compute, layout, declared, notes };
        weights.check_linears()?;
        weights.check_nothing_else()?;
        Ok(weights)
    }

    /// What ranks compare before they work on one checkpoint.
    pub fn digest(&self) -> String {
        self.checkpoint.digest()
    }

    fn check_linears(&self) -> Result<()> {
        for group in self.model.layers.iter().flat_map(Layer::groups) {
            group.members.iter().try_for_each(|linear| self.check_linear(linear))?;
            self.check_group(&group)?;
        }
        Ok(())
    }

    /// A tensor that the forward pass does not know would be left out without a word, and with it a part of the model.
    fn check_nothing_else(&self) -> Result<()> {
        let model = &self.model;
        let mut known: HashSet<String> = model.tensors().map(|spec| spec.name).collect();
        for linear in model.linears() {
            let names = self.layout.linear_names(&linear.name);
            if let LinearScheme::Nvfp4 { activations } = self.declared.of_module(&linear.name) {
                known.extend([names.codes, names.scales, names.weight_global]);
                known.extend(activations.then_some(names.input_global));
            }
        }
        // Scales of a quantized KV cache have no part in the forward pass.
        let unused = ["k_scale", "v_scale", "output_scale"];
        let beyond = |name: &&String| {
            !known.contains(*name)
                && !is_dispensable(model, name)
                && !model.is_carried(name)
                && !unused.iter().any(|end| name.ends_with(end))
        };
        match self.checkpoint.tensors.keys().find(beyond) {
            None => Ok(()),
            Some(name) => Err(model.beyond(&self.checkpoint, name)),
        }
    }

    fn check_linear(&self, linear: &LinearSpec) -> Result<()> {
        if let Some(bias) = linear.bias() {
            self.model.stored(&self.checkpoint, &TensorSpec { name: bias, shape: vec![linear.rows] })?;
        }
        let (rows, cols) = (linear.rows, linear.cols);
        let names = self.layout.linear_names(&linear.name);
        match self.declared.of_module(&linear.name) {
            LinearScheme::Plain => {
                let spec = TensorSpec { name: linear.weight(), shape: vec![rows, cols] };
                self.model.stored(&self.checkpoint, &spec)?
            }
            LinearScheme::Fp8 => {
                return Err(Error::input(format!("{} is FP8, which distq can't evaluate", linear.name))
                    .file(self.checkpoint.dir.join("config.json"))
                    .fix("evaluate checkpoints whose linears are BF16, F16, F32 or NVFP4"));
            }
            LinearScheme::Nvfp4 { .. } if cols % BLOCK != 0 => {
                return Err(Error::input(format!("{cols} input features are not a multiple of {BLOCK}"))
                    .file(&self.checkpoint.dir)
                    .tensor(names.codes)
                    .fix("use the config.json that belongs to these weights"));
            }
            LinearScheme::Nvfp4 { activations } => {
                self.checkpoint.expect(&names.codes, &[rows, cols / 2], &[Dtype::U8])?;
                self.global(&names.weight_global)?;
                if activations {
                    self.global(&names.input_global)?;
                }
                self.checkpoint.expect(&names.scales, &[rows, cols / BLOCK], &[Dtype::F8_E4M3])?
            }
        };
        Ok(())
    }

    /// Linears that share an input have one scheme and one input scale, or none of them could be right for all.
    fn check_group(&self, group: &Group) -> Result<()> {
        let first = &group.members[0];
        let scale = |linear: &LinearSpec| match self.declared.of_module(&linear.name) {
            LinearScheme::Nvfp4 { activations: true } => {
                self.global(&self.layout.linear_names(&linear.name).input_global).map(Some)
            }
            _ => Ok(None),
        };
        let expected = scale(first)?;
        for linear in &group.members[1..] {
            if scale(linear)? != expected {
                let what =
                    format!("{} and {} share an input and scale it differently", first.name, linear.name);
                return Err(Error::input(what).file(&self.checkpoint.dir).fix(self.look()));
            }
        }
        Ok(())
    }

    /// Bytes of the weights of some layers as they are computed with.
    pub fn layers_bytes(&self, layers: std::ops::Range<usize>) -> u64 {
        let tensors = self.model.layers[layers].iter().flat_map(Layer::tensors);
        let elements = tensors.map(|spec| spec.shape.iter().product::<usize>()).sum::<usize>();
        (elements * self.compute.bytes()) as u64
    }

    /// A tensor as the forward pass wants it: rounded to BF16 where that is what is computed in, exact in F32.
    ///
    /// # Errors
    /// Exit code 5 where it can't be read.
    pub fn tensor(&self, name: &str) -> Result<SourceTensor> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match self.declared.of_module(module) {
            LinearScheme::Nvfp4 { .. } => self.dequantized(module),
            _ => self.stored(name),
        }
    }

    fn dequantized(&self, module: &str) -> Result<SourceTensor> {
        let names = self.layout.linear_names(module);
        let (codes, scales) = (self.checkpoint.tensor(&names.codes)?, self.checkpoint.tensor(&names.scales)?);
        let global = self.global(&names.weight_global)?;
        let dtype = if self.compute == Compute::Bf16 { Dtype::BF16 } else { Dtype::F32 };
        let size = self.compute.bytes();
        let mut bytes = vec![0; codes.bytes().len() * 2 * size];
        bytes.par_chunks_mut(PART * size).enumerate().for_each_init(Vec::new, |values, (part, bytes)| {
            values.resize(bytes.len() / size, 0.0);
            let (first, count) = (part * PART, values.len());
            let codes = &codes.bytes()[first / 2..][..count / 2];
            let scales = &scales.bytes()[first / BLOCK..][..count / BLOCK];
            dequantize(codes, scales, global, values);
            for (bytes, &value) in bytes.chunks_exact_mut(size).zip(&*values) {
                match dtype {
                    Dtype::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                    _ => bytes.copy_from_slice(&value.to_le_bytes()),
                }
            }
        });
        let shape = [codes.shape[0], codes.shape[1] * 2];
        SourceTensor::from_bytes(&format!("{module}.weight"), dtype, &shape, &bytes)
    }

    /// A tensor that is not NVFP4.
    fn stored(&self, name: &str) -> Result<SourceTensor> {
        let tensor = self.checkpoint.tensor(name)?;
        if self.compute == Compute::F32 || tensor.dtype == Dtype::BF16 {
            return Ok(tensor);
        }
        let bytes = narrow(Dtype::BF16, &widen(&tensor)?);
        SourceTensor::from_bytes(name, Dtype::BF16, &tensor.shape, &bytes)
    }

    /// The static input scale of a site of a layer; none where its inputs are not quantized.
    ///
    /// # Errors
    /// Exit code 5 where it can't be read.
    pub fn input_scale(&self, layer: usize, site: usize) -> Result<Option<GlobalScale>> {
        let group = &self.model.layers[layer].groups()[site];
        let quantized = |linear: &&LinearSpec| {
            self.declared.of_module(&linear.name) == LinearScheme::Nvfp4 { activations: true }
        };
        let first = group.members.iter().find(quantized);
        first.map(|linear| self.global(&self.layout.linear_names(&linear.name).input_global)).transpose()
    }

    /// A global scale: one positive F32.
    fn global(&self, name: &str) -> Result<GlobalScale> {
        let entry = self.checkpoint.entry(name)?;
        let unusable = |what: String| {
            let file = &self.checkpoint.files[entry.file];
            Err(Error::input(what).file(file).tensor(name).fix(self.look()))
        };
        if entry.dtype != Dtype::F32 || entry.shape.iter().product::<usize>() != 1 {
            return unusable(format!("a global scale is one F32, not {:?} {:?}", entry.dtype, entry.shape));
        }
        let tensor = self.checkpoint.tensor(name)?;
        let value = f32::from_le_bytes(tensor.bytes().try_into().expect("an F32 has four bytes"));
        if !(value.is_normal() && value > 0.0) {
            return unusable(format!("the global scale {value:e} is no positive number"));
        }
        Ok(self.layout.global(value))
    }

    /// The matrix that turns hidden states into logits.
    pub fn lm_head(&self) -> Result<SourceTensor> {
        match self.model.own_head() {
            None => self.tensor(&self.model.embedding.name),
            Some(head) => self.tensor(&head.name),
        }
    }

    /// The command that says more.
    fn look(&self) -> String {
        format!("see what is wrong with: distq verify {}", self.checkpoint.dir.display())
    }
}

/// Embedding, norms and lm_head. Each layer's are looked up before anything is made by the number of layers, so that
/// memory is taken by the sizes in config.json only where the tensors have them.
fn check_unquantized(checkpoint: &Checkpoint, model: &Model) -> Result<()> {
    let plain = model.layers.iter().flat_map(Layer::plain_tensors);
    for spec in std::iter::once(model.embedding.clone()).chain(plain).chain(model.tail_tensors()) {
        model.stored(checkpoint, &spec)?;
    }
    Ok(())
}

/// config.json with its `quantization_config`, or with what hf_quant_config.json says instead, as older exports of
/// ModelOpt have it; none for a checkpoint that is not quantized.
fn quantization(checkpoint: &Checkpoint) -> (Option<Map<String, Value>>, Vec<String>) {
    let mut config = checkpoint.config.clone();
    if config.get("quantization_config").is_none_or(Value::is_null) {
        let text = std::fs::read(checkpoint.dir.join("hf_quant_config.json")).unwrap_or_default();
        let second: Value = serde_json::from_slice(&text).unwrap_or_default();
        let there = &second["quantization"];
        if !there.is_object() {
            return (None, vec![]);
        }
        let quantization = json!({
            "quant_method": "modelopt", "quant_algo": there["quant_algo"], "ignore": there["exclude_modules"],
            "quantized_layers": there["quantized_layers"], "kv_cache_scheme": there["kv_cache_quant_algo"],
        });
        config.insert("quantization_config".into(), quantization);
    }
    if checkpoint.tensors.values().all(|entry| FLOATS.contains(&entry.dtype)) {
        let note = "config.json says that it is quantized, and no tensor is: it is evaluated as it is";
        return (None, vec![note.into()]);
    }
    (Some(config), vec![])
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn repository(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }

    #[test]
    fn tensors_have_the_precision_that_was_asked_for_whatever_the_checkpoint() {
        let name = "model.layers.0.mlp.up_proj.weight";
        for (family, dtype) in [("llama_f32", Dtype::F32), ("llama_f16", Dtype::F16), ("llama", Dtype::BF16)]
        {
            let dir = repository("tests/fixtures/families").join(family);
            let weights = |compute| Weights::open(&dir, compute).unwrap();
            let (wide, narrowed) = (weights(Compute::F32), weights(Compute::Bf16));
            let (exact, rounded) = (wide.tensor(name).unwrap(), narrowed.tensor(name).unwrap());
            assert_eq!((exact.dtype, rounded.dtype), (dtype, Dtype::BF16));
            assert_eq!(rounded.bytes(), narrow(Dtype::BF16, &widen(&exact).unwrap()), "{family}");
        }
    }

    #[test]
    fn dequantized_weights_are_those_of_the_number_format_in_both_layouts() {
        for (dir, layout) in
            [("tests/golden", Layout::Modelopt), ("tests/golden/peer", Layout::CompressedTensors)]
        {
            let module = "model.layers.1.mlp.down_proj";
            let (wide, narrowed) = (Compute::F32, Compute::Bf16);
            let [wide, narrowed] = [wide, narrowed].map(|compute| {
                let weights = Weights::open(&repository(dir), compute).unwrap();
                assert!(weights.input_scale(1, 3).unwrap().is_some());
                assert!(weights.notes[0].contains("KV cache"));
                weights.tensor(&format!("{module}.weight")).unwrap()
            });
            let checkpoint = Checkpoint::open(&repository(dir)).unwrap();
            let names = layout.linear_names(module);
            let bytes = |name: &str| checkpoint.tensor(name).unwrap().bytes().to_vec();
            let global = layout.global(f32::from_le_bytes(bytes(&names.weight_global).try_into().unwrap()));
            let mut expected = vec![0.0; 64 * 128];
            dequantize(&bytes(&names.codes), &bytes(&names.scales), global, &mut expected);
            assert_eq!(wide.shape, [64, 128]);
            assert_eq!(wide.bytes(), narrow(Dtype::F32, &expected));
            assert_eq!(narrowed.bytes(), narrow(Dtype::BF16, &expected));
        }
    }

    /// The error that opening a changed copy of a checkpoint gives.
    fn refused(of: &str, change: impl FnOnce(&mut Value)) -> String {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(repository(of).join(name), dir.path().join(name)).unwrap();
        }
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
        let error = Weights::open(dir.path(), Compute::F32).map(|_| ()).unwrap_err();
        assert_eq!(error.exit as i32, 3, "{error}");
        error.to_string()
    }

    #[test]
    fn sizes_of_another_model_are_refused_by_tensor_and_both_shapes() {
        for of in ["tests/golden", "tests/golden/peer", "tests/golden/src_bf16"] {
            for (field, value) in [
                ("hidden_size", 128),
                ("hidden_size", 1 << 20),
                ("intermediate_size", 256),
                ("vocab_size", 1 << 30),
                ("num_attention_heads", 8),
                ("num_key_value_heads", 1),
                ("num_key_value_heads", 4),
                ("head_dim", 32),
                ("vocab_size", 64),
                ("num_hidden_layers", 3),
                ("num_hidden_layers", 1000),
                ("num_hidden_layers", 1),
            ] {
                let error = refused(of, |config| config[field] = value.into());
                let said = ["[", "missing", "num_hidden_layers"].iter().any(|text| error.contains(text));
                assert!(error.contains(", tensor model.") && said, "{of} {field} {value}: {error}");
            }
        }
    }

    #[test]
    fn what_cannot_be_evaluated_is_named() {
        let peer = "tests/golden/peer";
        let group = |config: &mut Value, value: Value| {
            config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = value
        };
        assert!(refused(peer, |config| group(config, 8.into())).contains("q_proj is FP8"));
        assert!(
            refused(peer, |config| config["quantization_config"]["quant_method"] = "awq".into())
                .contains("awq")
        );
        let ignoring = |pattern: &'static str| {
            move |config: &mut Value| config["quantization_config"]["ignore"] = json!(["lm_head", pattern])
        };
        assert!(refused(peer, ignoring("re:(")).contains("the expression"));
        // Said to be plain, and packed; and the members of a group apart.
        assert!(refused(peer, ignoring("re:.*mlp.*")).contains("gate_proj.weight"));
        // The inputs are said to be quantized, by a scale that is not there.
        let weight_only = "tests/golden/src_bf16";
        let quantized = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []});
        let said = |config: &mut Value| config["quantization_config"] = quantized;
        let dir = repository(weight_only);
        let weights = {
            let scratch = tempfile::tempdir().unwrap();
            fs::copy(dir.join("model.safetensors"), scratch.path().join("model.safetensors")).unwrap();
            let mut config: Value =
                serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
            said(&mut config);
            fs::write(scratch.path().join("config.json"), config.to_string()).unwrap();
            Weights::open(scratch.path(), Compute::F32).unwrap()
        };
        assert!(weights.notes[0].contains("no tensor is"), "{:?}", weights.notes);
    }
}
