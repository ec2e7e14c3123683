//! Reading a Hugging Face directory: which tensors it has, where they lie, and their bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use memmap2::{Advice, MmapOptions};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use super::directory::{self, LARGEST_CONFIG};
use super::fp8::{Decoder, Fp8, Unseen};
use super::guard;
use super::header::read_header;
use super::shards::{self, INDEX, Shards, some};
use crate::checkpoint::writing::sidefiles::{left_behind, side_files};
use crate::error::{Error, Result, quoted};

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Element type; BF16 where the file holds FP8.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte in the file (header included).
    pub offset: u64,
    /// Bytes that the files hold of it, scales of FP8 included.
    pub bytes: u64,
    /// What belongs to it where the file holds FP8.
    pub(in crate::checkpoint) fp8: Option<Box<Fp8>>,
}

impl Entry {
    /// Element type in the file.
    pub fn stored_dtype(&self) -> Dtype {
        if self.fp8.is_some() { Dtype::F8_E4M3 } else { self.dtype }
    }

    /// Length in bytes of its own data in the file, without scales.
    pub(in crate::checkpoint) fn length(&self) -> u64 {
        self.bytes - self.fp8.as_ref().map_or(0, |fp8| fp8.lie.bytes)
    }
}

/// A checkpoint directory whose headers have been read and checked; no tensor data has been touched.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// config.json as it stands, field order kept; without its description of FP8 weights where there are such.
    pub config: Map<String, Value>,
    /// The safetensors files.
    pub files: Vec<PathBuf>,
    /// Every tensor by name, FP8 weights as BF16 and their scales left out.
    pub tensors: BTreeMap<String, Entry>,
    /// What is used and what is ignored, where that is not plain.
    pub notes: Vec<String>,
    /// The index's file for each tensor that no file holds.
    lost: BTreeMap<String, String>,
    pub(in crate::checkpoint) handles: Vec<Arc<File>>,
    pub(in crate::checkpoint) lengths: Vec<u64>,
    /// What of an FP8 checkpoint is not seen.
    pub(in crate::checkpoint) fp8: Option<Unseen>,
    mapped: Mutex<BTreeSet<String>>,
    trouble: Arc<OnceLock<Error>>,
}

