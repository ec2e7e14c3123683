use proptest::prelude::*;

use super::cost::SECOND;
use super::*;
use crate::error::ExitCode;

const GIB: u64 = 1 << 30;

pub(super) fn node(rank: usize, memory: u64, flops: f64) -> Node {
    Node {
        rank,
        host: format!("host{rank}"),
        host_id: rank,
        memory,
        host_memory: 0,
        flops,
        statistics_flops: flops / 2.0,
        solving_flops: flops / 4.0,
        read_rate: 1e9,
        link: 1e9,
        company: 1,
        crowding: 1.0,
    }
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
        operations: vec![
            Operations { token: 1e6, pair: 0.0, window: None, statistics: 0.0, solving: 0.0 };
            layers
        ],
        statistics: None,
        lighter: vec![],
    }
}

pub(super) fn work() -> Work {
    Work {
        documents: 100,
        tokens: 10_000,
        pairs: vec![(None, 0)],
        micro_batches: 10,
        micro_batch_tokens: 1000,
        calibrates: true,
        spills: false,
    }
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
        operations: vec![
            Operations {
                token: 2.0 * params as f64,
                pair: 4.0 * hidden as f64,
                window: None,
                statistics: 0.0,
                solving: params as f64,
            };
            layers
        ],
        statistics: None,
        lighter: vec![],
    }
}

/// The same under a method that needs statistics.
fn thorough(model: ModelCost) -> ModelCost {
    let thorough = |of: &Operations| Operations { statistics: of.token, solving: 1e5 * of.token, ..*of };
    let operations = model.operations.iter().map(thorough).collect();
    let statistics = model.layer_loaded.iter().map(|bytes| 4 * bytes).collect();
    ModelCost { operations, statistics: Some(statistics), ..model }
}

/// 88 layers, 123e9 parameters.
fn large() -> ModelCost {
    dense(88, [12288, 28672, 1024, 32768])
}

/// The default calibration set on GPUs.
fn default_work() -> Work {
    Work {
        documents: 100,
        tokens: 170_000,
        pairs: vec![(None, 170_000 * 400)],
        micro_batches: 21,
        micro_batch_tokens: 8192,
        calibrates: true,
        spills: false,
    }
}

fn machines(list: &str) -> Vec<Node> {
    linked(list, &[ASSUMED_LINK])
}

fn linked(list: &str, links: &[f64]) -> Vec<Node> {
    let machines = list.split(',').map(|text| text.parse::<AssumedMachine>().unwrap());
    let links = links.iter().copied().cycle();
    machines.enumerate().zip(links).map(|((rank, machine), link)| machine.node(rank, None, link)).collect()
}

/// What the first cluster's machines are linked by: 200 Gbit/s between the unified ones, 2.5 to the card.
const FAST: f64 = 25e9;
const SLOW: f64 = 312.5e6;

fn counts(plan: &Plan) -> Vec<usize> {
    plan.stages.iter().map(|stage| stage.layers.len()).collect()
}

fn count_of(plan: &Plan, rank: usize) -> usize {
    plan.stage(rank).layers.len()
}

#[test]
fn the_first_cluster_is_resident_and_the_small_card_gets_the_small_shard() {
    let [a, b] = ["128GiB:uma,128GiB:uma,24GiB:gpu", "24GiB:gpu,128GiB:uma,128GiB:uma"];
    for (list, links) in [(a, [FAST, FAST, SLOW]), (b, [SLOW, FAST, FAST])] {
        let nodes = linked(list, &links);
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
        (30, Some(vec![15, 15, 0]), vec!["15,15,0", "rank 2"]),
    ] {
        let error = plan(&nodes, &model(layers), &work(), given.as_deref()).unwrap_err();
        assert_eq!(error.exit, ExitCode::Plan);
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
    }
}

#[test]
fn a_link_that_is_slower_than_its_stages_sets_the_pace() {
    let time = |link: f64| {
        let nodes: Vec<Node> = (0..2).map(|rank| Node { link, ..node(rank, GIB, 1e9) }).collect();
        let work = Work { micro_batches: 100, ..work() };
        plan(&nodes, &model(8), &work, None).unwrap().seconds
    };
    // Two stages of 40 s, and 640 KB between them.
    let fast = time(1e9);
    assert!((40.0..41.0).contains(&fast), "{fast}");
    assert!((time(640_000.0 / 20.0) / fast - 1.0).abs() < 0.02, "half as long is hidden");
    let slow = time(640_000.0 / 200.0);
    assert!((200.0..202.0).contains(&slow), "{slow}");
}

#[test]
fn ranks_that_outnumber_cores_are_as_fast_as_the_cores() {
    let crowd = |ranks: usize, work: &Work| {
        let member = |rank| Node {
            host_id: 0,
            company: ranks,
            crowding: (ranks as f64 / 2.0).max(1.0),
            ..node(rank, GIB, 1e9)
        };
        plan(&(0..ranks).map(member).collect::<Vec<_>>(), &model(64), work, None).unwrap().seconds
    };
    // 640 s of arithmetic, and two cores.
    let (many, one) = (Work { micro_batches: 64, ..work() }, Work { micro_batches: 1, ..work() });
    for ranks in [2, 4, 16, 64] {
        let (piped, alone) = (crowd(ranks, &many), crowd(ranks, &one));
        assert!((320.0..341.0).contains(&piped), "{ranks} ranks: {piped} s");
        assert!((640.0..641.0).contains(&alone), "{ranks} ranks, one of which computes at a time: {alone} s");
    }
}

