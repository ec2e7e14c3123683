//! The whole of `distq quantize`: survey, calibration data, output files, the walk, verification, publication.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use crate::backend::{Device, OnBackend, Solver};
use crate::calibration::{Calibration, Sampling, Summary};
use crate::checkpoint::{
    OutputDir, OutputFiles, Placement, copy_side_files, quantization_files, write_digests,
};
use crate::cluster::{Cluster, Machine};
use crate::error::{Error, Result};
use crate::finish::{Outbox, Prover, RootInbox};
use crate::job::{Inventory, Job, Options, Placed, RootOutput, Survey, place, survey};
use crate::model::Model;
use crate::planner::{Mode, Plan};
use crate::progress::{Phases, Progress, Timeline};
use crate::record::{Fingerprint, PartRecord};
use crate::report::{self, RankReport, RunReport};
use crate::schedule::{Kept, Route, Routes, StageFiles, routes};
use crate::states::{self, States};
use crate::threads;
use crate::verify::Proof;
use crate::walk::Stage;

/// What a rank knows and has opened before the first layer.
struct Prepared {
    job: Job,
    machine: Machine,
    device: Device,
    plan: Plan,
    /// The places of all output tensors.
    placement: Placement,
    /// The output's files, where this rank sees them.
    files: Option<OutputFiles>,
    /// The output's directory and the journal, on rank 0.
    root: Option<RootOutput>,
    /// The directory for hidden states, where there is one.
    states: Option<States>,
    /// By stage.
    routes: Vec<Routes>,
    /// What was read of the calibration data.
    summary: Summary,
}

/// What rank 0 has of the output besides its files.
struct Output<'a> {
    dir: OutputDir,
    inbox: RootInbox<'a>,
    /// Names of the files that were made beside the weights, config.json among them.
    made: Vec<String>,
    /// Names of the files that were copied from the source.
    side_files: Vec<String>,
}

/// Runs the job on this rank.
///
/// # Errors
/// Any of the documented exit codes; the output directory appears only on success.
pub fn quantize(cluster: &Cluster, options: &Options) -> Result<()> {
    let started = Instant::now();
    cluster.can_be_resumed();
    let mut ready = prepare(cluster, options)?;
    let prepared = started.elapsed().as_secs_f64();
    let root = ready.root.take();
    let Prepared { job, machine, device, plan, placement, files, states, routes, summary, .. } = &ready;
    let mut output = begin_output(cluster, options, &ready, root)?;

    // All ranks begin together, so that their timelines can be laid side by side.
    cluster.barrier()?;
    let timeline = Timeline::begin();
    let position = plan.position(cluster.rank());
    let stage = &plan.stages[position];
    let phases = device.run(Walk {
        cluster,
        job,
        slice: stage.layers.clone(),
        mode: stage.mode,
        group: stage.group,
        routes: &routes[position],
        states: states.as_ref(),
        timeline: &timeline,
        next: plan.stages.get(position + 1).map(|stage| stage.rank),
        files: files.as_ref(),
        inbox: output.as_mut().map(|output| &mut output.inbox),
    })?;
    if let Some(output) = &output {
        output.inbox.progress.finish();
    }
    let walked = started.elapsed().as_secs_f64();

    sync(cluster, files.as_ref())?;
    let mapped = job.checkpoint.bytes_mapped();
    let rank = RankReport::new(cluster, machine, device, phases, mapped, timeline.finish());
    let ranks = cluster.gather(&rank)?;
    let library = cluster.library();
    cluster.from_root(|| {
        let Output { dir, inbox, made, side_files } = output.expect("rank 0 has the output");
        let records = in_model_order(inbox.records);
        let others = [made, side_files.clone()].concat();
        write_digests(&dir.partial, placement, &digests_of(&records, &job.inventory), &others)?;
        let proof = prove(&dir, job, inbox.prover, files.as_ref())?;
        let verified = started.elapsed().as_secs_f64();
        let mut report =
            RunReport::new(options, library, plan.clone(), ranks.unwrap_or_default(), records, proof);
        report.calibration = options.plan.calibrates().then(|| summary.clone());
        report.source_bytes = job.checkpoint.total_bytes();
        report.output_bytes = placement.total_bytes();
        report.side_files = side_files;
        report.left_behind = job.checkpoint.left_behind();
        report.seconds.prepare = prepared;
        report.seconds.walk = walked - prepared;
        report.seconds.prove = verified - walked;
        finish(options, report, &dir, started)
    })?;
    if let Some(Err(error)) = states.as_ref().map(States::clear) {
        tracing::warn!("{error}");
    }
    Ok(())
}

/// All that comes before the first layer: the model, the calibration data, the plan, and the output's files.
fn prepare(cluster: &Cluster, options: &Options) -> Result<Prepared> {
    let dir = check_places(cluster, options)?;
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
        print(&surveyed.plan);
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
    let (states, routes) = plan_routes(cluster, &job, &plan, options.plan.work_dir.as_deref(), &run)?;
    let summary = calibration.summary;
    Ok(Prepared { job, machine, device, plan, placement, files, root, states, routes, summary })
}

