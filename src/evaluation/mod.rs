//! How good a checkpoint is: perplexity on text, and how far its predictions are from a reference's.
//!
//! BF16 checkpoints and both quantized layouts go through the same forward pass that calibrates. A quantized
//! linear's weights are dequantized, and its inputs are quantized and dequantized as engines do it: static global
//! scale, block scale from the block's maximum, rounding to nearest.

mod forward;
mod metrics;
mod weights;

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::backend::{Backend, Compute, Device, DeviceChoice, OnBackend, Solver};
use crate::calibration::{MicroBatch, micro_batches, windows};
use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::pipeline::open_device;
use crate::report::{Evaluation, Scores};
use forward::{Forward, Text};
use metrics::{Head, Logits};
use weights::Weights;

/// What `distq eval` was asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The checkpoints.
    pub models: Vec<PathBuf>,
    /// A checkpoint whose predictions the others are compared with.
    pub reference: Option<PathBuf>,
    /// A file of text.
    pub text: PathBuf,
    /// Windows to score; as many as the text has where none is given.
    pub windows: Option<usize>,
    /// Tokens of a window; all but the first are scored.
    pub window_tokens: usize,
    /// The dtype of activations, whatever that of the checkpoints.
    pub compute: Compute,
    /// Where to compute.
    pub device: DeviceChoice,
}

/// Tokens that walk together: logits of the whole vocabulary exist for that many.
const TOKENS: usize = 1024;

/// Evaluates every checkpoint; layers are spread evenly over the ranks. The result is rank 0's to print.
///
/// # Errors
/// Exit codes 2 to 5, the same on every rank.
pub fn evaluate(cluster: &Cluster, options: &Options) -> Result<Evaluation> {
    // One tokenizer for all, so that every checkpoint sees the same tokens.
    let tokenizer = options.reference.as_ref().unwrap_or(&options.models[0]);
    let windows: Vec<Vec<u32>> =
        cluster.from_root(|| windows(tokenizer, &options.text, options.window_tokens, options.windows))?;
    let text = Text {
        batches: micro_batches(&vec![options.window_tokens; windows.len()], TOKENS),
        ids: windows.concat(),
        window: options.window_tokens,
    };
    let reference = match &options.reference {
        None => None,
        Some(path) => Some(Judged::new(cluster, options, path, &text)?),
    };
    let mut models = Vec::new();
    if let Some(reference) = &reference {
        models.push(reference.scores(cluster, None, &text)?);
    }
    for path in &options.models {
        let judged = Judged::new(cluster, options, path, &text)?;
        models.push(judged.scores(cluster, reference.as_ref(), &text)?);
    }
    Ok(Evaluation {
        text: options.text.display().to_string(),
        compute: options.compute,
        windows: windows.len(),
        window_tokens: options.window_tokens,
        reference: options.reference.as_ref().map(|path| path.display().to_string()),
        models,
    })
}

/// A checkpoint that has read the text.
struct Judged {
    path: PathBuf,
    weights: Weights,
    device: Device,
    /// The last hidden state of every micro-batch, on the last rank.
    hidden: Vec<Vec<u8>>,
    seconds: f64,
}

impl Judged {
    fn new(cluster: &Cluster, options: &Options, path: &Path, text: &Text) -> Result<Judged> {
        let started = Instant::now();
        let ranks = cluster.size();
        let opened = cluster.attend(|| Weights::open(path, options.compute)).and_then(|weights| {
            let layers = weights.model.layers;
            if ranks > layers {
                return Err(Error::plan(format!("{ranks} ranks for {layers} layers"))
                    .fix(format!("start at most {layers} ranks")));
            }
            let (vocab, largest) = (weights.model.vocab, text.ids.iter().copied().max().unwrap_or(0));
            if largest as usize >= vocab {
                return Err(Error::input(format!("token {largest} is outside of the vocabulary of {vocab}"))
                    .file(path)
                    .fix("compare checkpoints that share a tokenizer"));
            }
            Ok(weights)
        });
        let weights = cluster.agree(opened)?;
        let machine = cluster.machine(None);
        let device = open_device(cluster, options.device, weights.compute, machine.threads)?;
        let hidden = device.run(Forward { cluster, weights: &weights, text })?;
        Ok(Judged {
            path: path.to_path_buf(),
            weights,
            device,
            hidden,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Compares predictions with the text and with a reference, on the last rank, which has the hidden states.
    fn scores(&self, cluster: &Cluster, reference: Option<&Judged>, text: &Text) -> Result<Scores> {
        let started = Instant::now();
        let mine = if cluster.rank() + 1 == cluster.size() {
            let scored = cluster.attend(|| match reference {
                None => self.with_logits(|mine| metrics::score(text, mine, None)),
                Some(reference) => self.with_logits(|mine| {
                    reference.with_logits(|theirs| metrics::score(text, mine, Some(theirs)))
                }),
            });
            scored.map(Some).map_err(|error| error.file(&self.path))
        } else {
            Ok(None)
        };
        let found = cluster.all_gather(&cluster.agree(mine)?)?;
        let mut scores: Scores = found.into_iter().flatten().next().expect("the last rank has scored");
        scores.model = self.path.display().to_string();
        scores.seconds = self.seconds + started.elapsed().as_secs_f64();
        Ok(scores)
    }
    fn with_logits<T>(&self, then: impl FnOnce(Logits<'_>) -> Result<T>) -> Result<T> {
        self.device.run(Head { weights: &self.weights, hidden: &self.hidden, then })
    }
}
