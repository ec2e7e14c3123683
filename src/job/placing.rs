//! Creates the output before the first layer: its files at their final length, and the journal. Finds out which ranks
//! see these files.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use super::inventory::{Inventory, Part};
use super::options::Options;
use crate::checkpoint::{NONCE, OutTensor, OutputDir, OutputFiles, Placement, digest};
use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::record::{Fingerprint, GroupRecord, History, Journal, Line, Observed, PartId, PartRecord};

/// What rank 0 alone has of the output: the directory and the journal.
pub struct RootOutput {
    /// The directory.
    pub dir: OutputDir,
    /// The journal.
    pub journal: Journal,
    /// Parts that an earlier process finished.
    pub records: Vec<PartRecord>,
}

/// What every rank has of the output.
pub struct Placed {
    /// The places of all tensors.
    pub placement: Placement,
    /// The files, where this rank sees them.
    pub files: Option<OutputFiles>,
    /// Parts that an earlier process finished.
    pub done: HashSet<PartId>,
    /// The running maxima of unfinished layers.
    pub observed: Vec<Observed>,
    /// The run's name: no other run has it, wherever it writes.
    pub run: String,
    /// What rank 0 alone has; none on other ranks.
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
    documents: usize,
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
        let forwarded = options.plan.calibrates();
        let (output, opened, observed, nonce) =
            prepare(dir, inventory, &placement, documents, forwarded, fingerprint)?;
        let done: Vec<PartId> = output.records.iter().map(|record| record.part).collect();
        let partial = output.dir.partial.clone();
        root = Some(output);
        files = Some(opened);
        Ok((partial, nonce, done, observed))
    })?;
    let (partial, nonce, done, observed): (PathBuf, String, Vec<PartId>, Vec<Observed>) = prepared;
    if !cluster.is_root() && !options.gather && sees(&partial, &nonce) {
        files = OutputFiles::open(&partial, &placement)
            .inspect_err(|error| {
                tracing::warn!("{error}; this rank sends its tensors through rank 0, which takes longer")
            })
            .ok();
    }
    tracing::debug!(direct = files.is_some(), "output {}", partial.display());
    let run = run_of(&nonce).to_string();
    Ok(Placed { placement, files, done: done.into_iter().collect(), observed, run, root })
}

fn prepare(
    mut dir: OutputDir,
    inventory: &Inventory,
    placement: &Placement,
    documents: usize,
    forwarded: bool,
    fingerprint: &Fingerprint,
) -> Result<(RootOutput, OutputFiles, Vec<Observed>, String)> {
    let mut history = History::default();
    if dir.resumed {
        history =
            History::read(dir.place(), fingerprint, forwarded, &|line| fits(line, inventory, documents))?;
    }
    dir.create()?;
    // Before the files: a run that dies while it reserves space can be resumed.
    let begun = (!dir.resumed).then(|| Journal::create(&dir.partial, fingerprint)).transpose()?;
    let files = OutputFiles::create(&dir.partial, placement).inspect_err(|_| {
        // Nothing has been computed yet, so there is nothing that a resumed run could use.
        if !dir.resumed {
            dir.discard();
        }
    })?;
    let mut whole = vec![];
    for record in history.records {
        if is_whole(&files, inventory.part(record.part), &record)? {
            whole.push(record);
        }
    }
    history.records = whole;
    let now = std::time::SystemTime::now();
    let word = blake3::hash(format!("{}-{now:?}-{fingerprint:?}", std::process::id()).as_bytes()).to_hex();
    let before = nonce_in(&dir.partial).unwrap_or_default();
    // Hidden states are of the run whose name they carry, and of its weights.
    let goes_on = dir.resumed && !before.is_empty() && !history.changed;
    let nonce = format!("{} {word}", if goes_on { run_of(&before) } else { &word[..16] });
    let path = dir.partial.join(NONCE);
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(nonce.as_bytes())?;
        if dir.resumed { file.sync_all() } else { Ok(()) }
    });
    written.map_err(|e| Error::run(format!("can't write: {e}")).file(&path))?;
    // After the run's name: where a process dies between the two, the journal still has the old weights, and the next
    // one takes another name again.
    let journal = match begun {
        Some(journal) => journal,
        None => Journal::resume(&dir.partial, fingerprint, &history)?,
    };
    let History { records, observed, .. } = history;
    Ok((RootOutput { dir, journal, records }, files, observed, nonce))
}

/// Whether a line of the journal can be about this model and these documents.
fn fits(line: &Line, inventory: &Inventory, documents: usize) -> bool {
    let layers = inventory.layers.len();
    match line {
        Line::Finished(PartRecord { part: PartId::Layer(layer), .. }) if *layer >= layers => false,
        Line::Finished(record) => {
            let part = inventory.part(record.part);
            let named = |group: &GroupRecord| {
                let names = group.members.iter().map(|(name, _)| name);
                part.quantized.iter().any(|known| names.clone().eq(known.members.iter().map(|l| &l.name)))
            };
            record.digests.len() == part.outputs.len() && record.groups.iter().all(named)
        }
        Line::Observed(Observed { layer, documents: seen, maxima }) => {
            inventory.layers.get(*layer).is_some_and(|layer| layer.sites == maxima.len())
                && *seen <= documents
                && maxima.iter().all(|amax| amax.is_finite() && *amax >= 0.0)
        }
    }
}

/// The run's name, which becomes a part of file names.
fn run_of(nonce: &str) -> &str {
    nonce.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap_or_default()
}

/// Whether the tensors of a part in the files have the recorded digests.
fn is_whole(files: &OutputFiles, part: &Part, record: &PartRecord) -> Result<bool> {
    for (tensor, recorded) in part.outputs.iter().zip(&record.digests) {
        if digest(&files.read(&tensor.name)?) != *recorded {
            return Ok(false);
        }
    }
    Ok(true)
}

fn sees(partial: &Path, nonce: &str) -> bool {
    nonce_in(partial).is_some_and(|found| found == nonce)
}

/// The nonce of a directory, which has less than a hundred characters whatever is found in its place.
fn nonce_in(partial: &Path) -> Option<String> {
    let mut options = OpenOptions::new();
    let file: File = options
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(partial.join(NONCE))
        .ok()?;
    let mut text = String::new();
    file.take(100).read_to_string(&mut text).ok()?;
    Some(text)
}