/// Checks that the output, the reports and hidden states can be written where they should be, before anything that
/// takes long. Rank 0 gets the output's directory.
fn check_places(cluster: &Cluster, options: &Options) -> Result<Option<OutputDir>> {
    let mut dir = None;
    cluster.from_root(|| {
        let checked = OutputDir::check(&options.plan.model, &options.out, options.existing)?;
        options.reports.iter().try_for_each(|path| report::try_place(path, &checked.out))?;
        dir = Some(checked);
        Ok(())
    })?;
    cluster.agree(options.plan.work_dir.as_deref().map_or(Ok(()), states::check))?;
    Ok(dir)
}

/// On rank 0, writes the files beside the weights, which are known before the weights and which the proof reads, and
/// prepares to handle the messages of other ranks. Where rank 0 computes on a GPU, its CPU verifies finished layers
/// meanwhile.
fn begin_output<'a>(
    cluster: &Cluster,
    options: &Options,
    ready: &'a Prepared,
    root: Option<RootOutput>,
) -> Result<Option<Output<'a>>> {
    let Prepared { job, device, plan, placement, routes, .. } = ready;
    let mut described = (vec![], vec![]);
    let mut prover = None;
    let local_ranks = cluster.local_ranks().iter().copied().collect();
    cluster.from_root(|| {
        let partial = &root.as_ref().expect("rank 0 has the output").dir.partial;
        described = write_description(job, options, partial, placement.index.as_ref())?;
        if matches!(device, Device::Cuda(_)) {
            prover = Some(Prover::start(Proof::begin(partial, Some(&job.checkpoint.dir))?, local_ranks)?);
        }
        Ok(())
    })?;
    let (made, side_files) = described;
    Ok(root.map(|RootOutput { dir, journal, records }| {
        let steps = routes.iter().map(Routes::passes).sum::<usize>() as u64;
        let progress = Progress::new(steps, plan, options.quiet);
        let files = ready.files.as_ref().expect("rank 0 sees its own output");
        Output { dir, inbox: RootInbox { files, journal, progress, records, prover }, made, side_files }
    }))
}

/// Waits until what ranks other than 0 wrote is on the disk: before that, rank 0 may not see it. Its own files it can
/// read back at once; they are synced while it does.
fn sync(cluster: &Cluster, files: Option<&OutputFiles>) -> Result<()> {
    let is_root = cluster.is_root();
    let synced = cluster.attend(|| match files {
        Some(files) if !is_root => files.sync(),
        _ => Ok(()),
    });
    cluster.agree(synced)
}

/// Verifies the output, going on with what `prover` has verified already, while the files reach the disk.
fn prove(
    dir: &OutputDir,
    job: &Job,
    prover: Option<Prover>,
    files: Option<&OutputFiles>,
) -> Result<crate::verify::Report> {
    let proof = match prover {
        Some(prover) => prover.end(),
        None => Proof::begin(&dir.partial, Some(&job.checkpoint.dir))?,
    };
    std::thread::scope(|scope| {
        let sync = |files| threads::scoped(scope, "sync", move || OutputFiles::sync(files));
        let syncing = files.map(sync).transpose()?;
        let proof = proof.finish();
        syncing.map_or(Ok(()), |syncing| threads::value(syncing.join())).and(proof)
    })
}

/// Opens the directory for hidden states, where there is one, and finds the routes of every stage, given the hidden
/// states that an earlier process kept.
fn plan_routes(
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
    let stages: Vec<StageFiles> = (plan.stages.iter())
        .map(|stage| StageFiles {
            layers: stage.layers.clone(),
            kept: std::mem::take(&mut found[stage.rank]),
        })
        .collect();
    let documents: Vec<Range<usize>> = job.micro_batches.iter().map(|mb| mb.samples.clone()).collect();
    let needs = |layer: usize, micro_batch: usize| job.needs(layer, micro_batch);
    let routes = routes(&stages, &documents, &needs, job.method.needs_statistics());
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

/// Publishes the output if it has passed verification, and writes and prints the report.
fn finish(options: &Options, mut report: RunReport, dir: &OutputDir, started: Instant) -> Result<()> {
    let proof = &report.verification;
    if !proof.passed() {
        print(proof);
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
        print(&report);
    }
    Ok(())
}

/// Prints a result. Where standard output can't be written to, that is a warning: the output itself is not affected.
fn print(what: &impl std::fmt::Display) {
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

/// One rank's part of the walk: a worker thread computes, and the main thread sends and receives messages.
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
    inbox: Option<&'r mut RootInbox<'a>>,
}

impl OnBackend for Walk<'_, '_> {
    type Output = Result<Phases>;

    fn run<B: Solver>(self, backend: &B) -> Result<Phases> {
        let Walk { cluster, job, slice, mode, group, routes, states, timeline, next, files, mut inbox } =
            self;
        cluster.work(
            |to_main, incoming| {
                let outbox = Outbox::new(to_main, next);
                Stage { backend, job, slice, mode, group, routes, states, timeline, incoming, outbox }
                    .run(files)
            },
            |peer, frame| match &mut inbox {
                Some(inbox) => inbox.handle(peer, frame),
                None => Err(Error::run(format!("rank {peer} sent a message that is not for this rank"))),
            },
        )
    }
}
