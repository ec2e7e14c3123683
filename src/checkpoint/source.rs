//! Reading a Hugging Face directory: which tensors it has, where they lie, and their bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use memmap2::{Advice, MmapOptions};
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::guard;
use super::header::read_header;
use crate::error::{Error, Result};

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte in the file (header included).
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// A checkpoint directory whose headers have been read and checked; no tensor data has been touched.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// config.json as it stands, field order kept.
    pub config: Map<String, Value>,
    /// The safetensors files.
    pub files: Vec<PathBuf>,
    /// Every tensor by name.
    pub tensors: BTreeMap<String, Entry>,
    pub(super) handles: Vec<Arc<File>>,
    pub(super) lengths: Vec<u64>,
    mapped: Mutex<BTreeSet<String>>,
    trouble: Arc<OnceLock<Error>>,
}

/// The bytes of one stored tensor, mapped from its file; unmapped when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// Full name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    map: Arc<memmap2::Mmap>,
    /// None for a tensor that no file holds.
    stored: Option<Stored>,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug)]
struct Stored {
    file: Arc<File>,
    offset: u64,
    /// The checkpoint's, which remembers the first error of any reader.
    trouble: Arc<OnceLock<Error>>,
}

impl SourceTensor {
    /// The tensor's bytes: row-major, little endian.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Copies `to.len()` bytes from byte `at` on. Where each byte is wanted once this is quicker than the
    /// mapping, whose pages fault one by one, and a file that shrinks is an error rather than a signal.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where the file can't be read that far.
    pub fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        match &self.stored {
            Some(Stored { file, offset, trouble }) => {
                file.read_exact_at(to, offset + at as u64).map_err(|e| {
                    let error = Error::run(format!("can't read the source: {e}"))
                        .tensor(&self.name)
                        .fix("check the disk or the network it is on, then use --resume");
                    trouble.get_or_init(|| error.clone());
                    error
                })
            }
            None => {
                to.copy_from_slice(&self.map[at..at + to.len()]);
                Ok(())
            }
        }
    }

    /// A tensor in anonymous memory, for tensors that no file holds.
    pub fn from_bytes(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<SourceTensor> {
        let failed = |e| Error::run(format!("can't allocate {} bytes: {e}", bytes.len())).tensor(name);
        let mut map = memmap2::MmapMut::map_anon(bytes.len()).map_err(failed)?;
        map.copy_from_slice(bytes);
        let map = Arc::new(map.make_read_only().map_err(failed)?);
        Ok(SourceTensor { name: name.to_string(), dtype, shape: shape.to_vec(), map, stored: None })
    }
}

