//! What is found out before the weights are read: the model, the machines and their rates, and the plan.

use super::inventory::Inventory;
use super::options::PlanOptions;
use super::probe::{Probe, Rates};
use crate::backend::{Compute, Device};
use crate::calibration::{MicroBatch, micro_batches, pairs};
use crate::checkpoint::Checkpoint;
use crate::cluster::{Cluster, Machine};
use crate::devices::open_device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::planner::{ASSUMED_LINK, AssumedMachine, Node, Plan, Work, plan};
use crate::units::binary;

/// The model and the machines.
pub struct Survey {
    /// The source on this host.
    pub checkpoint: Checkpoint,
    /// The model.
    pub model: Model,
    /// The tensors of the source and of the output.
    pub inventory: Inventory,
    /// Digest of a sample of the weights, by part of the model.
    pub weights: Vec<String>,
    /// This rank's machine.
    pub machine: Machine,
    /// This rank's device.
    pub device: Device,
    /// The micro-batches.
    pub micro_batches: Vec<MicroBatch>,
    /// Which rank has which layers.
    pub plan: Plan,
    /// What a user should know of how the source was read.
    pub notes: Vec<String>,
}

/// Opens the model on every rank, and plans on rank 0 from what the ranks report. `lengths` gives the tokens of each
/// calibration document, from the model's vocabulary size.
///
/// # Errors
/// Exit codes 2, 3 and 4, the same on every rank.
pub fn survey(
    cluster: &Cluster,
    options: &PlanOptions,
    lengths: impl FnOnce(&Model) -> Result<Vec<usize>>,
) -> Result<Survey> {
    let (checkpoint, model, inventory, weights) = open_everywhere(cluster, options)?;
    let oddities = cluster.from_root(|| model.oddities(&checkpoint))?;
    let notes = checkpoint.notes.iter().cloned().chain(oddities).collect();
    tracing::debug!("the model is open");
    let lengths = lengths(&model)?;
    tracing::debug!("the calibration data is read");
    let (machine, device, host_memory) = open_machine(cluster, options, inventory.compute)?;
    // Ranks that share a disk measure it together, as they will use it together.
    let read_rate = cluster.agree(cluster.attend(|| checkpoint.read_rate()))?;
    tracing::debug!("the source's files are read at {}/s", binary(read_rate as u64));
    let kind = Kind {
        host: cluster.host_id(),
        device: format!("{} × {}", machine.threads, device.name()),
        micro_batch_tokens: device.micro_batch_tokens(),
    };
    let kinds = cluster.all_gather(&kind)?;
    let probe = Probe {
        model: &model,
        method: options.method,
        quantized_inputs: options.scheme.quantizes_activations(),
        lengths: &lengths,
        tokens: device.micro_batch_tokens() / 2,
    };
    let node = measure(cluster, &machine, &device, probe, read_rate, &kinds)?;
    let nodes = cluster.gather(&Node { host_memory, ..node })?;
    // Micro-batches are made once for the whole job, of the smallest size that any rank's device prefers.
    let tokens = kinds.iter().map(|kind| kind.micro_batch_tokens).min().unwrap_or(1);
    let micro_batches = micro_batches(&lengths, tokens);
    let plan = cluster.from_root(|| {
        let work = work(options, &model, &lengths, &micro_batches);
        plan(
            &nodes.unwrap_or_default(),
            &inventory.cost(&model, options.method),
            &work,
            options.layers_per_rank.as_deref(),
        )
    })?;
    Ok(Survey { checkpoint, model, inventory, weights, machine, device, micro_batches, plan, notes })
}

/// Opens the model on every rank, and makes sure that all see the same one. The last value has the digest of a sample
/// of the weights for each part of the model.
fn open_everywhere(
    cluster: &Cluster,
    options: &PlanOptions,
) -> Result<(Checkpoint, Model, Inventory, Vec<String>)> {
    let (checkpoint, model, inventory) = cluster.agree(cluster.attend(|| open(options)))?;
    let weights = cluster.agree(cluster.attend(|| checkpoint.sample(inventory.sources())))?;
    let whole = blake3::hash(weights.concat().as_bytes()).to_hex();
    let digests = cluster.all_gather(&(checkpoint.digest(), whole.to_string()))?;
    let odd = digests.iter().position(|digest| *digest != digests[0]);
    cluster.agree(match odd {
        Some(rank) if cluster.rank() == rank => {
            Err(Error::input("this rank sees another model than rank 0: config.json or the weights differ")
                .file(&checkpoint.dir)
                .fix("give every host the same checkpoint"))
        }
        _ => Ok(()),
    })?;
    Ok((checkpoint, model, inventory, weights))
}

