//! The cores that ranks compute on: which each may use, and how the ranks of a host divide what they share.

use std::collections::BTreeMap;
use std::fs;

use serde::{Deserialize, Serialize};

use super::launch::launcher;
use super::machine::cgroup_dirs;

/// What a rank says of its cores.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(in crate::cluster) struct Cores {
    /// The CPUs that it may run on, in the kernel's form: `0-3,8`.
    allowed: String,
    /// CPU quotas that it is under: the control group, and how many CPUs' time its processes get together.
    quotas: Vec<(String, usize)>,
    /// The number of threads that the user chose for it.
    chosen: Option<usize>,
}

/// What a rank gets of its host's cores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::cluster) struct Share {
    /// Threads to compute with.
    pub(in crate::cluster) threads: usize,
    /// Threads of all ranks for each core that this rank computes on, at least 1.
    pub(in crate::cluster) crowding: f64,
}

impl Cores {
    /// Looks at this process, and first undoes a binding that nobody asked for. Called on the main thread before there
    /// are others, which inherit what it may run on.
    pub(in crate::cluster) fn here() -> Cores {
        undo_default_binding();
        let any = || std::thread::available_parallelism().map_or(1, usize::from);
        let set = |name: &str| std::env::var(name).ok()?.split(',').next()?.trim().parse::<usize>().ok();
        Cores {
            allowed: allowed("self").unwrap_or_else(|| format!("0-{}", any() - 1)),
            quotas: quotas(),
            chosen: set("OMP_NUM_THREADS")
                .or_else(|| set("RAYON_NUM_THREADS"))
                .filter(|&threads| threads > 0),
        }
    }
}

/// How the ranks of one host share its cores: a core is divided among those that may run on it, and a quota among those
/// that are under it. So ranks in one cpuset divide it, and each of those that were bound to cores of their own keeps
/// them.
pub(in crate::cluster) fn shares(ranks: &[&Cores]) -> Vec<Share> {
    let cpus: Vec<Vec<usize>> = ranks.iter().map(|rank| cpus(&rank.allowed)).collect();
    let (mut on_cpu, mut in_group) = (BTreeMap::<usize, usize>::new(), BTreeMap::<&str, usize>::new());
    cpus.iter().flatten().for_each(|cpu| *on_cpu.entry(*cpu).or_default() += 1);
    ranks
        .iter()
        .flat_map(|rank| &rank.quotas)
        .for_each(|(group, _)| *in_group.entry(group).or_default() += 1);
    let threads = ranks.iter().zip(&cpus).map(|(rank, cpus)| {
        let own: f64 = cpus.iter().map(|cpu| 1.0 / on_cpu[cpu] as f64).sum();
        let quotas = rank.quotas.iter().map(|(group, cores)| *cores as f64 / in_group[group.as_str()] as f64);
        // A sum of six sixths may be a little less than one.
        rank.chosen.unwrap_or((quotas.fold(own, f64::min) + 1e-6) as usize).max(1)
    });
    let threads: Vec<usize> = threads.collect();
    let mut load = BTreeMap::<usize, f64>::new();
    let mut group_load = BTreeMap::<&str, usize>::new();
    for ((rank, cpus), threads) in ranks.iter().zip(&cpus).zip(&threads) {
        cpus.iter().for_each(|cpu| *load.entry(*cpu).or_default() += *threads as f64 / cpus.len() as f64);
        rank.quotas.iter().for_each(|(group, _)| *group_load.entry(group).or_default() += threads);
    }
    let crowding = ranks.iter().zip(&cpus).map(|(rank, cpus)| {
        let cores = cpus.iter().map(|cpu| load[cpu]).sum::<f64>() / cpus.len().max(1) as f64;
        let quotas =
            rank.quotas.iter().map(|(group, cores)| group_load[group.as_str()] as f64 / *cores as f64);
        quotas.fold(cores, f64::max).max(1.0)
    });
    threads.iter().zip(crowding).map(|(&threads, crowding)| Share { threads, crowding }).collect()
}

/// Open MPI binds each of one or two ranks to a single core, and more ranks to a part of the host each, unless told
/// otherwise: that suits programs without threads. Where nobody asked for it, this takes back the cores that the
/// launcher itself may run on, so a restriction that was there before the launcher stays.
fn undo_default_binding() {
    if !is_bound_by_default(&|name| std::env::var(name).ok()) {
        return;
    }
    let cores = launcher().and_then(|pid| allowed(&pid.to_string())).map(|list| cpus(&list));
    // SAFETY: a cpu_set_t is a plain bit mask, valid when zeroed. Numbers beyond the mask, for which CPU_SET
    // would panic, are left out; the call only reads it, and the kernel leaves out what the cpuset does not allow.
    unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        let every = 0..libc::CPU_SETSIZE as usize;
        match cores {
            Some(cores) => cores
                .into_iter()
                .filter(|cpu| every.contains(cpu))
                .for_each(|cpu| libc::CPU_SET(cpu, &mut mask)),
            None => every.for_each(|cpu| libc::CPU_SET(cpu, &mut mask)),
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &mask);
    }
}