impl Checkpoint {
    /// Opens a directory: config.json and the headers of `model.safetensors` or of the shards that
    /// `model.safetensors.index.json` names. A Hugging Face cache folder stands for its only snapshot.
    ///
    /// # Errors
    /// Exit code 3, naming the file: anything missing, malformed, truncated or contradictory.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let dir = snapshot(dir)?;
        let config = read_object(&dir.join("config.json"), "use a complete Hugging Face directory")?;
        let index_path = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        let weight_map = match index_path.exists() {
            true => Some(read_weight_map(&index_path)?),
            false => None,
        };
        let names: Vec<String> = match &weight_map {
            Some(map) => map.values().cloned().collect::<BTreeSet<_>>().into_iter().collect(),
            None if single.exists() => vec!["model.safetensors".into()],
            None => {
                return Err(Error::input("there is neither model.safetensors nor an index of shards")
                    .file(&dir)
                    .fix("use a directory with safetensors weights; convert .bin files first"));
            }
        };
        let mut checkpoint = Checkpoint {
            dir: dir.clone(),
            config,
            files: names.iter().map(|name| dir.join(name)).collect(),
            tensors: BTreeMap::new(),
            handles: Vec::new(),
            lengths: Vec::new(),
            mapped: Mutex::default(),
            trouble: Arc::default(),
        };
        for (file, path) in checkpoint.files.clone().iter().enumerate() {
            if !path.exists() && weight_map.is_some() {
                return Err(Error::input(format!("the index names {}, which is missing", names[file]))
                    .file(&index_path)
                    .fix("download the missing shard"));
            }
            checkpoint.add_file(file, path)?;
        }
        if let Some(map) = weight_map {
            checkpoint.check_index(&index_path, &map, &names)?;
        }
        Ok(checkpoint)
    }

    /// A checkpoint that has no weights yet: the tensors that its config.json stands for, in the dtype that it
    /// names (BF16 where it names none). Good for planning, and nothing can be read from it.
    pub fn described(
        dir: &Path,
        config: Map<String, Value>,
        shapes: Vec<(String, Vec<usize>)>,
    ) -> Checkpoint {
        let named = config.get("dtype").or(config.get("torch_dtype")).and_then(Value::as_str);
        let (dtype, size) = match named {
            Some("float32") => (Dtype::F32, 4),
            Some("float16") => (Dtype::F16, 2),
            _ => (Dtype::BF16, 2),
        };
        let entry = |shape: Vec<usize>| {
            let bytes = (shape.iter().product::<usize>() * size) as u64;
            Entry { file: 0, dtype, shape, offset: 0, bytes }
        };
        Checkpoint {
            dir: dir.to_path_buf(),
            config,
            files: vec![dir.join("model.safetensors")],
            tensors: shapes.into_iter().map(|(name, shape)| (name, entry(shape))).collect(),
            handles: vec![],
            lengths: vec![],
            mapped: Mutex::default(),
            trouble: Arc::default(),
        }
    }

    /// config.json of a directory, and whether there are weights beside it.
    ///
    /// # Errors
    /// Exit code 3 where there is no directory or no config.json.
    pub fn config(dir: &Path) -> Result<(Map<String, Value>, bool)> {
        let dir = snapshot(dir)?;
        let weights = ["model.safetensors", "model.safetensors.index.json"];
        let config = read_object(&dir.join("config.json"), "use a complete Hugging Face directory")?;
        Ok((config, weights.iter().any(|name| dir.join(name).exists())))
    }

    fn add_file(&mut self, file: usize, path: &Path) -> Result<()> {
        let handle = File::open(path).map_err(|e| {
            Error::input(format!("can't open: {e}"))
                .file(path)
                .fix("check that the file exists and is readable")
        })?;
        let header = read_header(&handle, path)?;
        let bytes = header.file_bytes;
        self.lengths.push(bytes);
        for tensor in header.tensors {
            let entry = Entry {
                file,
                dtype: tensor.dtype,
                shape: tensor.shape,
                offset: tensor.offset,
                bytes: tensor.bytes,
            };
            if let Some(other) = self.tensors.insert(tensor.name.clone(), entry) {
                return Err(Error::input(format!(
                    "the tensor is also in {}",
                    self.files[other.file].display()
                ))
                .file(path)
                .tensor(tensor.name)
                .fix("remove the file that does not belong to the checkpoint"));
            }
        }
        let handle = Arc::new(handle);
        guard::watch(&handle, path, bytes);
        self.handles.push(handle);
        Ok(())
    }

    fn check_index(&self, index: &Path, map: &BTreeMap<String, String>, names: &[String]) -> Result<()> {
        for (tensor, file) in map {
            let there = self.tensors.get(tensor).is_some_and(|entry| names[entry.file] == *file);
            if !there {
                return Err(Error::input(format!(
                    "the index says the tensor is in {file}, which does not hold it"
                ))
                .file(index)
                .tensor(tensor)
                .fix("use the index that belongs to these shards"));
            }
        }
        match self.tensors.keys().find(|name| !map.contains_key(*name)) {
            None => Ok(()),
            Some(tensor) => Err(Error::input("the index does not list the tensor")
                .file(index)
                .tensor(tensor)
                .fix("use the index that belongs to these shards")),
        }
    }

    /// Where a tensor lies.
    ///
    /// # Errors
    /// Exit code 3 where the checkpoint has no such tensor.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| {
            Error::input("the tensor is missing")
                .file(&self.dir)
                .tensor(name)
                .fix("check that config.json and the weights belong together and that no shard is missing")
        })
    }

    /// Maps one tensor's bytes, and nothing else of its file.
    ///
    /// # Errors
    /// Exit code 3 where there is no such tensor; 5 where the file has shrunk or can't be mapped.
    pub fn tensor(&self, name: &str) -> Result<SourceTensor> {
        let entry = self.entry(name)?;
        let path = &self.files[entry.file];
        let handle = &self.handles[entry.file];
        let failed = |e: std::io::Error| Error::run(format!("can't read: {e}")).file(path).tensor(name);
        // Reading a mapping beyond the end of its file kills the process, so look before mapping.
        let length = handle.metadata().map_err(failed)?.len();
        if length != self.lengths[entry.file] {
            return Err(Error::run(format!(
                "the file changed from {} to {length} bytes while it was in use",
                self.lengths[entry.file]
            ))
            .file(path)
            .tensor(name)
            .fix("restore the source and use --resume"));
        }
        let mut options = MmapOptions::new();
        options.offset(entry.offset).len(entry.bytes as usize);
        // SAFETY: the mapping is read-only and the range lies inside the file, as just checked. The source is
        // not supposed to change while it is read; if someone writes to it, bytes change but stay bytes.
        let map = unsafe { options.map(&**handle) }.map_err(failed)?;
        // Tensors are read from front to back, once or in a few passes.
        let _ = map.advise(Advice::WillNeed);
        self.mapped.lock().expect("no holder of this lock panics").insert(name.to_string());
        Ok(SourceTensor {
            name: name.to_string(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            map: Arc::new(map),
            stored: Some(Stored {
                file: handle.clone(),
                offset: entry.offset,
                trouble: self.trouble.clone(),
            }),
        })
    }

    /// The first error of any reader of its tensors, for those who only want to know whether all went well.
    pub fn trouble(&self) -> Option<&Error> {
        self.trouble.get()
    }

    /// Bytes of the distinct tensors that were mapped so far.
    pub fn bytes_mapped(&self) -> u64 {
        let mapped = self.mapped.lock().expect("no holder of this lock panics");
        mapped.iter().map(|name| self.tensors[name].bytes).sum()
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.bytes).sum()
    }

    /// Whether config.json or hf_quant_config.json says that the weights are quantized.
    pub fn is_quantized(&self) -> bool {
        self.config.get("quantization_config").is_some_and(|value| !value.is_null())
            || self.dir.join("hf_quant_config.json").exists()
    }

    /// blake3 over config.json and every tensor's name, dtype and shape. Paths and shards don't count, so
    /// copies on other hosts compare equal.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(Value::Object(self.config.clone()).to_string().as_bytes());
        for (name, entry) in &self.tensors {
            hasher.update(format!("\n{name} {:?} {:?}", entry.dtype, entry.shape).as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// The directory itself, or the only snapshot of a Hugging Face cache folder.
///
/// # Errors
/// Exit code 3 where there is no such directory, or several snapshots.
pub fn snapshot(dir: &Path) -> Result<PathBuf> {
    if !dir.is_dir() {
        return Err(Error::input("there is no such directory")
            .file(dir)
            .fix("give the path of a downloaded checkpoint; distq does not download"));
    }
    let snapshots = dir.join("snapshots");
    if dir.join("config.json").exists() || !snapshots.is_dir() {
        return Ok(dir.to_path_buf());
    }
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(&snapshots).into_iter().flatten().flatten().map(|e| e.path()).collect();
    found.sort();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        _ => Err(Error::input(format!("the cache folder has {} snapshots", found.len()))
            .file(&snapshots)
            .fix("name the snapshot's own directory")),
    }
}

/// Reads a JSON object.
fn read_object(path: &Path, fix: &str) -> Result<Map<String, Value>> {
    let text =
        std::fs::read(path).map_err(|e| Error::input(format!("can't read: {e}")).file(path).fix(fix))?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::input("this is not a JSON object").file(path).fix(fix)),
        Err(e) => Err(Error::input(format!("this is not valid JSON: {e}")).file(path).fix(fix)),
    }
}

fn read_weight_map(path: &Path) -> Result<BTreeMap<String, String>> {
    let fix = "download the index again";
    let index = read_object(path, fix)?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::input("there is no weight_map").file(path).fix(fix))?;
    map.iter()
        .map(|(tensor, file)| match file.as_str() {
            Some(file) if !file.contains('/') => Ok((tensor.clone(), file.to_string())),
            _ => Err(Error::input(format!("{file} is not a file name")).file(path).tensor(tensor).fix(fix)),
        })
        .collect()
}
