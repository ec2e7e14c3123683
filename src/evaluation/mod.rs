//! How good a checkpoint is: perplexity on text, and how far its predictions are from a reference's.
//!
//! BF16 checkpoints and both quantized layouts go through the same forward pass that calibrates. A quantized
//! linear's weights are dequantized, and its inputs are quantized and dequantized as engines do it: static global
//! scale, block scale from the block's maximum, rounding to nearest.

mod forward;
mod metrics;
mod scores;
mod weights;

pub use scores::{Evaluation, Scores};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::backend::{Backend, Compute, Device, DeviceChoice, OnBackend, Solver};
use crate::calibration::{MicroBatch, Windows, micro_batches};
use crate::cluster::Cluster;
use crate::devices::open_device;
use crate::error::{Error, Result};
use crate::progress::Steps;
use forward::{Forward, Text, slice};
use metrics::{Head, Logits, Token};
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
    /// Whether to show no progress.
    pub quiet: bool,
}

/// Tokens that walk together: logits of the whole vocabulary exist for that many.
const TOKENS: usize = 1024;

/// Evaluates every checkpoint; layers, and then micro-batches to score, are spread evenly over the ranks. The result
/// is rank 0's to print.
///
/// # Errors
/// Exit codes 2 to 5, the same on every rank.
pub fn evaluate(cluster: &Cluster, options: &Options) -> Result<Evaluation> {
    let (paths, ranks) = (distinct(cluster, options)?, cluster.size());
    // All are opened and checked before any is computed with.
    let all = cluster.agree(cluster.attend(|| open_all(&paths, options.compute, ranks)))?;
    same_checkpoints(cluster, &paths, &all)?;
    let cut = Windows { file: &options.text, length: options.window_tokens, count: options.windows };
    let windows: Vec<Vec<u32>> = cluster.from_root(|| cut.of(&paths))?;
    let text = Text {
        batches: micro_batches(&vec![options.window_tokens; windows.len()], TOKENS),
        ids: windows.concat(),
        window: options.window_tokens,
    };
    cluster.agree(fits_vocabularies(&paths, &all, &text))?;
    let machine = cluster.machine(None);
    let device = open_device(cluster, options.device, options.compute, machine.threads)?;
    let free = device.memory().map_or(machine.memory, |(free, _)| free);
    // Each layer over each micro-batch, and the scoring of this rank's.
    let scored = (0..text.batches.len()).filter(|batch| batch % cluster.size() == cluster.rank()).count();
    let passes =
        |weights: &Weights| slice(cluster, weights.model.layers.len()).len() * text.batches.len() + scored;
    let steps = all.iter().map(passes).sum::<usize>();
    let steps = Steps::beside_result(steps as u64, "passes", options.quiet || !cluster.is_root());
    let judge = Judge { device: &device, text: &text, room: free / 2, steps: &steps };

    let mut reference = None;
    let mut models = Vec::new();
    for (number, (path, weights)) in paths.iter().zip(&all).enumerate() {
        steps.say(format!("{} ({} of {})", path.display(), number + 1, paths.len()));
        let judged = judge.walk(cluster, path, weights)?;
        models.push(judge.scores(cluster, &judged, reference.as_ref())?);
        if number == 0 && options.reference.is_some() {
            reference = Some(judged);
        }
    }
    steps.finish();
    Ok(Evaluation {
        text: options.text.display().to_string(),
        compute: options.compute,
        windows: windows.len(),
        window_tokens: options.window_tokens,
        reference: options.reference.as_ref().map(|path| path.display().to_string()),
        models,
    })
}

/// Refuses hosts whose copies of a checkpoint differ.
fn same_checkpoints(cluster: &Cluster, paths: &[PathBuf], all: &[Weights]) -> Result<()> {
    let digests: Vec<String> = all.iter().map(Weights::digest).collect();
    let everywhere = cluster.all_gather(&digests)?;
    for (number, path) in paths.iter().enumerate() {
        if let Some(rank) = everywhere.iter().position(|there| there[number] != everywhere[0][number]) {
            return cluster.agree(Err(Error::input(format!(
                "ranks 0 and {rank} have different checkpoints"
            ))
            .file(path)
            .fix("copy the checkpoint of one host to the others")));
        }
    }
    Ok(())
}