/// This rank's machine and its open device. The last value is the memory of the host in bytes where the device is a
/// card with memory of its own, and 0 otherwise: such a host keeps files and hidden states in memory that the card does
/// not use.
fn open_machine(
    cluster: &Cluster,
    options: &PlanOptions,
    compute: Compute,
) -> Result<(Machine, Device, u64)> {
    let memory = cluster.agree(by_rank(
        "--memory-per-rank",
        &options.memory_per_rank,
        cluster.rank(),
        cluster.size(),
    ))?;
    let mut machine = cluster.machine(memory);
    let device = open_device(cluster, options.device, compute, machine.threads)?;
    let host_memory = match device.memory() {
        Some((_, false)) => cluster.machine(None).memory,
        _ => 0,
    };
    if let (Some((free, integrated)), None) = (device.memory(), memory) {
        machine.computes_on(free, integrated);
    }
    tracing::debug!(
        "computes with {} on {} threads, and may use {}",
        device.name(),
        machine.threads,
        binary(machine.memory)
    );
    Ok((machine, device, host_memory))
}

/// Measures this rank's rates. Ranks of one kind are equal machines, and what they measure differs by noise alone,
/// which the plan should not show: they get the mean of their rates, and all ranks of a host the mean of its reading
/// rates. Where equal ranks outnumber the cores, only as many of them measure as the cores serve at once.
fn measure(
    cluster: &Cluster,
    machine: &Machine,
    device: &Device,
    probe: Probe,
    read_rate: f64,
    kinds: &[Kind],
) -> Result<Node> {
    let kind = &kinds[cluster.rank()];
    let (company, crowding) =
        if device.memory().is_some() { (1, 1.0) } else { (cluster.local_size(), machine.crowding) };
    let before = kinds[..cluster.rank()].iter().filter(|other| *other == kind).count();
    let measures = (before as f64) < company as f64 / crowding;
    let rates = cluster.agree(measures.then(|| cluster.attend(|| device.run(probe))).transpose())?;
    if let Some(rates) = &rates {
        tracing::debug!("computes at {:.3e} FLOP/s, {:.3e} with statistics", rates.forward, rates.statistics);
    }
    let measured = cluster.all_gather(&(read_rate, rates))?;
    let equal = kinds.iter().zip(&measured).filter(|(other, _)| *other == kind);
    let rates: Vec<Rates> = equal.filter_map(|(_, (_, rates))| *rates).collect();
    let near = kinds.iter().zip(&measured).filter(|(other, _)| other.host == kind.host);
    Ok(Node {
        rank: cluster.rank(),
        memory: machine.memory,
        host_memory: 0,
        flops: mean(rates.iter().map(|rates| rates.forward)),
        statistics_flops: mean(rates.iter().map(|rates| rates.statistics)),
        solving_flops: mean(rates.iter().map(|rates| rates.solving)),
        read_rate: mean(near.map(|(_, (read_rate, _))| *read_rate)),
        link: cluster.link_rate()?,
        company,
        crowding,
        host: cluster.host().to_string(),
        host_id: kind.host,
    })
}

/// Ranks of the same kind have the same rates.
#[derive(PartialEq, serde::Serialize, serde::Deserialize)]
struct Kind {
    /// The host's number.
    host: usize,
    /// The number of threads and the device's name.
    device: String,
    /// Tokens of a micro-batch that the device prefers.
    micro_batch_tokens: usize,
}

fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().sum::<f64>() / values.count() as f64
}

/// Plans for machines that are described and need not exist, on this machine alone. `links` are the rates of their
/// links in bytes/s, one for all or one for each. The model's config.json is enough: weights need not exist either.
///
/// # Errors
/// Exit codes 2, 3 and 4.
pub fn foresee(
    options: &PlanOptions,
    machines: &[AssumedMachine],
    links: &[f64],
    lengths: impl FnOnce(&Model) -> Result<Vec<usize>>,
) -> Result<Plan> {
    let (_, model, inventory) = open_or_describe(options)?;
    let lengths = lengths(&model)?;
    let tokens = machines.iter().map(AssumedMachine::micro_batch_tokens).min().unwrap_or(1);
    let work = work(options, &model, &lengths, &micro_batches(&lengths, tokens));
    let nodes = (machines.iter().enumerate())
        .map(|(rank, machine)| {
            let memory = by_rank("--memory-per-rank", &options.memory_per_rank, rank, machines.len())?;
            let link = by_rank("--link", links, rank, machines.len())?;
            Ok(machine.node(rank, memory, link.unwrap_or(ASSUMED_LINK)))
        })
        .collect::<Result<Vec<_>>>()?;
    plan(&nodes, &inventory.cost(&model, options.method), &work, options.layers_per_rank.as_deref())
}

