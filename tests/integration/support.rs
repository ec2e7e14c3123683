//! Tiny checkpoints, and runs of the real binary with a time limit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A scratch directory with a tiny model and calibration data in it.
pub struct Scene {
    dir: tempfile::TempDir,
}

/// The tiny model's decoder layers.
const LAYERS: usize = 6;

impl Scene {
    /// A Llama of six small layers with random weights.
    pub fn new() -> Scene {
        Scene::with(|_| {})
    }

    /// The same with another config.json.
    pub fn with(change: impl FnOnce(&mut Value)) -> Scene {
        let scene = Scene { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(scene.model()).unwrap();
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
            "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": LAYERS, "vocab_size": 128, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
        });
        change(&mut config);
        scene.write_config(&config);
        let model = distq::model::Model::parse(config.as_object().unwrap(), &|_| false).unwrap();
        let specs = model.tensors();
        let mut random = Random(7);
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = specs
            .map(|spec| {
                let scale = if spec.shape.len() == 1 { 0.1 } else { 1.0 / (spec.shape[1] as f32).sqrt() };
                let mean = if spec.shape.len() == 1 { 1.0 } else { 0.0 };
                let n: usize = spec.shape.iter().product();
                let values =
                    (0..n).flat_map(|_| bf16::from_f32(mean + scale * random.normal()).to_le_bytes());
                (spec.name, spec.shape, values.collect())
            })
            .collect();
        scene.write_weights(&tensors);
        let lines = (0..9).map(|i| {
            let ids: Vec<u32> = (0..20 + 13 * i).map(|_| random.next() % 128).collect();
            json!({ "input_ids": ids }).to_string() + "\n"
        });
        fs::write(scene.calib(), lines.collect::<String>()).unwrap();
        fs::write(scene.model().join("tokenizer_config.json"), "{}").unwrap();
        scene
    }

    /// A path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn model(&self) -> PathBuf {
        self.path("model")
    }

    pub fn calib(&self) -> PathBuf {
        self.path("calib.jsonl")
    }

    /// One with so many calibration documents that one thread passes them in about so many seconds, however fast the
    /// processor is.
    pub fn lasting(seconds: f64) -> Scene {
        static TIMES_A_SECOND: OnceLock<f64> = OnceLock::new();
        let times_a_second = TIMES_A_SECOND.get_or_init(|| {
            let (scene, times) = (Scene::new(), 100);
            scene.repeat_calib(times);
            let started = Instant::now();
            scene.quantize("out").args(["--method", "max", "--calib-samples", "100000"]).succeed();
            times as f64 / started.elapsed().as_secs_f64()
        });
        let scene = Scene::new();
        scene.repeat_calib((seconds * times_a_second).ceil() as usize);
        scene
    }

    /// More calibration documents, the same ones again and again: the run takes longer.
    fn repeat_calib(&self, times: usize) {
        let few = fs::read_to_string(self.calib()).unwrap();
        fs::write(self.calib(), few.repeat(times)).unwrap();
    }

    pub fn config(&self) -> Value {
        serde_json::from_slice(&fs::read(self.model().join("config.json")).unwrap()).unwrap()
    }

    pub fn write_config(&self, config: &Value) {
        fs::write(self.model().join("config.json"), config.to_string()).unwrap();
    }

    pub fn weights(&self) -> PathBuf {
        self.model().join("model.safetensors")
    }

    fn write_weights(&self, tensors: &[(String, Vec<usize>, Vec<u8>)]) {
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &self.weights()).unwrap();
    }

    /// Rewrites the weights: tensors by name, as (dtype, shape, bytes).
    pub fn change_weights(&self, change: impl FnOnce(&mut Tensors)) {
        change_safetensors(&self.weights(), change);
    }

    /// Gives the model a larger vocabulary: rows of the embedding and of lm_head are repeated.
    pub fn widen_vocabulary(&self, vocab: usize) {
        self.change_weights(|tensors| {
            for name in ["model.embed_tokens.weight", "lm_head.weight"] {
                let (_, shape, bytes) = tensors.get_mut(name).unwrap();
                *bytes = bytes.repeat(vocab / shape[0]);
                shape[0] = vocab;
            }
        });
        let mut config = self.config();
        config["vocab_size"] = vocab.into();
        self.write_config(&config);
    }

    /// Layers that the journal of the unfinished run to `out` says are finished.
    pub fn layers_finished(&self) -> usize {
        let journal = fs::read_to_string(self.path("out.partial/distq-journal.jsonl")).unwrap_or_default();
        journal.lines().filter(|line| line.starts_with("{\"part\":{\"layer\"")).count()
    }

    /// Waits until the run has a journal and has finished so many layers.
    pub fn until_finished(&self, layers: usize, run: &Running) {
        let (journal, started) = (self.path("out.partial/distq-journal.jsonl"), Instant::now());
        while !journal.exists() || self.layers_finished() < layers {
            assert!(started.elapsed() < Duration::from_secs(80), "process {} finishes nothing", run.pid());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// `distq quantize` on this scene, to `out`.
    pub fn quantize(&self, out: &str) -> Distq {
        let [model, out] = [self.model(), self.path(out)];
        Distq::new(&["quantize"])
            .arg(model)
            .arg(out)
            .args(["--calib-min-tokens", "1"])
            .arg("--calib")
            .arg(self.calib())
    }
}

pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Reads a safetensors file, changes its tensors, writes it again with its metadata.
pub fn change_safetensors(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors = read
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, metadata.metadata().clone(), path).unwrap();
}