/// One stored tensor, mapped from its file; unmapped when the last clone is dropped. FP8 is decoded to BF16 when it is
/// read.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// Full name in the checkpoint.
    pub name: String,
    /// Element type of [`SourceTensor::bytes`].
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    map: Arc<memmap2::Mmap>,
    /// None for a tensor that no file holds.
    stored: Option<Stored>,
    /// What decodes the mapped bytes where they are FP8 codes.
    fp8: Option<Arc<Decoder>>,
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
    /// The tensor's bytes: row-major, little endian. FP8 is decoded as a whole at the first call, and kept; a code that
    /// is NaN becomes NaN, which [`SourceTensor::checked`] refuses.
    pub fn bytes(&self) -> &[u8] {
        match &self.fp8 {
            None => &self.map,
            Some(decoder) => decoder.whole(&self.map).0,
        }
    }

    /// The same, where FP8 codes and scales make finite numbers. What is not FP8 is not looked at.
    ///
    /// # Errors
    /// Exit code 3, naming the tensor, the row and the column, where they don't.
    pub fn checked(&self) -> Result<&[u8]> {
        let Some(decoder) = &self.fp8 else { return Ok(&self.map) };
        match decoder.whole(&self.map) {
            (bytes, None) => Ok(bytes),
            (_, Some(at)) => Err(self.no_number(at)),
        }
    }

    /// Copies `to.len()` bytes from byte `at` on, where both are whole elements. Where each byte is wanted once this is
    /// quicker than the mapping, whose pages fault one by one, and a file that shrinks is an error rather than a signal.
    /// Of FP8, no more than these elements are read and decoded.
    ///
    /// # Errors
    /// Exit code 5, naming the tensor, where the file can't be read that far; 3 as [`SourceTensor::checked`].
    pub fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        let Some(decoder) = &self.fp8 else { return self.read_stored(at, to) };
        let (first, mut codes) = (at / 2, vec![0; to.len() / 2]);
        self.read_stored(first, &mut codes)?;
        match decoder.decode(first, &codes, to) {
            None => Ok(()),
            Some(at) => Err(self.no_number(at)),
        }
    }

    fn read_stored(&self, at: usize, to: &mut [u8]) -> Result<()> {
        let Some(Stored { file, offset, .. }) = &self.stored else {
            to.copy_from_slice(&self.map[at..at + to.len()]);
            return Ok(());
        };
        file.read_exact_at(to, offset + at as u64).map_err(|e| {
            self.in_trouble(
                Error::run(format!("can't read the source: {e}"))
                    .fix("check the disk or the network it is on, then use --resume"),
            )
        })
    }

    /// An element of an FP8 weight that is not finite.
    fn no_number(&self, at: usize) -> Error {
        let cols = self.shape.last().copied().unwrap_or(1).max(1);
        let what = format!(
            "the FP8 code in row {}, column {} is NaN, or too large for BF16 when it is multiplied by its scale",
            at / cols,
            at % cols
        );
        self.in_trouble(Error::input(what).fix("repair or replace this tensor in the source"))
    }

    /// The error with the tensor's name, remembered by the checkpoint.
    fn in_trouble(&self, error: Error) -> Error {
        let error = error.tensor(&self.name);
        if let Some(Stored { trouble, .. }) = &self.stored {
            trouble.get_or_init(|| error.clone());
        }
        error
    }

    /// A tensor in anonymous memory, for tensors that no file holds.
    pub fn from_bytes(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<SourceTensor> {
        let failed = |e| Error::run(format!("can't allocate {} bytes: {e}", bytes.len())).tensor(name);
        let mut map = memmap2::MmapMut::map_anon(bytes.len()).map_err(failed)?;
        map.copy_from_slice(bytes);
        let map = Arc::new(map.make_read_only().map_err(failed)?);
        Ok(SourceTensor {
            name: name.to_string(),
            dtype,
            shape: shape.to_vec(),
            map,
            stored: None,
            fp8: None,
        })
    }
}