fn work(options: &PlanOptions, model: &Model, lengths: &[usize], batches: &[MicroBatch]) -> Work {
    Work {
        documents: lengths.len(),
        pairs: model.windows().into_iter().map(|window| (window, pairs(window, lengths))).collect(),
        tokens: lengths.iter().sum::<usize>() as u64,
        micro_batches: batches.len(),
        micro_batch_tokens: batches
            .iter()
            .map(|batch| lengths[batch.samples.clone()].iter().sum::<usize>() as u64)
            .max()
            .unwrap_or(0),
        calibrates: !lengths.is_empty(),
        spills: options.work_dir.is_some(),
    }
}

fn open(options: &PlanOptions) -> Result<(Checkpoint, Model, Inventory)> {
    let checkpoint = Checkpoint::open(&options.model)?;
    let model = Model::of(&checkpoint)?;
    listed(checkpoint, model, options)
}

fn open_or_describe(options: &PlanOptions) -> Result<(Checkpoint, Model, Inventory)> {
    let (config, has_weights) = Checkpoint::config(&options.model)?;
    if has_weights {
        return open(options);
    }
    let model =
        Model::parse(&config, &|_| false).map_err(|error| error.file(options.model.join("config.json")))?;
    let shapes = model.tensors().map(|spec| (spec.name, spec.shape)).collect();
    listed(Checkpoint::described(&options.model, config, shapes), model, options)
}

fn listed(
    checkpoint: Checkpoint,
    model: Model,
    options: &PlanOptions,
) -> Result<(Checkpoint, Model, Inventory)> {
    let inventory = Inventory::new(&checkpoint, &model, options.layout, options.scheme, &options.ignore)?;
    Ok((checkpoint, model, inventory))
}

/// The value for one rank of an option that takes one value for all ranks or one for each.
fn by_rank<T: Copy>(option: &str, chosen: &[T], rank: usize, ranks: usize) -> Result<Option<T>> {
    match chosen {
        [] => Ok(None),
        [all] => Ok(Some(*all)),
        each if each.len() == ranks => Ok(Some(each[rank])),
        each => {
            Err(Error::plan(format!("{option} has values for {} ranks, and the job has {ranks}", each.len()))
                .fix("give one value for all ranks or one for each"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DeviceChoice;
    use crate::checkpoint::{Layout, Scheme};
    use crate::planner::Mode;
    use crate::units::parse_bytes;

    /// A model of 123e9 parameters on two machines of 128 GB and a card, in rank order.
    fn planned(method: &str, card: &str, length: usize) -> Result<Plan> {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 12288,
            "intermediate_size": 28672, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
            "num_hidden_layers": 88, "vocab_size": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let options = PlanOptions {
            model: dir.path().into(),
            layout: Layout::CompressedTensors,
            scheme: Scheme::Nvfp4,
            method: method.parse().unwrap(),
            ignore: vec![],
            layers_per_rank: Some(vec![41, 41, 6]),
            memory_per_rank: vec![],
            device: DeviceChoice::Auto,
            work_dir: None,
        };
        let machines = ["128GB:uma", "128GB:uma", card].map(|machine| machine.parse().unwrap());
        foresee(&options, &machines, &[], |_| Ok(vec![length; 256]))
    }

    #[test]
    fn the_last_six_of_88_layers_fit_a_card_of_24_gib() {
        for length in [650, 1200] {
            let plan = planned("best", "24GiB:gpu", length).unwrap();
            let card = &plan.stages[2];
            assert_eq!((card.layers.clone(), card.mode), (82..88, Mode::Spilled));
            assert!(
                card.peak_memory <= card.memory && card.memory < parse_bytes("21.7GiB").unwrap(),
                "{plan}"
            );
        }
        // With room on the card, hidden states stay there.
        assert_ne!(planned("best", "48GiB:gpu", 650).unwrap().stages[2].mode, Mode::Spilled);
    }

    #[test]
    fn where_a_card_is_too_small_the_options_that_help_are_named_and_help() {
        let refused = planned("best", "16GiB:gpu", 650).unwrap_err().to_string();
        let method = refused.split("--method ").nth(1).unwrap_or_else(|| panic!("{refused}"));
        let method = method.split([';', ' ', '\n']).next().unwrap();
        assert!(planned(method, "16GiB:gpu", 650).is_ok(), "{refused}");
        // Hidden states are with the host already: neither a directory nor fewer documents would help.
        assert!(!refused.contains("--work-dir") && !refused.contains("--calib-samples"), "{refused}");
        let refused = planned("best", "24GiB:gpu:2GiB", 650).unwrap_err().to_string();
        let samples = refused.split("--calib-samples ").nth(1).unwrap_or_else(|| panic!("{refused}"));
        let samples: usize = samples.split([';', ' ', '\n']).next().unwrap().parse().unwrap();
        assert!((32..256).contains(&samples) && refused.contains("--work-dir"), "{refused}");
    }
}