/// What is done to a good scene, the arguments added, the exit code, and words of the message.
pub struct Case {
    pub name: &'static str,
    pub spoil: fn(&Scene),
    pub args: &'static [&'static str],
    pub code: i32,
    pub words: &'static [&'static str],
}

/// Sets a field of config.json.
pub fn set(scene: &Scene, key: &str, value: Value) {
    let mut config = scene.config();
    config[key] = value;
    scene.write_config(&config);
}

/// Changes one element of a BF16 tensor.
pub fn spoil_weight(scene: &Scene, name: &str, at: usize, value: f32) {
    scene.change_weights(|tensors| {
        let bytes = &mut tensors.get_mut(name).unwrap().2;
        bytes[2 * at..2 * at + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
    });
}

/// A command line of the real binary.
#[derive(Clone)]
pub struct Distq {
    ranks: Option<usize>,
    args: Vec<std::ffi::OsString>,
    broken: Option<(usize, String)>,
}

/// No run of a tiny model takes this long: a rank that hangs is a failure.
const LIMIT: Duration = Duration::from_secs(240);

impl From<Vec<String>> for Distq {
    fn from(args: Vec<String>) -> Distq {
        Distq { ranks: None, args: args.into_iter().map(Into::into).collect(), broken: None }
    }
}

impl Distq {
    pub fn new(args: &[&str]) -> Distq {
        Distq { ranks: None, args: args.iter().map(Into::into).collect(), broken: None }
    }

    pub fn arg(mut self, arg: impl Into<std::ffi::OsString>) -> Distq {
        self.args.push(arg.into());
        self
    }

    pub fn args<const N: usize>(mut self, args: [&str; N]) -> Distq {
        self.args.extend(args.map(Into::into));
        self
    }

    /// Under mpirun with this many ranks, on one thread each.
    pub fn ranks(mut self, ranks: usize) -> Distq {
        self.ranks = Some(ranks);
        self
    }

    /// One rank has a broken machine, as these variables of `shim.c` say.
    pub fn broken(mut self, rank: usize, variables: &str) -> Distq {
        self.broken = Some((rank, format!("LD_PRELOAD={} {variables}", shim().display())));
        self
    }

    /// Runs it.
    pub fn run(&self) -> Ended {
        self.start().wait()
    }

    /// Starts it.
    pub fn start(&self) -> Running {
        let binary = env!("CARGO_BIN_EXE_distq");
        let mut command = match self.ranks {
            None => Command::new("env"),
            Some(ranks) => {
                let mut command = mpirun();
                command.args(["-np", &ranks.to_string(), "env"]);
                command
            }
        };
        match &self.broken {
            None => command.arg(binary),
            Some((rank, variables)) => {
                let mine = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}";
                let start = format!("test {mine} = {rank} && export {variables}; exec \"$0\" \"$@\"");
                command.args(["sh", "-c", &start, binary])
            }
        };
        let session = tempfile::tempdir().unwrap();
        command.env(SESSION, session.path());
        command.args(&self.args).env("OMP_NUM_THREADS", "1").env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (started, child) = (Instant::now(), command.spawn().unwrap());
        let pid = child.id();
        let (done, waiter) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if waiter.recv_timeout(LIMIT).is_err() {
                signal("-KILL", pid);
            }
        });
        Running { child, session, started, done, args: self.args.clone() }
    }

    /// Runs it and expects success.
    pub fn succeed(&self) -> Ended {
        let ended = self.run();
        assert_eq!(ended.code, 0, "{:?}\n{}{}", self.args, ended.stdout, ended.stderr);
        ended
    }
}

