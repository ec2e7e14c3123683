//! The directory under verification, opened as far as it can be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::MmapOptions;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::report::TensorError;
use super::rules::folds::LayerFolds;
use super::scan::{LinearScan, scan_group};
use crate::checkpoint::{
    Checkpoint, Declared, Layout, LinearNames, LinearScheme, declared_layout, read_header, snapshot,
};
use crate::error::{Error, Result};
use crate::methods::{Codes, Method};
use crate::model::{Layer, LinearSpec, Model};

/// A tensor of the directory.
pub struct Found {
    /// Index into [`Subject::files`].
    pub file: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its first byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// The directory under verification.
pub struct Subject {
    /// The directory.
    pub dir: PathBuf,
    /// Names of all files in it.
    pub listing: BTreeSet<String>,
    /// config.json, or why it can't be read.
    pub config: Result<Map<String, Value>, String>,
    /// The layout that it declares.
    pub layout: Option<Layout>,
    /// The model that it describes, or why it does not.
    pub model: Result<Model, String>,
    /// Which linears are quantized, and how, as the configuration says.
    pub schemes: Declared,
    /// The safetensors files.
    pub files: Vec<(String, File)>,
    /// What is wrong with files and headers.
    pub file_faults: Vec<String>,
    /// Tensors by name, as far as headers can be read.
    pub tensors: BTreeMap<String, Found>,
    /// Tensors that stand in more than one file.
    pub doubled: Vec<String>,
    /// The index, or why it can't be read; none where there is no such file.
    pub index: Option<Result<Map<String, Value>, String>>,
    /// The method that the files' metadata name.
    pub method: Option<String>,
    /// The program that the files' metadata name.
    pub producer: Option<String>,
    /// Whether distq wrote the files.
    pub ours: bool,
    /// The source.
    pub source: Option<Checkpoint>,
    /// What was found in the quantized linears of layers that have been read.
    read: BTreeMap<usize, Vec<LinearScan>>,
    /// The same of all layers, in order, once all have been read.
    pub linears: Vec<LinearScan>,
    /// Quantized linears whose bytes could not be read.
    pub unread: Vec<String>,
    /// Whether `linears` is filled.
    pub scanned: bool,
}

impl Subject {
    /// Opens what can be opened.
    ///
    /// # Errors
    /// Exit code 3 where there is no checkpoint to look at, or no source.
    pub fn open(dir: &Path, source: Option<&Path>) -> Result<Subject> {
        let dir = &snapshot(dir)?.0;
        let source = source.map(Checkpoint::open).transpose()?;
        let listing = listing(dir)?;
        let config = object(&dir.join("config.json"));
        let layout = config.as_ref().ok().and_then(declared_layout);
        let index_name = "model.safetensors.index.json";
        let mut subject = Subject {
            dir: dir.to_path_buf(),
            index: listing.contains(index_name).then(|| object(&dir.join(index_name))),
            schemes: Declared::default(),
            config,
            layout,
            model: Err("config.json has not been read".into()),
            files: vec![],
            file_faults: vec![],
            tensors: BTreeMap::new(),
            doubled: vec![],
            method: None,
            producer: None,
            ours: false,
            source,
            read: BTreeMap::new(),
            linears: vec![],
            unread: vec![],
            scanned: false,
            listing,
        };
        let names: Vec<String> =
            subject.listing.iter().filter(|name| name.ends_with(".safetensors")).cloned().collect();
        names.iter().for_each(|name| subject.add_file(name));
        subject.model = match &subject.config {
            Ok(config) => {
                Model::parse(config, &|name| subject.tensors.contains_key(name)).map_err(|e| e.to_string())
            }
            Err(fault) => Err(fault.clone()),
        };
        subject.check_is_quantized()?;
        subject.declare();
        Ok(subject)
    }