impl Checkpoint {
    /// Opens a directory: config.json and the headers of `model.safetensors`, of the shards that
    /// `model.safetensors.index.json` names, or of shards whose names count them. A Hugging Face cache folder stands
    /// for the snapshot that its `refs/main` names, or for its only one.
    ///
    /// # Errors
    /// Exit code 3, naming the file: anything missing, malformed, truncated, contradictory or out of the directory.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let (dir, snapshot) = directory::snapshot(dir)?;
        let config = read_config(&dir)?;
        let Shards { files, listed, notes } = shards::find(&dir)?;
        // Looked at now, because others read them by themselves: tokenizers, chat templates.
        side_files(&dir)?;
        let mut checkpoint = Checkpoint {
            config,
            files: files.iter().map(|name| dir.join(name)).collect(),
            notes: snapshot.into_iter().chain(notes).collect(),
            ..Checkpoint::empty(&dir)
        };
        for (file, name) in files.iter().enumerate() {
            checkpoint.add_file(file, name)?;
        }
        if let Some(listed) = listed {
            checkpoint.compare(listed);
        }
        checkpoint.see_fp8_as_bf16()?;
        Ok(checkpoint)
    }

    fn empty(dir: &Path) -> Checkpoint {
        Checkpoint {
            dir: dir.to_path_buf(),
            config: Map::new(),
            files: vec![],
            tensors: BTreeMap::new(),
            notes: vec![],
            lost: BTreeMap::new(),
            handles: vec![],
            lengths: vec![],
            fp8: None,
            mapped: Mutex::default(),
            trouble: Arc::default(),
        }
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
            Entry { file: 0, dtype, shape, offset: 0, bytes, fp8: None }
        };
        let mut checkpoint = Checkpoint {
            config,
            files: vec![dir.join("model.safetensors")],
            tensors: shapes.into_iter().map(|(name, shape)| (name, entry(shape))).collect(),
            ..Checkpoint::empty(dir)
        };
        checkpoint.expect_fp8();
        checkpoint
    }

    /// config.json of a directory, and whether there are weights beside it.
    ///
    /// # Errors
    /// Exit code 3 where there is no directory or no config.json.
    pub fn config(dir: &Path) -> Result<(Map<String, Value>, bool)> {
        let (dir, _) = directory::snapshot(dir)?;
        side_files(&dir)?;
        Ok((read_config(&dir)?, shards::any(&dir)))
    }

    fn add_file(&mut self, file: usize, name: &str) -> Result<()> {
        let path = &self.files[file];
        let (handle, _) = directory::open(&self.dir, name)?;
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
                fp8: None,
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

    /// Compares the index with the files. Loaders take every tensor of the files, whatever the index says of it, and
    /// what it lists in vain is missed only where the model needs it.
    fn compare(&mut self, listed: BTreeMap<String, String>) {
        let unlisted: Vec<String> =
            self.tensors.keys().filter(|name| !listed.contains_key(*name)).cloned().collect();
        let mut elsewhere = vec![];
        for (name, file) in listed {
            match self.tensors.get(&name) {
                None => _ = self.lost.insert(name, file),
                Some(entry) if !self.files[entry.file].ends_with(&file) => elsewhere.push(name),
                Some(_) => {}
            }
        }
        let lost: Vec<String> = self.lost.keys().cloned().collect();
        for (names, what) in [
            (unlisted, "tensors that the shards hold and the index does not list are used as they are"),
            (elsewhere, "tensors that are in another shard than the index says are used as they are"),
            (lost, "the index lists tensors that no shard holds"),
        ] {
            if !names.is_empty() {
                self.notes.push(format!("{INDEX} is out of step: {what}: {}", some(&names)));
            }
        }
    }

    /// Where a tensor lies.
    ///
    /// # Errors
    /// Exit code 3 where the checkpoint has no such tensor.
    pub fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| match self.lost.get(name) {
            Some(file) => Error::input(format!(
                "the index says the tensor is in {file}, which does not hold it: it is missing"
            ))
            .file(self.dir.join(INDEX))
            .tensor(name)
            .fix("download the index and the shards again: they don't belong together"),
            None => Error::input("the tensor is missing")
                .file(&self.dir)
                .tensor(name)
                .fix("check that config.json and the weights belong together and that no shard is missing"),
        })
    }

    /// Whether the index lists a tensor that no file holds.
    pub fn is_listed_in_vain(&self, name: &str) -> bool {
        self.lost.contains_key(name)
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
        options.offset(entry.offset).len(entry.length() as usize);
        // SAFETY: the mapping is read-only and the range lies inside the file, as just checked. The source is
        // not supposed to change while it is read; if someone writes to it, bytes change but stay bytes.
        let map = unsafe { options.map(&**handle) }.map_err(failed)?;
        // Tensors are read from front to back, once or in a few passes.
        let _ = map.advise(Advice::WillNeed);
        let fp8 = entry.fp8.as_ref().map(|fp8| self.decoder(&entry.shape, fp8)).transpose();
        let fp8 = fp8.map_err(|error| self.trouble.get_or_init(|| error).clone())?;
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
            fp8: fp8.map(Arc::new),
        })
    }

    /// Whether two tensors are equal in dtype, shape and every byte.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn same_bytes(&self, one: &str, other: &str) -> Result<bool> {
        let (one, other) = (self.tensor(one)?, self.tensor(other)?);
        let alike = one.dtype == other.dtype && one.shape == other.shape;
        Ok(alike
            && one.bytes().par_chunks(1 << 20).zip(other.bytes().par_chunks(1 << 20)).all(|(a, b)| a == b))
    }

    /// What is beside the weights and is not carried over.
    pub fn left_behind(&self) -> Vec<String> {
        let used: Vec<&str> = self.files.iter().filter_map(|file| file.file_name()?.to_str()).collect();
        left_behind(&self.dir, &used)
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

    /// Bytes of all tensors in the files.
    pub fn total_bytes(&self) -> u64 {
        let unread = self.fp8.iter().flat_map(|unseen| unseen.unread.values());
        self.tensors.values().chain(unread).map(|entry| entry.bytes).sum()
    }

    /// Checks that these are weights to quantize: in full precision, and not described as anything else.
    ///
    /// # Errors
    /// Exit code 3: the weights are quantized, or a merge left the description of quantized ones beside them.
    pub fn full_precision(&self) -> Result<()> {
        const SEPARATE: &str = "hf_quant_config.json";
        let described = |field: &&str| self.config.get(*field).is_some_and(|value| !value.is_null());
        let field = ["quantization_config", "compression_config"].into_iter().find(described);
        if field.is_none() && !self.dir.join(SEPARATE).exists() {
            return Ok(());
        }
        let method = field.map(|field| {
            let method = self.config[field].get("quant_method").and_then(Value::as_str);
            method.map_or(format!(" with the field {field}"), |method| {
                format!(" with the field {field}, method {method:?}")
            })
        });
        let file = self.dir.join(if field.is_some() { "config.json" } else { SEPARATE });
        let method = method.unwrap_or_default();
        let ends = ["scale", "scales", "zero_point", "qzeros", "g_idx", "absmax"];
        let quantized = |(name, entry): &(&String, &Entry)| {
            !matches!(entry.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
                || ends.iter().any(|end| name.ends_with(end))
        };
        if let Some((name, entry)) = self.tensors.iter().find(quantized) {
            return Err(Error::input(format!(
                "the source is already quantized: so says {}{method}, and this tensor is {:?}",
                if field.is_some() { "config.json" } else { SEPARATE },
                entry.dtype
            ))
            .file(&self.files[entry.file])
            .tensor(name)
            .fix("start from the original BF16, F16 or F32 checkpoint"));
        }
        let what = "the weights are described as quantized, but all of them are BF16, F16 or F32: a merge or a copy left \
                    the description behind";
        let path = quoted(&file.display().to_string());
        Err(match field {
            Some(field) => Error::input(format!("{what}{method}")).fix(format!(
                "remove {field} from config.json: python3 -c 'import json, sys; p = sys.argv[1]; c = json.load(open(p)); \
                 del c[\"{field}\"]; json.dump(c, open(p, \"w\"), indent=2)' {path}"
            )),
            None => Error::input(what).fix(format!("remove the file: rm {path}")),
        }
        .file(&file))
    }

    /// blake3 over config.json and every tensor's name, dtype in the file and shape. Paths and shards don't count, so
    /// copies on other hosts compare equal.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(Value::Object(self.config.clone()).to_string().as_bytes());
        for (name, entry) in &self.tensors {
            hasher.update(format!("\n{name} {:?} {:?}", entry.stored_dtype(), entry.shape).as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

fn read_config(dir: &Path) -> Result<Map<String, Value>> {
    const NAME: &str = "config.json";
    let (path, fix) =
        (dir.join(NAME), "use a complete Hugging Face directory: hf download ORG/NAME --local-dir DIR");
    if !path.exists() {
        let what = match ["adapter_config.json", "params.json"].map(|name| dir.join(name).exists()) {
            [true, _] => {
                "there is no config.json: this is an adapter (LoRA), which must be merged into its model first"
            }
            [_, true] => "there is no config.json: this is a model in Mistral's or Meta's own format",
            _ => "there is no config.json",
        };
        return Err(Error::input(what).file(&path).fix(fix));
    }
    match serde_json::from_slice(&directory::read(dir, NAME, LARGEST_CONFIG)?) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::input("this is not a JSON object").file(&path).fix(fix)),
        Err(e) => Err(Error::input(format!("this is not valid JSON: {e}")).file(&path).fix(fix)),
    }
}
