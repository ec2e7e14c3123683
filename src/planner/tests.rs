use proptest::prelude::*;

use super::*;
use crate::error::ExitCode;

const GIB: u64 = 1 << 30;

pub(super) fn node(rank: usize, memory: u64, flops: f64) -> Node {
    Node { rank, host: format!("host{rank}"), memory, cache: 0, flops, read_rate: 1e9 }
}

pub(super) fn model(layers: usize) -> ModelCost {
    ModelCost {
        layer_source: vec![1 << 20; layers],
        layer_loaded: vec![1 << 20; layers],
        layer_output: vec![1 << 18; layers],
        head: 1 << 21,
        head_loaded: 1 << 21,
        tail: 1 << 10,
        hidden_row: 64,
        workspace_row: 640,
        flops_per_token: 1e6,
        statistics: None,
    }
}

pub(super) fn work() -> Work {
    Work { tokens: 10_000, micro_batches: 10, micro_batch_tokens: 1000, calibrates: true, spills: false }
}

/// A dense decoder in BF16: hidden size, intermediate size, width of keys and values, vocabulary.
fn dense(layers: usize, [hidden, intermediate, kv, vocab]: [u64; 4]) -> ModelCost {
    let params = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate;
    ModelCost {
        layer_source: vec![2 * params; layers],
        layer_loaded: vec![2 * params; layers],
        layer_output: vec![params / 16 * 9; layers],
        head: 2 * vocab * hidden,
        head_loaded: 2 * vocab * hidden,
        tail: 2 * vocab * hidden,
        hidden_row: 2 * hidden,
        workspace_row: 2 * (4 * hidden + 2 * kv + 2 * intermediate),
        flops_per_token: 2.0 * params as f64,
        statistics: None,
    }
}

/// 88 layers, 123e9 parameters.
fn large() -> ModelCost {
    dense(88, [12288, 28672, 1024, 32768])
}

/// The default calibration set on GPUs.
fn default_work() -> Work {
    Work { tokens: 170_000, micro_batches: 21, micro_batch_tokens: 8192, calibrates: true, spills: false }
}

fn machines(list: &str) -> Vec<Node> {
    let machines = list.split(',').map(|text| text.parse::<AssumedMachine>().unwrap());
    machines.enumerate().map(|(rank, machine)| machine.node(rank, None)).collect()
}

fn counts(plan: &Plan) -> Vec<usize> {
    plan.stages.iter().map(|stage| stage.layers.len()).collect()
}

fn count_of(plan: &Plan, rank: usize) -> usize {
    plan.stage(rank).layers.len()
}

#[test]
fn the_first_cluster_is_resident_and_the_small_card_gets_the_small_shard() {
    for list in ["128GiB:uma,128GiB:uma,24GiB:gpu", "24GiB:gpu,128GiB:uma,128GiB:uma"] {
        let nodes = machines(list);
        let plan = plan(&nodes, &large(), &default_work(), None).unwrap();
        assert!(plan.stages.iter().all(|stage| stage.mode == Mode::Resident), "{plan}");
        let small = nodes.iter().position(|node| node.memory < 100 * GIB).unwrap();
        for rank in 0..3 {
            let expected = if rank == small { 6 } else { 41 };
            assert!(count_of(&plan, rank).abs_diff(expected) <= 1, "{plan}");
        }
    }
}

#[test]
fn two_unified_nodes_alone_fall_back_to_streaming() {
    let plan = plan(&machines("128GiB:uma,128GiB:uma"), &large(), &default_work(), None).unwrap();
    assert!(plan.stages.iter().any(|stage| stage.mode == Mode::Streamed), "{plan}");
}

#[test]
fn one_card_alone_streams_everything_once() {
    let plan = plan(&machines("24GiB:gpu"), &large(), &default_work(), None).unwrap();
    assert_eq!((plan.stages[0].mode, plan.stages[0].group), (Mode::Streamed, 21), "{plan}");
}