#[test]
fn hosts_of_one_name_do_not_share_their_cores() {
    // Two hosts of two ranks each. The ranks of one are slowed by each other, however the hosts are called.
    let named = |name: fn(usize) -> &'static str| {
        let member = |rank: usize| Node {
            host: name(rank).into(),
            host_id: rank / 2 * 2,
            company: 2,
            crowding: if rank < 2 { 2.0 } else { 1.0 },
            ..node(rank, GIB, if rank < 2 { 1e9 } else { 1e8 })
        };
        let many = Work { micro_batches: 64, ..work() };
        plan(&(0..4).map(member).collect::<Vec<_>>(), &model(64), &many, Some(&[16; 4])).unwrap().seconds
    };
    assert_eq!(named(|_| "vm"), named(|rank| if rank < 2 { "a" } else { "b" }));
}

#[test]
fn a_slow_link_is_crossed_once() {
    // Two pairs of ranks, each pair on a fast link of its own speed.
    let links = [SLOW, FAST, SLOW, FAST];
    let nodes = linked("80GiB:gpu,80GiB:gpu,80GiB:gpu,80GiB:gpu", &links);
    let plan = plan(&nodes, &large(), &default_work(), None).unwrap();
    let order: Vec<f64> = plan.stages.iter().map(|stage| links[stage.rank]).collect();
    // Whoever passes on to a slow one waits for it.
    assert_eq!(order.windows(2).filter(|pair| pair[0].min(pair[1]) == FAST).count(), 1, "{plan}");
}

#[test]
fn two_sweeps_let_every_stage_solve_at_once() {
    let nodes = machines("80GiB:gpu,80GiB:gpu,80GiB:gpu,80GiB:gpu");
    let one = plan(&nodes[..1], &thorough(large()), &default_work(), None).unwrap().seconds;
    let four = plan(&nodes, &thorough(large()), &default_work(), None).unwrap();
    assert!(one / four.seconds > 2.8, "{one} s alone\n{four}");
    assert!(counts(&four).is_sorted_by(|a, b| a >= b), "who begins first can take most\n{four}");
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
    let (deep, nodes) = (super::tests::model(600), repeated(&["64GiB:cpu"], 512));
    let started = std::time::Instant::now();
    assert_eq!(plan(&nodes, &deep, &work(), None).unwrap().stages.len(), 512);
    assert!(started.elapsed().as_secs() < 20, "512 ranks took {:?}", started.elapsed());
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

fn any_node() -> impl Strategy<Value = (u64, u64, f64, f64, f64)> {
    let host_memory = prop_oneof![Just(0), Just(4u64 << 20)];
    let flops = prop_oneof![Just(1e8), Just(1e12), Just(1e13)];
    let link = prop_oneof![Just(1e4), Just(1e7), Just(1e9)];
    (66u64..80, host_memory, flops, prop_oneof![Just(1e8), Just(3e9)], link)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn nothing_among_all_orders_and_splits_is_faster(
        machines in prop::collection::vec(any_node(), 1..4),
        layers in prop::collection::vec(1u64..4, 3..7),
        head in 0u64..6,
        tail in 0u64..6,
        micro_batches in 1usize..6,
        calibrates in any::<bool>(),
        two_sweeps in any::<bool>(),
    ) {
        let nodes: Vec<Node> = (machines.into_iter().enumerate())
            .map(|(rank, (memory, host_memory, flops, read_rate, link))| Node {
                host_memory, read_rate, link, ..node(rank, memory << 20, flops)
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
            operations: vec![
                Operations { statistics: 1e6, solving: 1e9, ..model(1).operations[0] };
                bytes.len()
            ],
            statistics: two_sweeps.then(|| vec![1 << 20; bytes.len()]),
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
        let found = planner.fastest();
        let wall = found.as_ref().map(|found| found.wall as f64 / work.groups(found.group) as f64 / SECOND);
        let planned = plan(&nodes, &model, &work, None);
        match (expected, wall, &planned) {
            (Some(expected), Some(wall), Ok(planned)) => {
                prop_assert!((wall / expected - 1.0).abs() < 1e-9, "{expected} s, {wall} s\n{planned}");
                prop_assert!(planned.stages.iter().all(|stage| stage.peak_memory <= stage.memory));
                // The formula against the schedule, played through. The formula overlaps what a slice does with its
                // layers (reading, computing, choosing codes, writing), which one layer can't; and it adds up three
                // spans that may overlap: passing the first group on, what else that takes, what follows.
                let one_layer = |stage: &Stage| {
                    let (slice, node) = (model.slice(stage.layers.clone()), &planner.nodes[stage.rank]);
                    let p = slice.pace(node, node.link, 1.0, stage.mode, &model, &work);
                    let all = p.forward + p.statistics + p.solving + p.read + p.again + p.write + p.spill;
                    all as f64 / SECOND / stage.layers.len() as f64
                };
                let alone: f64 = planned.stages.iter().map(one_layer).sum();
                let most = 1.1 * wall + alone;
                prop_assert!((wall / 3.0..most).contains(&planned.seconds), "{wall} s by formula\n{planned}");
            }
            (None, None, Err(_)) => {}
            _ => prop_assert!(false, "{expected:?} {planned:?}"),
        }
        prop_assert_eq!(planned.ok(), plan(&nodes, &model, &work, None).ok(), "the same each time");
    }
}