    /// Reads how the configuration says that each linear is stored. The names of more layers than there are tensors
    /// might not fit into memory, and are not made.
    fn declare(&mut self) {
        let (Ok(config), Ok(model)) = (&self.config, &self.model) else { return };
        let (layers, tensors) = (model.layers.len(), self.tensors.len());
        if layers > tensors {
            if self.file_faults.is_empty() {
                self.model =
                    Err(format!("num_hidden_layers is {layers}, and the files hold {tensors} tensors"));
            }
            return;
        }
        let linears = self.linears().into_iter().map(|linear| linear.name);
        let modules: Vec<String> = linears.chain([model.head.clone(), model.embedding_module()]).collect();
        let carried =
            self.tensors.iter().filter(|(name, found)| model.is_carried(name) && found.shape.len() > 1);
        let module = |(name, _): (&String, &Found)| name.strip_suffix(".weight").map(str::to_string);
        let values = model.layers.iter().flat_map(Layer::values_from_keys).map(|(_, value)| value);
        let beside: Vec<String> = carried.filter_map(module).chain(values).collect();
        self.schemes = Declared::of(self.layout, config, &modules, &beside);
    }

    /// A source is not a broken output: nothing in it says that it is quantized.
    fn check_is_quantized(&self) -> Result<()> {
        let floats = [Dtype::BF16, Dtype::F16, Dtype::F32];
        let plain = self.tensors.values().all(|found| floats.contains(&found.dtype))
            && self.config.as_ref().is_ok_and(|config| !config.contains_key("quantization_config"))
            && !self.listing.contains("hf_quant_config.json")
            && !self.tensors.is_empty();
        if !plain {
            return Ok(());
        }
        Err(Error::input("the checkpoint is not quantized: there is nothing to verify")
            .file(&self.dir)
            .fix("name the output of a quantization; distq inspect says what a directory is"))
    }

    fn add_file(&mut self, name: &str) {
        let path = self.dir.join(name);
        let opened = File::open(&path).map_err(|e| format!("{name}: can't open: {e}"));
        let read = opened.and_then(|file| {
            let header = read_header(&file, &path).map_err(|e| e.to_string())?;
            Ok((file, header))
        });
        let (file, header) = match read {
            Ok(read) => read,
            Err(fault) => return self.file_faults.push(fault),
        };
        self.producer = self.producer.take().or_else(|| header.metadata.get("producer").cloned());
        self.ours |= self.producer.as_ref().is_some_and(|producer| producer.starts_with("distq"));
        self.method = self.method.take().or_else(|| header.metadata.get("method").cloned());
        for tensor in header.tensors {
            let found = Found {
                file: self.files.len(),
                dtype: tensor.dtype,
                shape: tensor.shape,
                offset: tensor.offset,
                bytes: tensor.bytes,
            };
            if self.tensors.insert(tensor.name.clone(), found).is_some() {
                self.doubled.push(tensor.name);
            }
        }
        self.files.push((name.to_string(), file));
    }

    /// `quantization_config`; null where there is none.
    pub fn quantization(&self) -> &Value {
        let config = self.config.as_ref().ok();
        config.and_then(|config| config.get("quantization_config")).unwrap_or(&Value::Null)
    }

    /// Whether the layout is this one, or any where none is asked for.
    pub fn has_layout(&self, layout: Option<Layout>) -> bool {
        self.layout.is_some() && (layout.is_none() || layout == self.layout)
    }

    /// Maps a tensor's bytes; none where the file does not hold them.
    pub fn map(&self, name: &str) -> Option<memmap2::Mmap> {
        let found = self.tensors.get(name)?;
        let mut options = MmapOptions::new();
        options.offset(found.offset).len(found.bytes as usize);
        // SAFETY: read-only, and inside the file, whose length its header was checked against; nobody writes
        // to an output under verification.
        unsafe { options.map(&self.files[found.file].1) }.ok()
    }

    /// Copies bytes of a tensor from byte `at` on; none where the file does not hold them.
    pub fn read(&self, name: &str, at: usize, to: &mut [u8]) -> Option<()> {
        let found = self.tensors.get(name)?;
        self.files[found.file].1.read_exact_at(to, found.offset + at as u64).ok()
    }

    /// A scalar f32 tensor.
    pub fn scalar(&self, name: &str) -> Option<f32> {
        let map = self.map(name)?;
        Some(f32::from_le_bytes(map[..].try_into().ok()?))
    }

    /// The layers of the model.
    pub fn layers(&self) -> &[Layer] {
        self.model.as_ref().map_or(&[], |model| &model.layers)
    }

