//! The whole job: survey, calibration data, output, stages, proof, publication.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use crate::backend::{Device, OnBackend, Solver};
use crate::calibration::{Calibration, Sampling};
use crate::checkpoint::{OutputDir, OutputFiles, copy_side_files, quantization_files, write_digests};
use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::finish::{Outbox, Prover, Root};
use crate::job::{Inventory, Job, Options, Placed, Survey, place, survey};
use crate::model::Model;
use crate::planner::{Mode, Plan};
use crate::progress::{Phases, Progress, Timeline};
use crate::record::{Fingerprint, PartRecord};
use crate::report::{self, RankReport, RunReport};
use crate::schedule::{Kept, Route, Routes, Station, routes};
use crate::states::{self, States};
use crate::threads;
use crate::verify::Proof;
use crate::walk::Stage;

/// Runs the job on this rank.
///
/// # Errors
/// Any of the documented exit codes; the output directory appears only on success.
pub fn quantize(cluster: &Cluster, options: &Options) -> Result<()> {
    let started = Instant::now();
    cluster.can_be_resumed();
    // First of all: nobody wants to learn after an hour that the output can't be where it should.
    let mut dir = None;
    cluster.from_root(|| {
        let checked = OutputDir::check(&options.plan.model, &options.out, options.existing)?;
        options.reports.iter().try_for_each(|path| report::try_place(path, &checked.out))?;
        dir = Some(checked);
        Ok(())
    })?;
    cluster.agree(options.plan.work_dir.as_deref().map_or(Ok(()), states::check))?;
    let mut calibration = Calibration::default();
    let surveyed = survey(cluster, &options.plan, |model| {
        calibration = calibrate(cluster, options, model)?;
        Ok(calibration.lengths.clone())
    })?;
    let fingerprint = fingerprint(options, &surveyed, &calibration);
    let Placed { placement, files, done, observed, run, root } =
        place(cluster, dir, options, &surveyed.inventory, calibration.lengths.len(), &fingerprint)?;
    if cluster.is_root() && !options.quiet {
        surveyed.notes.iter().for_each(|note| tracing::warn!("{note}"));
        tell(&surveyed.plan);
        calibration.summary.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    }
    let Survey { checkpoint, model, inventory, machine, device, micro_batches, plan, .. } = surveyed;
    let job = Job {
        model,
        checkpoint,
        inventory,
        layout: options.plan.layout,
        quantized_inputs: options.plan.scheme.quantizes_activations(),
        method: options.plan.method,
        sampling: Sampling::of(&calibration.lengths, options.plan.method.guard),
        lengths: calibration.lengths,
        ids: calibration.ids,
        micro_batches,
        done,
        observed: observed.into_iter().map(|observed| (observed.layer, observed)).collect(),
        calibrates: options.plan.calibrates(),
    };
    let (states, routes) = find_ways(cluster, &job, &plan, options.plan.work_dir.as_deref(), &run)?;
    let prepared = started.elapsed().as_secs_f64();

    // The descriptions are known before the weights, and the proof reads them.
    let mut described = vec![];
    let mut side_files = vec![];
    let mut prover = None;
    let local_ranks = cluster.local_ranks().iter().copied().collect();
    cluster.from_root(|| {
        let partial = &root.as_ref().expect("rank 0 has the output").dir.partial;
        (described, side_files) = write_description(&job, options, partial, placement.index.as_ref())?;
        if matches!(device, Device::Cuda(_)) {
            prover = Some(Prover::start(Proof::begin(partial, Some(&job.checkpoint.dir))?, local_ranks)?);
        }
        Ok(())
    })?;
    let mut ear = root.map(|root| {
        let steps = routes.iter().map(Routes::passes).sum::<usize>() as u64;
        let progress = Progress::new(steps, &plan, options.quiet);
        let files = files.as_ref().expect("rank 0 sees its own output");
        (root.dir, Root { files, journal: root.journal, progress, records: root.records, prover })
    });
    let stage = plan.stage(cluster.rank());
    let next = plan.stages.get(plan.position(cluster.rank()) + 1).map(|stage| stage.rank);
    // All ranks begin together, so that their timelines can be laid side by side.
    cluster.barrier()?;
    let timeline = Timeline::begin();
    let phases = device.run(Walk {
        cluster,
        job: &job,
        slice: stage.layers.clone(),
        mode: stage.mode,
        group: stage.group,
        routes: &routes[plan.position(cluster.rank())],
        states: states.as_ref(),
        timeline: &timeline,
        next,
        files: files.as_ref(),
        root: ear.as_mut().map(|(_, root)| root),
    })?;
    if let Some((_, root)) = &ear {
        root.progress.finish();
    }
    let walked = started.elapsed().as_secs_f64();

    // Rank 0 reads what others wrote only when it has left their hosts. Its own it can read back at once; they reach
    // the disk while it does, or at the latest when the directory is published.
    let is_root = cluster.is_root();
    let synced = cluster.attend(|| match &files {
        Some(files) if !is_root => files.sync(),
        _ => Ok(()),
    });
    cluster.agree(synced)?;
    let rank =
        RankReport::new(cluster, &machine, &device, phases, job.checkpoint.bytes_mapped(), timeline.finish());
    let ranks = cluster.gather(&rank)?;
    let library = cluster.library();
    cluster.from_root(|| {
        let (dir, root) = ear.expect("rank 0 has the output");
        let records = in_model_order(root.records);
        let others = [described, side_files.clone()].concat();
        write_digests(&dir.partial, &placement, &digests_of(&records, &job.inventory), &others)?;
        let proof = match root.prover {
            Some(prover) => prover.end(),
            None => Proof::begin(&dir.partial, Some(&job.checkpoint.dir))?,
        };
        let proof = std::thread::scope(|scope| {
            let sync = |files| threads::scoped(scope, "sync", move || OutputFiles::sync(files));
            let syncing = files.as_ref().map(sync).transpose()?;
            let proof = proof.finish();
            syncing.map_or(Ok(()), |syncing| threads::value(syncing.join())).and(proof)
        })?;
        let verified = started.elapsed().as_secs_f64();
        let mut report = RunReport::new(options, library, plan, ranks.unwrap_or_default(), records, proof);
        report.calibration = options.plan.calibrates().then_some(calibration.summary);
        report.source_bytes = job.checkpoint.total_bytes();
        report.output_bytes = placement.total_bytes();
        report.side_files = side_files;
        report.left_behind = job.checkpoint.left_behind();
        report.seconds.prepare = prepared;
        report.seconds.walk = walked - prepared;
        report.seconds.prove = verified - walked;
        finish(options, report, &dir, started)
    })?;
    if let Some(Err(error)) = states.map(|states| states.clear()) {
        tracing::warn!("{error}");
    }
    Ok(())
}