/// The reference, then the checkpoints, each directory once.
fn distinct(cluster: &Cluster, options: &Options) -> Result<Vec<PathBuf>> {
    let named: Vec<&PathBuf> = options.reference.iter().chain(&options.models).collect();
    let first: Vec<usize> = cluster.from_root(|| {
        let places: Vec<PathBuf> =
            named.iter().map(|path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf())).collect();
        Ok((0..places.len()).filter(|&i| !places[..i].contains(&places[i])).collect())
    })?;
    Ok(first.into_iter().map(|i| named[i].clone()).collect())
}

fn open_all(paths: &[PathBuf], compute: Compute, ranks: usize) -> Result<Vec<Weights>> {
    let open = |path: &PathBuf| {
        let weights = Weights::open(path, compute)?;
        let layers = weights.model.layers.len();
        if ranks > layers {
            return Err(Error::plan(format!("{ranks} ranks for {layers} layers"))
                .file(path)
                .fix(format!("start at most {layers} ranks")));
        }
        Ok(weights)
    };
    paths.iter().map(open).collect()
}

fn fits_vocabularies(paths: &[PathBuf], all: &[Weights], text: &Text) -> Result<()> {
    let largest = text.ids.iter().copied().max().unwrap_or(0) as usize;
    match paths.iter().zip(all).find(|(_, weights)| largest >= weights.model.vocab) {
        None => Ok(()),
        Some((path, weights)) => Err(Error::input(format!(
            "token {largest} of the text is outside of the vocabulary of {}",
            weights.model.vocab
        ))
        .file(path)
        .fix("compare checkpoints that share a tokenizer")),
    }
}

/// What all checkpoints are judged by.
struct Judge<'a> {
    device: &'a Device,
    text: &'a Text,
    /// Bytes that a rank's weights may take.
    room: u64,
    steps: &'a Steps,
}

/// A checkpoint that has read the text.
struct Judged<'a> {
    path: &'a Path,
    weights: &'a Weights,
    /// The last hidden states of the micro-batches that this rank scores.
    hidden: BTreeMap<usize, Vec<u8>>,
    seconds: f64,
}

impl Judge<'_> {
    fn walk<'a>(&self, cluster: &Cluster, path: &'a Path, weights: &'a Weights) -> Result<Judged<'a>> {
        let started = Instant::now();
        let Judge { device, text, room, steps } = *self;
        let hidden = device.run(Forward { cluster, weights, text, room, steps })?;
        Ok(Judged { path, weights, hidden, seconds: started.elapsed().as_secs_f64() })
    }

    /// Compares predictions with the text and with a reference's, on every rank those of its micro-batches.
    fn scores(
        &self,
        cluster: &Cluster,
        judged: &Judged<'_>,
        reference: Option<&Judged<'_>>,
    ) -> Result<Scores> {
        let started = Instant::now();
        let scored = cluster.attend(|| match reference {
            None => self.with_logits(judged, |mine| self.predictions(judged, mine, None)),
            Some(reference) => self.with_logits(judged, |mine| {
                self.with_logits(reference, |theirs| self.predictions(judged, mine, Some(theirs)))
            }),
        });
        let scored = cluster.agree(scored.map_err(|error| error.file(judged.path)))?;
        // In the order of the text, whichever rank scored what.
        let all: BTreeMap<usize, Vec<Token>> = cluster.all_gather(&scored)?.into_iter().flatten().collect();
        let tokens: Vec<Token> = all.into_values().flatten().collect();
        let mut notes = judged.weights.notes.clone();
        let vocab = judged.weights.model.vocab;
        if let Some(other) = reference.map(|of| of.weights.model.vocab).filter(|other| *other != vocab) {
            notes.push(format!(
                "its vocabulary has {vocab} tokens and the reference's {other}: the first {} are compared",
                vocab.min(other)
            ));
        }
        Ok(Scores {
            model: judged.path.display().to_string(),
            notes,
            seconds: judged.seconds + started.elapsed().as_secs_f64(),
            ..metrics::summary(&tokens, self.text.window)
        })
    }

    fn predictions(
        &self,
        judged: &Judged<'_>,
        mine: Logits<'_>,
        reference: Option<Logits<'_>>,
    ) -> Result<Vec<(usize, Vec<Token>)>> {
        let one = |&batch: &usize| {
            let tokens = metrics::predictions(self.text, batch, mine, reference)?;
            self.steps.step();
            Ok((batch, tokens))
        };
        judged.hidden.keys().map(one).collect()
    }

    fn with_logits<T>(&self, judged: &Judged<'_>, then: impl FnOnce(Logits<'_>) -> Result<T>) -> Result<T> {
        self.device.run(Head { weights: judged.weights, hidden: &judged.hidden, then })
    }
}