    /// Every linear of the model's layers.
    pub fn linears(&self) -> Vec<LinearSpec> {
        self.layers().iter().flat_map(|layer| &layer.linears).cloned().collect()
    }

    /// Linears that the configuration says are NVFP4, and whether their activations are quantized.
    pub fn nvfp4(&self) -> Vec<(LinearSpec, bool)> {
        let scheme = |linear: LinearSpec| match self.schemes.of_module(&linear.name) {
            LinearScheme::Nvfp4 { activations } => Some((linear, activations)),
            _ => None,
        };
        self.linears().into_iter().filter_map(scheme).collect()
    }

    /// The names of a linear's tensors in this layout.
    pub fn names(&self, linear: &str) -> LinearNames {
        self.layout.unwrap_or(Layout::CompressedTensors).linear_names(linear)
    }

    /// Reads every quantized linear that has not been read.
    pub fn scan(&mut self) {
        use rayon::prelude::*;
        let Ok(model) = &self.model else { return };
        let missing =
            (0..model.layers.len()).filter(|layer| !self.read.contains_key(layer)).collect::<Vec<_>>();
        let found: Vec<_> = missing.into_par_iter().map(|layer| (layer, self.linears_of(layer))).collect();
        self.read.extend(found);
        self.linears = std::mem::take(&mut self.read).into_values().flatten().collect();
        let read: BTreeSet<&str> = self.linears.iter().map(|scan| scan.module.as_str()).collect();
        let all = self.nvfp4().into_iter().map(|(linear, _)| linear.name);
        self.unread = all.filter(|name| !read.contains(name.as_str())).collect();
        self.scanned = true;
    }

    /// Reads the quantized linears of one layer.
    pub fn scan_layer(&mut self, layer: usize) {
        let found = self.linears_of(layer);
        self.read.insert(layer, found);
    }

    fn linears_of(&self, layer: usize) -> Vec<LinearScan> {
        let Ok(model) = &self.model else { return vec![] };
        let layer = &model.layers[layer];
        let folds = LayerFolds::of(self, layer);
        layer.groups().iter().flat_map(|group| scan_group(self, layer, group, &folds)).collect()
    }

    /// Whether the files say that factors were folded into norms, v and up.
    pub fn folds(&self) -> bool {
        self.our_method().is_some_and(|method| method.smooth)
    }

    /// Whether the files say that block scales were chosen by how much each input matters.
    pub fn weighs_channels(&self) -> bool {
        self.our_method().is_some_and(|method| matches!(method.codes, Codes::Wsweep | Codes::Gptq))
    }

    fn our_method(&self) -> Option<Method> {
        self.method.as_ref().filter(|_| self.ours)?.parse().ok()
    }

    /// Every linear's distance to its source.
    pub fn errors(&self) -> Vec<TensorError> {
        let error = |scan: &LinearScan| {
            let distance = scan.distance?;
            let (relative_error, cosine) = (distance.relative(), distance.cosine());
            let block_scales = scan.content.exponents.to_vec();
            Some(TensorError { module: scan.module.clone(), relative_error, cosine, block_scales })
        };
        self.linears.iter().filter_map(error).collect()
    }
}

/// The names in a directory that holds a checkpoint, or a part of one.
fn listing(dir: &Path) -> Result<BTreeSet<String>> {
    let unreadable = |e: std::io::Error| {
        Error::input(format!("can't list the directory: {e}")).file(dir).fix("check its permissions")
    };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        names.extend(entry.map_err(unreadable)?.file_name().into_string().ok());
    }
    if !names.iter().any(|name| name == "config.json" || name.ends_with(".safetensors")) {
        return Err(Error::input("there is neither a config.json nor a safetensors file in the directory")
            .file(dir)
            .fix("name the directory of a quantized checkpoint"));
    }
    Ok(names)
}

/// Reads a JSON object, or says why it can't.
pub fn object(path: &Path) -> Result<Map<String, Value>, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let text = fs::read(path).map_err(|e| format!("{name}: can't read: {e}"))?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(format!("{name}: not a JSON object")),
        Err(e) => Err(format!("{name}: not valid JSON: {e}")),
    }
}