/// Whether Open MPI has, or (from version 5 on) may have bound this rank without having been asked to.
fn is_bound_by_default(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let asked = [
        "OMPI_MCA_hwloc_base_binding_policy",
        "OMPI_MCA_hwloc_base_bind_to_core",
        "OMPI_MCA_hwloc_base_bind_to_socket",
        "OMPI_MCA_hwloc_base_cpu_set",
        "OMPI_MCA_hwloc_base_cpu_list",
        "OMPI_MCA_orte_rankfile",
        "OMPI_MCA_rmaps_base_cpus_per_rank",
        "PRTE_MCA_hwloc_default_binding_policy",
        "PRTE_MCA_hwloc_default_cpu_list",
    ];
    let mappings = ["OMPI_MCA_rmaps_base_mapping_policy", "PRTE_MCA_rmaps_default_mapping_policy"];
    // `--map-by slot:PE=4` is a binding as well.
    let mapped = |name| variable(name).is_some_and(|policy| policy.to_lowercase().contains("pe="));
    let by_version_4 = variable("OMPI_MCA_orte_launch").is_some();
    let unbound = by_version_4 && variable("OMPI_MCA_orte_bound_at_launch").is_none();
    variable("OMPI_COMM_WORLD_SIZE").is_some()
        && !unbound
        && !asked.iter().any(|name| variable(name).is_some())
        && !mappings.iter().any(|name| mapped(name))
}

/// The CPUs that a process may run on.
fn allowed(process: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| Some(line.strip_prefix("Cpus_allowed_list:")?.trim().to_string()))
}

/// The numbers in a list like `0-3,8`.
fn cpus(list: &str) -> Vec<usize> {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse().ok()?)
    });
    ranges.flatten().collect()
}

/// The CPU quotas of this process's control group and of those around it.
fn quotas() -> Vec<(String, usize)> {
    let found = cgroup_dirs().into_iter().filter_map(|dir| {
        let part = |name: &str| fs::read_to_string(dir.join(name)).ok();
        let text = part("cpu.max").or_else(|| {
            Some(format!("{} {}", part("cpu.cfs_quota_us")?.trim(), part("cpu.cfs_period_us")?.trim()))
        })?;
        Some((dir.display().to_string(), quota(&text)?))
    });
    found.collect()
}

/// Cores from `quota period` in microseconds, rounded up; `max` and -1 mean no limit.
fn quota(text: &str) -> Option<usize> {
    let mut parts = text.split_whitespace().map(|part| part.parse::<u64>().ok());
    let (quota, period) = (parts.next()??, parts.next()??);
    (period > 0).then(|| quota.div_ceil(period) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(allowed: &str) -> Cores {
        Cores { allowed: allowed.into(), ..Cores::default() }
    }

    fn divided(ranks: &[Cores]) -> Vec<(usize, f64)> {
        let ranks: Vec<&Cores> = ranks.iter().collect();
        shares(&ranks).into_iter().map(|share| (share.threads, share.crowding)).collect()
    }

    #[test]
    fn ranks_in_one_cpuset_divide_it() {
        assert_eq!(divided(&[on("0-7")]), [(8, 1.0)]);
        assert_eq!(divided(&vec![on("0-7"); 4]), [(2, 1.0); 4]);
        assert_eq!(divided(&vec![on("0,8"); 4]), [(1, 2.0); 4]);
        assert_eq!(divided(&vec![on("0-5"); 6]), [(1, 1.0); 6]);
    }

    #[test]
    fn ranks_with_cores_of_their_own_keep_them() {
        assert_eq!(divided(&[on("0-3"), on("4-15")]), [(4, 1.0), (12, 1.0)]);
        // Two on each socket.
        assert_eq!(divided(&[on("0-7"), on("8-15"), on("0-7"), on("8-15")]), [(4, 1.0); 4]);
        // What only one may use is its own: together they have as many threads as there are cores.
        let threads: Vec<usize> =
            divided(&[on("0-7"), on("0-3")]).iter().map(|(threads, _)| *threads).collect();
        assert_eq!(threads, [6, 2]);
    }

    #[test]
    fn a_quota_is_divided_by_those_that_are_under_it() {
        let limited = |group: &str| Cores { quotas: vec![(group.into(), 4)], ..on("0-63") };
        assert_eq!(divided(&[limited("/job")]), [(4, 1.0)]);
        assert_eq!(divided(&vec![limited("/job"); 2]), [(2, 1.0); 2]);
        assert_eq!(divided(&vec![limited("/job"); 8]), [(1, 2.0); 8]);
        assert_eq!(divided(&[limited("/a"), limited("/b")]), [(4, 1.0); 2]);
    }

    #[test]
    fn a_chosen_number_of_threads_is_taken_and_counted() {
        let chosen = Cores { chosen: Some(6), ..on("0-3") };
        assert_eq!(divided(&[chosen]), [(6, 1.5)]);
    }

    #[test]
    fn only_a_binding_that_nobody_asked_for_is_undone() {
        let bound = |variables: &[(&str, &str)]| {
            is_bound_by_default(&|name| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
            })
        };
        let four = [
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_MCA_orte_launch", "1"),
            ("OMPI_MCA_orte_bound_at_launch", "1"),
        ];
        assert!(!bound(&[]) && bound(&four) && bound(&four[..1]) && !bound(&four[..2]));
        for (name, value, asks) in [
            ("OMPI_MCA_hwloc_base_binding_policy", "core", true),
            ("OMPI_MCA_orte_rankfile", "file", true),
            ("OMPI_MCA_rmaps_base_mapping_policy", "slot:PE=2", true),
            ("OMPI_MCA_rmaps_base_mapping_policy", "slot", false),
            ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe", false),
        ] {
            assert_eq!(bound(&[&four[..], &[(name, value)]].concat()), !asks, "{name}={value}");
        }
    }

    #[test]
    fn kernel_files_are_read() {
        assert_eq!(cpus("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(cpus("0"), [0]);
        assert_eq!(cpus(""), [0; 0]);
        assert_eq!(quota("150000 100000\n"), Some(2));
        assert_eq!(quota("max 100000\n"), None);
        assert_eq!(quota("-1 100000"), None);
        assert!(!cpus(&Cores::here().allowed).is_empty());
    }
}
