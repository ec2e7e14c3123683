//! Everything that is known before a byte of weights is read: the model, the machines, the plan.

use std::path::PathBuf;

use super::inventory::Inventory;
use crate::backend::{Device, DeviceChoice};
use crate::calibration::{MicroBatch, micro_batches};
use crate::checkpoint::{Checkpoint, Layout, Scheme};
use crate::cluster::{Cluster, Machine, MemoryKind};
use crate::error::{Error, Result};
use crate::methods::Method;
use crate::model::ModelConfig;
use crate::planner::{AssumedMachine, Node, Plan, READ_RATE, Work, plan};

/// What decides who owns which layers.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// The source directory.
    pub model: PathBuf,
    /// How the output is written.
    pub layout: Layout,
    /// What is quantized.
    pub scheme: Scheme,
    /// How codes and scales are chosen.
    pub method: Method,
    /// Patterns of modules to leave alone.
    pub ignore: Vec<String>,
    /// Layers by rank, where the user chose them.
    pub layers_per_rank: Option<Vec<usize>>,
    /// Bytes by rank that it may use, where the user chose them; one value serves all.
    pub memory_per_rank: Vec<u64>,
    /// Where to compute.
    pub device: DeviceChoice,
}

impl PlanOptions {
    /// Whether hidden states must walk through the model at all.
    pub fn calibrates(&self) -> bool {
        self.scheme.quantizes_activations() || self.method.needs_statistics()
    }
}

/// The model and the machines.
pub struct Survey {
    /// The source on this host.
    pub checkpoint: Checkpoint,
    /// The model.
    pub model: ModelConfig,
    /// What goes in and what comes out.
    pub inventory: Inventory,
    /// This rank's machine.
    pub machine: Machine,
    /// This rank's device.
    pub device: Device,
    /// The micro-batches.
    pub micro_batches: Vec<MicroBatch>,
    /// Who owns what.
    pub plan: Plan,
}

/// Opens the model on every rank, and plans on rank 0 from what the ranks report. `lengths` gives the
/// calibration documents, from the vocabulary size.
///
/// # Errors
/// Exit codes 2, 3 and 4, the same on every rank.
pub fn survey(
    cluster: &Cluster,
    options: &PlanOptions,
    lengths: impl FnOnce(&ModelConfig) -> Result<Vec<usize>>,
) -> Result<Survey> {
    // The model's path and the device are each rank's own.
    let mine = PlanOptions { model: PathBuf::new(), device: DeviceChoice::Auto, ..options.clone() };
    let asked = cluster.all_gather(&format!("{mine:?}"))?;
    cluster.agree(match asked[cluster.rank()] == asked[0] {
        true => Ok(()),
        false => Err(Error::usage("this rank was started with other options than rank 0")
            .fix("give every rank the same options; only MODEL and --device may differ")),
    })?;
    let opened = cluster.agree(cluster.attend(|| open(options)))?;
    let (checkpoint, model, inventory) = opened;
    let digests = cluster.all_gather(&checkpoint.digest())?;
    let odd = digests.iter().position(|digest| *digest != digests[0]);
    cluster.agree(match odd {
        Some(rank) if cluster.rank() == rank => {
            Err(Error::input("this rank sees another model than rank 0: config.json or the tensors differ")
                .file(&checkpoint.dir)
                .fix("give every host the same checkpoint"))
        }
        _ => Ok(()),
    })?;
    let lengths = lengths(&model)?;
    let memory = cluster.agree(chosen_memory(&options.memory_per_rank, cluster.rank(), cluster.size()))?;
    let mut machine = Machine::here(cluster.host(), cluster.local_size(), memory);
    let (local_rank, threads) = (cluster.local_rank(), machine.threads);
    let opened = cluster.attend(|| Device::open(options.device, inventory.compute, local_rank, threads));
    let device = cluster.agree(opened)?;
    if let (Some(on_card), None) = (device.memory(), memory) {
        (machine.memory, machine.kind) = (on_card, MemoryKind::Device);
    }
    // A card's host keeps files in memory that the card does not use; where both are one, nothing is left.
    let cache = device.memory().map_or(0, |on_card| {
        Machine::here(cluster.host(), cluster.local_size(), None).memory.saturating_sub(on_card)
    });
    let flops = cluster.agree(cluster.attend(|| device.probe()))?;
    let node = Node {
        rank: cluster.rank(),
        host: cluster.host().to_string(),
        memory: machine.memory,
        cache,
        flops,
        read_rate: READ_RATE,
    };
    let nodes = cluster.gather(&node)?;
    // Made once for the whole job: the smallest of what the devices like.
    let tokens = cluster.all_gather(&device.micro_batch_tokens())?.into_iter().min().unwrap_or(1);
    let batches = micro_batches(&lengths, tokens);
    let planned = cluster.from_root(|| {
        let work = work(&lengths, &batches);
        let nodes = nodes.as_deref().unwrap_or_default();
        plan(nodes, &inventory.cost(&model, options.method), &work, options.layers_per_rank.as_deref())
    })?;
    Ok(Survey { checkpoint, model, inventory, machine, device, micro_batches: batches, plan: planned })
}

/// Plans for machines that are not there, on this one alone.
///
/// # Errors
/// Exit codes 2, 3 and 4.
pub fn foresee(
    options: &PlanOptions,
    machines: &[AssumedMachine],
    lengths: impl FnOnce(&ModelConfig) -> Result<Vec<usize>>,
) -> Result<Plan> {
    let (_, model, inventory) = open(options)?;
    let lengths = lengths(&model)?;
    let tokens = machines.iter().map(AssumedMachine::micro_batch_tokens).min().unwrap_or(1);
    let work = work(&lengths, &micro_batches(&lengths, tokens));
    let nodes = (machines.iter().enumerate())
        .map(|(rank, machine)| {
            let memory = chosen_memory(&options.memory_per_rank, rank, machines.len())?;
            Ok(machine.node(rank, memory))
        })
        .collect::<Result<Vec<_>>>()?;
    plan(&nodes, &inventory.cost(&model, options.method), &work, options.layers_per_rank.as_deref())
}

fn work(lengths: &[usize], batches: &[MicroBatch]) -> Work {
    Work {
        tokens: lengths.iter().sum::<usize>() as u64,
        micro_batches: batches.len(),
        micro_batch_tokens: batches
            .iter()
            .map(|batch| lengths[batch.samples.clone()].iter().sum::<usize>() as u64)
            .max()
            .unwrap_or(0),
        calibrates: !lengths.is_empty(),
    }
}

fn open(options: &PlanOptions) -> Result<(Checkpoint, ModelConfig, Inventory)> {
    let checkpoint = Checkpoint::open(&options.model)?;
    let model = ModelConfig::parse(&checkpoint.config)?;
    let inventory = Inventory::new(&checkpoint, &model, options.layout, options.scheme, &options.ignore)?;
    Ok((checkpoint, model, inventory))
}

fn chosen_memory(chosen: &[u64], rank: usize, ranks: usize) -> Result<Option<u64>> {
    match chosen {
        [] => Ok(None),
        [all] => Ok(Some(*all)),
        each if each.len() == ranks => Ok(Some(each[rank])),
        each => {
            Err(Error::plan(format!("--memory-per-rank names {} ranks, the job has {ranks}", each.len()))
                .fix("give one value for all ranks or one for each"))
        }
    }
}