/// What this rank keeps and has kept of hidden states, and every stage's routes.
fn find_ways(
    cluster: &Cluster,
    job: &Job,
    plan: &Plan,
    dir: Option<&Path>,
    run: &str,
) -> Result<(Option<States>, Vec<Routes>)> {
    let slice = plan.stage(cluster.rank()).layers.clone();
    let open = |dir| States::open(dir, run, job.inventory.compute, job.model.hidden, &job.lengths);
    let states = cluster.agree(dir.map(open).transpose())?;
    let found = cluster.agree(states.as_ref().map_or(Ok(vec![]), |states| states.find(&slice)))?;
    let mut found = cluster.all_gather(&found)?;
    let stations: Vec<Station> = (plan.stages.iter())
        .map(|stage| Station { layers: stage.layers.clone(), kept: std::mem::take(&mut found[stage.rank]) })
        .collect();
    let documents: Vec<Range<usize>> = job.micro_batches.iter().map(|mb| mb.samples.clone()).collect();
    let needs = |layer: usize, micro_batch: usize| job.needs(layer, micro_batch);
    let routes = routes(&stations, &documents, &needs, job.method.needs_statistics());
    let mine = &routes[plan.position(cluster.rank())];
    let wanted = |kept: &Kept| {
        let used = |(route, documents): (&Option<Route>, &Range<usize>)| {
            route.as_ref().is_some_and(|route| route.kept && kept.holds(route.enter, documents))
        };
        [&mine.forward, &mine.own].into_iter().any(|sweep| sweep.iter().zip(&documents).any(used))
    };
    cluster.agree(states.as_ref().map_or(Ok(()), |states| states.retain(&slice, wanted)))?;
    Ok((states, routes))
}

