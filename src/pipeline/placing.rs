//! The output before the first layer: files at their final length, the journal, and which ranks see them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use super::inventory::Inventory;
use super::journal::{
    Fingerprint, History, JOURNAL, Journal, Observed, PartId, PartRecord, digest, part_digest,
};
use super::quantize::Options;
use crate::checkpoint::{OutTensor, OutputDir, OutputFiles, Placement};
use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// A file with the run's name, the same after every `--resume`, and a word that is new each time: by this other ranks
/// recognise that they see rank 0's directory and not one of the same name.
const NONCE: &str = "distq-nonce";

/// Files of the run that are not part of the output.
pub const SCRATCH: [&str; 2] = [JOURNAL, NONCE];

/// Rank 0's share: the directory and the journal.
pub struct RootOutput {
    /// The directory.
    pub dir: OutputDir,
    /// The journal.
    pub journal: Journal,
    /// What an earlier run finished.
    pub records: Vec<PartRecord>,
}

/// What every rank has of the output.
pub struct Placed {
    /// Where everything goes.
    pub placement: Placement,
    /// The files, where this rank sees them.
    pub files: Option<OutputFiles>,
    /// Parts that an earlier process finished.
    pub done: HashSet<PartId>,
    /// What unfinished layers have seen.
    pub observed: Vec<Observed>,
    /// The run's name: no other run has it, wherever it writes.
    pub run: String,
    /// On rank 0.
    pub root: Option<RootOutput>,
}

/// Creates or reopens the output; `dir` is what rank 0 has checked.
///
/// # Errors
/// Exit code 2 for paths and journals that do not fit, 5 for disks that refuse.
pub fn place(
    cluster: &Cluster,
    dir: Option<OutputDir>,
    options: &Options,
    inventory: &Inventory,
    fingerprint: &Fingerprint,
) -> Result<Placed> {
    let outputs: Vec<OutTensor> = inventory.outputs().cloned().collect();
    let metadata = Map::from_iter([
        ("format".to_string(), json!("pt")),
        ("producer".to_string(), json!(format!("distq {}", env!("CARGO_PKG_VERSION")))),
        ("method".to_string(), json!(options.plan.method.to_string())),
    ]);
    let placement = Placement::new(&outputs, options.max_shard, &metadata);

    let mut root = None;
    let mut files = None;
    let prepared = cluster.from_root(|| {
        let dir = dir.expect("rank 0 has checked the output's directory");
        let (output, opened, observed, nonce) = prepare(dir, inventory, &placement, fingerprint)?;
        let done: Vec<PartId> = output.records.iter().map(|record| record.part).collect();
        let partial = output.dir.partial.clone();
        root = Some(output);
        files = Some(opened);
        Ok((partial, nonce, done, observed))
    })?;
    let (partial, nonce, done, observed): (PathBuf, String, Vec<PartId>, Vec<Observed>) = prepared;
    if !cluster.is_root() && !options.gather && sees(&partial, &nonce) {
        // A rank that sees the directory but may not write there goes through rank 0 like one that doesn't.
        files = OutputFiles::open(&partial, &placement).ok();
    }
    tracing::debug!(direct = files.is_some(), "output {}", partial.display());
    let run = run_of(&nonce).to_string();
    Ok(Placed { placement, files, done: done.into_iter().collect(), observed, run, root })
}

fn prepare(
    dir: OutputDir,
    inventory: &Inventory,
    placement: &Placement,
    fingerprint: &Fingerprint,
) -> Result<(RootOutput, OutputFiles, Vec<Observed>, String)> {
    dir.create()?;
    // The journal comes first: a run that dies while it reserves space can be resumed.
    let (journal, History { records, observed }) = if dir.resumed {
        Journal::resume(&dir.partial, fingerprint)?
    } else {
        (Journal::create(&dir.partial, fingerprint)?, History::default())
    };
    let files = OutputFiles::create(&dir.partial, placement).inspect_err(|_| {
        // Nothing was computed yet, so nothing is worth resuming.
        if !dir.resumed {
            let _ = std::fs::remove_dir_all(&dir.partial);
        }
    })?;
    let mut whole = vec![];
    for record in records {
        if found(&files, inventory, record.part)? == record.digest {
            whole.push(record);
        }
    }
    let now = std::time::SystemTime::now();
    let word = blake3::hash(format!("{}-{now:?}-{fingerprint:?}", std::process::id()).as_bytes()).to_hex();
    let path = dir.partial.join(NONCE);
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    let run = if dir.resumed && !before.is_empty() { run_of(&before) } else { &word[..16] };
    let nonce = format!("{run} {word}");
    std::fs::write(&path, &nonce).map_err(|e| Error::run(format!("can't write: {e}")).file(&path))?;
    Ok((RootOutput { dir, journal, records: whole }, files, observed, nonce))
}

/// The run's name, which becomes a part of file names.
fn run_of(nonce: &str) -> &str {
    nonce.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap_or_default()
}

/// The digest of a part as it stands in the files.
fn found(files: &OutputFiles, inventory: &Inventory, part: PartId) -> Result<String> {
    let tensors = &inventory.part(part).outputs;
    let digests = tensors.iter().map(|tensor| Ok(digest(&files.read(&tensor.name)?)));
    Ok(part_digest(digests.collect::<Result<Vec<_>>>()?))
}

fn sees(partial: &Path, nonce: &str) -> bool {
    std::fs::read_to_string(partial.join(NONCE)).is_ok_and(|found| found == nonce)
}