/// A run that has begun.
pub struct Running {
    child: std::process::Child,
    session: tempfile::TempDir,
    started: Instant,
    done: std::sync::mpsc::Sender<()>,
    args: Vec<std::ffi::OsString>,
}

impl Running {
    /// The process that was started: the launcher, or distq itself.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process of a rank: the one that carries its number and this run's session directory.
    pub fn rank(&self, rank: usize) -> u32 {
        let has =
            |environment: &[u8], entry: &str| environment.split(|&b| b == 0).any(|e| e == entry.as_bytes());
        let session = format!("{SESSION}={}", self.session.path().display());
        let numbers = [format!("OMPI_COMM_WORLD_RANK={rank}"), format!("PMI_RANK={rank}")];
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok());
        processes
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .find(|pid: &u32| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                has(&environment, &session) && numbers.iter().any(|number| has(&environment, number))
            })
            .expect("the rank runs")
    }

    /// Waits for its end.
    pub fn wait(self) -> Ended {
        let output: Output = self.child.wait_with_output().unwrap();
        let _ = self.done.send(());
        assert!(self.started.elapsed() < LIMIT, "hung: {:?}", self.args);
        Ended {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Launchers of Open MPI 4 that begin and end at the same moment fight over a common session directory, which this
/// replaces; it also marks the processes of a run.
const SESSION: &str = "OMPI_MCA_orte_tmpdir_base";

/// The launcher on the path, set up for more ranks than cores and for root: Open MPI 4 or 5, or MPICH.
pub fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    command
}

/// Whether the launcher on the path is Open MPI's.
pub fn is_open_mpi() -> bool {
    launcher().contains("Open MPI")
}

/// Whether it passes on what ranks say after it was told to end: Open MPI 5's doesn't.
pub fn listens_to_the_end() -> bool {
    !launcher().contains("(Open MPI) 5")
}

fn launcher() -> String {
    let version = Command::new("mpirun").arg("--version").output().unwrap();
    String::from_utf8_lossy(&version.stdout).into_owned()
}

/// `shim.c`, compiled once.
fn shim() -> &'static Path {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shim.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/integration/shim.c");
        let compiled =
            Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
        assert!(compiled.unwrap().success(), "a C compiler is needed");
        library
    })
}

/// Sends a signal, such as `-TERM`.
pub fn signal(name: &str, pid: u32) {
    let _ = Command::new("kill").args([name, &pid.to_string()]).status();
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// distq's own lines on standard error, without the launcher's.
    pub fn messages(&self) -> Vec<&str> {
        // Open MPI 5 ends its own with a zero byte.
        self.stderr.lines().filter_map(|line| line.trim_start_matches('\0').strip_prefix("distq: ")).collect()
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// blake3 of every file of a directory.
pub fn digests(dir: &Path) -> BTreeMap<String, String> {
    fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let digest = blake3::hash(&fs::read(entry.path()).unwrap()).to_hex().to_string();
            (entry.file_name().into_string().unwrap(), digest)
        })
        .collect()
}

/// xorshift: the same numbers on every machine.
pub struct Random(pub u32);

impl Random {
    pub fn new(seed: u32) -> Random {
        Random(seed)
    }

    /// Other numbers for each seed.
    pub fn seeded(seed: u32) -> Random {
        // Numbers near each other begin alike, and zero stays zero.
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9) | 1);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    /// One of several.
    pub fn of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }

    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    /// From 0 to 1.
    pub fn uniform(&mut self) -> f32 {
        self.next() as f32 / u32::MAX as f32
    }

    /// One of `n` numbers from 0 on.
    pub fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }

    /// True so often.
    pub fn chance(&mut self, share: f32) -> bool {
        self.uniform() < share
    }

    /// Roughly normal: the sum of twelve uniform numbers.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.next() as f32 / u32::MAX as f32).sum::<f32>() - 6.0
    }
}