#[test]
fn equal_machines_share_evenly_and_keep_rank_order() {
    let nodes: Vec<Node> =
        (0..4).map(|rank| node(rank, GIB + rank as u64, 1e9 * (1.0 + 0.02 * rank as f64))).collect();
    for work in [work(), Work { micro_batches: 0, tokens: 0, calibrates: false, ..work() }] {
        let plan = plan(&nodes, &ModelCost { head: 0, tail: 0, ..model(30) }, &work, None).unwrap();
        assert_eq!(plan.stages.iter().map(|stage| stage.rank).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let mut counts = counts(&plan);
        counts.sort_unstable();
        assert_eq!(counts, [7, 7, 8, 8]);
        assert_eq!(plan.stages[0].layers.start, 0);
        assert!(plan.stages.windows(2).all(|pair| pair[0].layers.end == pair[1].layers.start));
        assert_eq!(plan.stages[3].layers.end, 30);
    }
}

#[test]
fn a_rank_without_room_for_the_embedding_stands_further_back() {
    let model = ModelCost { head: 1 << 26, head_loaded: 1 << 26, ..model(8) };
    let nodes = [node(0, 80 << 20, 1e9), node(1, GIB, 1e9), node(2, GIB, 1e9)];
    let plan = plan(&nodes, &model, &work(), None).unwrap();
    assert_ne!(plan.stages[0].rank, 0, "{plan}");
    assert!(plan.stage(0).peak_memory <= 80 << 20);
}

#[test]
fn a_rank_too_small_for_one_layer_is_named() {
    let nodes = [node(0, GIB, 1e9), node(1, 1 << 10, 1e9)];
    for counts in [None, Some(&[2, 2][..])] {
        let error = plan(&nodes, &model(4), &work(), counts).unwrap_err();
        assert_eq!(error.exit, ExitCode::Plan);
        assert!(error.to_string().contains("rank 1 (host1)"), "{error}");
    }
}

#[test]
fn given_counts_and_rank_order_are_kept() {
    let nodes: Vec<Node> = (0..3).map(|rank| node(rank, GIB, 1e9)).collect();
    let plan = plan(&nodes, &model(30), &work(), Some(&[3, 20, 7])).unwrap();
    assert_eq!(counts(&plan), [3, 20, 7]);
    assert_eq!(plan.owner(3), 1);
}

#[test]
fn impossible_splits_say_the_numbers() {
    let nodes: Vec<Node> = (0..3).map(|rank| node(rank, GIB, 1e9)).collect();
    for (layers, given, words) in [
        (2, None, vec!["3 ranks", "2 layers"]),
        (30, Some(vec![10, 10]), vec!["2 ranks", "has 3"]),
        (30, Some(vec![10, 10, 9]), vec!["29", "30"]),
        (30, Some(vec![15, 15, 0]), vec!["15,15,0"]),
    ] {
        let error = plan(&nodes, &model(layers), &work(), given.as_deref()).unwrap_err();
        assert_eq!(error.exit, ExitCode::Plan);
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
    }
}

#[test]
fn many_ranks_are_planned_quickly() {
    let model = dense(126, [16384, 53248, 1024, 128256]);
    let repeated = |kinds: &[&str], ranks: usize| {
        machines(&kinds.iter().copied().cycle().take(ranks).collect::<Vec<_>>().join(","))
    };
    let different = |ranks: usize| -> Vec<Node> {
        (0..ranks).map(|rank| node(rank, (25 + rank as u64) * GIB, 1.5f64.powi(rank as i32) * 1e9)).collect()
    };
    let kinds = ["128GiB:uma", "80GiB:gpu"];
    for nodes in [repeated(&kinds[..1], 64), repeated(&kinds[..2], 64), different(8), different(64)] {
        let started = std::time::Instant::now();
        assert_eq!(plan(&nodes, &model, &default_work(), None).unwrap().stages.len(), nodes.len());
        assert!(started.elapsed().as_secs() < 20, "{} ranks took {:?}", nodes.len(), started.elapsed());
    }
}

/// Every order of `left` and every split of the layers from `first` on, with groups of one size: the
/// smallest wall time, by the definition.
fn every_plan(
    planner: &Planner,
    group: usize,
    once: bool,
    left: &[usize],
    stages: &mut Vec<(usize, Range<usize>)>,
) -> Option<Time> {
    let layers = planner.model.layers();
    let first = stages.last().map_or(0, |(_, slice)| slice.end);
    if left.is_empty() {
        return if first == layers { planner.wall(stages, group, once) } else { None };
    }
    let mut least: Option<Time> = None;
    for &index in left {
        let others: Vec<usize> = left.iter().copied().filter(|&other| other != index).collect();
        for to in first + 1..=layers {
            stages.push((index, first..to));
            let found = every_plan(planner, group, once, &others, stages);
            stages.pop();
            least = least.into_iter().chain(found).min();
        }
    }
    least
}

fn any_node() -> impl Strategy<Value = (u64, u64, f64, f64)> {
    let cache = prop_oneof![Just(0), Just(4u64 << 20)];
    let flops = prop_oneof![Just(1e8), Just(1e12), Just(1e13)];
    (66u64..80, cache, flops, prop_oneof![Just(1e8), Just(3e9)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn nothing_among_all_orders_and_splits_is_faster(
        machines in prop::collection::vec(any_node(), 1..4),
        layers in prop::collection::vec(1u64..4, 3..7),
        head in 0u64..6,
        tail in 0u64..6,
        micro_batches in 1usize..6,
        calibrates in any::<bool>(),
    ) {
        let nodes: Vec<Node> = (machines.into_iter().enumerate())
            .map(|(rank, (memory, cache, flops, read_rate))| Node {
                cache, read_rate, ..node(rank, memory << 20, flops)
            })
            .collect();
        let bytes: Vec<u64> = layers.iter().map(|mib| mib << 20).collect();
        let model = ModelCost {
            layer_source: bytes.clone(),
            layer_loaded: bytes.clone(),
            layer_output: bytes.iter().map(|bytes| bytes / 4).collect(),
            head: head << 20,
            head_loaded: head << 20,
            tail: tail << 20,
            ..model(1)
        };
        let micro_batches = if calibrates { micro_batches } else { 0 };
        let work = Work { micro_batches, calibrates, ..work() };
        let planner = Planner { nodes: steady::steady(&nodes), model: &model, work: &work };
        let every: Vec<usize> = (0..nodes.len()).collect();
        let least = |once: bool| {
            let seconds = |group| {
                let wall = every_plan(&planner, group, once, &every, &mut vec![])?;
                Some(wall as f64 / work.groups(group) as f64 / SECOND)
            };
            work.group_sizes().into_iter().filter_map(seconds).reduce(f64::min)
        };
        let any = least(false);
        let expected = least(true).filter(|once| any.is_some_and(|any| *once <= any * 1.05)).or(any);
        let found = plan(&nodes, &model, &work, None);
        match (expected, &found) {
            (Some(expected), Ok(found)) => {
                prop_assert!((found.seconds / expected - 1.0).abs() < 1e-9, "{expected} s\n{found}");
                prop_assert!(found.stages.iter().all(|stage| stage.peak_memory <= stage.memory));
            }
            (None, Err(_)) => {}
            _ => prop_assert!(false, "{expected:?} {found:?}"),
        }
        prop_assert_eq!(found.ok(), plan(&nodes, &model, &work, None).ok(), "the same each time");
    }
}