/// Publishes what has been proven, and says how it went.
fn finish(options: &Options, mut report: RunReport, dir: &OutputDir, started: Instant) -> Result<()> {
    let proof = &report.verification;
    if !proof.passed() {
        tell(proof);
        return Err(Error::verify(format!("verification failed: {}", proof.failed_rules().join(", ")))
            .file(&dir.partial)
            .fix("report this with the table above: the output was not published"));
    }
    dir.publish()?;
    report.seconds.total = started.elapsed().as_secs_f64();
    for path in &options.reports {
        report.write(path)?;
    }
    if !options.quiet {
        tell(&report);
    }
    Ok(())
}

/// Prints something. The output is worth more than what is said of it, so a place that takes no text is only a warning.
fn tell(what: &impl std::fmt::Display) {
    if let Err(error) = report::print(what) {
        tracing::warn!("{error}");
    }
}

fn calibrate(cluster: &Cluster, options: &Options, model: &Model) -> Result<Calibration> {
    if !options.plan.calibrates() {
        return Ok(Calibration::default());
    }
    // Only rank 0 needs the data and the tokenizer.
    cluster.from_root(|| Calibration::load(&options.calib, &options.plan.model, model.vocab))
}

fn fingerprint(options: &Options, survey: &Survey, calibration: &Calibration) -> Fingerprint {
    Fingerprint {
        version: env!("CARGO_PKG_VERSION").to_string(),
        model: survey.checkpoint.digest(),
        weights: survey.weights.clone(),
        data: calibration.summary.digest.clone(),
        options: format!(
            "layout {}, scheme {}, method {}, shards of {}, leaving {}",
            options.plan.layout,
            options.plan.scheme,
            options.plan.method,
            options.max_shard,
            survey.inventory.ignored.join(" "),
        ),
    }
}

fn in_model_order(mut records: Vec<PartRecord>) -> Vec<PartRecord> {
    records.sort_by_key(|record| record.part);
    records
}

/// The digests of the tensors of these parts, by name.
fn digests_of(records: &[PartRecord], inventory: &Inventory) -> HashMap<String, String> {
    let of = |record: &PartRecord| {
        let names = inventory.part(record.part).outputs.iter().map(|tensor| tensor.name.clone());
        names.zip(record.digests.clone()).collect::<Vec<_>>()
    };
    records.iter().flat_map(of).collect()
}

/// config.json and what else stands beside the weights; returns the names of the files that were made, and of those
/// carried over.
fn write_description(
    job: &Job,
    options: &Options,
    dir: &std::path::Path,
    index: Option<&serde_json::Value>,
) -> Result<(Vec<String>, Vec<String>)> {
    let mut made = vec![];
    let mut write = |name: &str, value: &serde_json::Value| {
        made.push(name.to_string());
        let path = dir.join(name);
        let text = serde_json::to_string_pretty(value).expect("JSON values serialize") + "\n";
        std::fs::write(&path, text).map_err(|e| {
            Error::run(format!("can't write: {e}")).file(&path).fix("check the disk, then use --resume")
        })
    };
    let (config, separate) =
        quantization_files(&job.checkpoint.config, job.layout, options.plan.scheme, &job.inventory.ignored);
    write("config.json", &config)?;
    if let Some(separate) = separate {
        write("hf_quant_config.json", &separate)?;
    }
    if let Some(index) = index {
        write("model.safetensors.index.json", index)?;
    }
    let carried = copy_side_files(&job.checkpoint.dir, dir)?;
    Ok((made, carried))
}

/// One rank's part of the walk: a worker computes, the main thread moves messages.
struct Walk<'a, 'r> {
    cluster: &'a Cluster,
    job: &'a Job,
    slice: std::ops::Range<usize>,
    mode: Mode,
    group: usize,
    routes: &'a Routes,
    states: Option<&'a States>,
    timeline: &'r Timeline,
    next: Option<usize>,
    files: Option<&'a OutputFiles>,
    root: Option<&'r mut Root<'a>>,
}

impl OnBackend for Walk<'_, '_> {
    type Output = Result<Phases>;

    fn run<B: Solver>(self, backend: &B) -> Result<Phases> {
        let Walk { cluster, job, slice, mode, group, routes, states, timeline, next, files, mut root } = self;
        cluster.work(
            |to_main, incoming| {
                let outbox = Outbox::new(to_main, next);
                Stage { backend, job, slice, mode, group, routes, states, timeline, incoming, outbox }
                    .run(files)
            },
            |peer, frame| match &mut root {
                Some(root) => root.take(peer, frame),
                None => Err(Error::run(format!("rank {peer} sent a message that is not for this rank"))),
            },
        )
    }
}
