//! What this rank may use: cores and memory, by the narrowest limit that applies.

use std::fs;
use std::path::{Path, PathBuf};

/// What kind of memory a rank's limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    /// The host's memory.
    Host,
    /// A card's own memory.
    Device,
    /// One memory of host and GPU.
    Unified,
}

/// One rank's machine, as far as this rank may use it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Machine {
    /// Host name.
    pub host: String,
    /// Threads that this rank computes with.
    pub threads: usize,
    /// Threads of all ranks on this host for each of its cores, at least one.
    pub crowding: f64,
    /// Bytes that this rank may use, those that it has included.
    pub memory: u64,
    /// Of which kind.
    pub kind: MemoryKind,
}

impl Machine {
    /// Looks at this host, which `local_size` ranks share. `chosen_memory` replaces what was found.
    pub fn here(host: &str, local_size: usize, chosen_memory: Option<u64>) -> Machine {
        let share = local_size.max(1);
        let threads = threads(share);
        let cores = online_cores().into_iter().chain(cpu_quota()).min();
        let crowding = cores.map_or(1.0, |cores| (threads * share) as f64 / cores as f64);
        Machine {
            host: host.to_string(),
            threads,
            crowding: crowding.max(1.0),
            memory: chosen_memory.unwrap_or_else(|| usable_memory() / share as u64 + own_memory("VmRSS")),
            kind: MemoryKind::Host,
        }
    }

    /// Takes a GPU that has `free` bytes by its driver. An integrated one computes in the host's memory: there the
    /// smaller figure counts, since the driver knows of no limit of a cgroup, and the kernel calls memory available
    /// that the driver would have to wait for.
    pub fn computes_on(&mut self, free: u64, integrated: bool) {
        (self.memory, self.kind) = match integrated {
            true => (free.min(self.memory), MemoryKind::Unified),
            false => (free, MemoryKind::Device),
        };
    }
}

/// The host's name.
pub(super) fn host_name() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer is writable for its whole length, less one byte for the terminator.
    let failed = unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) } != 0;
    let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(0);
    if failed { "unknown".into() } else { String::from_utf8_lossy(&buffer[..end]).into_owned() }
}

/// `OMP_NUM_THREADS` or `RAYON_NUM_THREADS` where set; else this rank's share of the usable cores.
fn threads(share: usize) -> usize {
    let set = |name: &str| std::env::var(name).ok()?.split(',').next()?.trim().parse::<usize>().ok();
    if let Some(threads) = set("OMP_NUM_THREADS").or_else(|| set("RAYON_NUM_THREADS")).filter(|&n| n > 0) {
        return threads;
    }
    widen_default_binding();
    let cores = affinity();
    // A rank that its launcher bound to a part of the host has its share already; others divide the whole.
    let share = if online_cores().is_some_and(|online| cores < online) { 1 } else { share };
    (cores.min(cpu_quota().unwrap_or(cores)) / share).max(1)
}

/// Open MPI binds each of one or two ranks to a single core unless told otherwise, which suits programs
/// without threads. Where nobody asked for that binding, take back the cores that the cpuset allows.
fn widen_default_binding() {
    let by_open_mpi = std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some();
    let asked_for = std::env::var_os("OMPI_MCA_hwloc_base_binding_policy").is_some()
        || std::env::var_os("PRTE_MCA_hwloc_default_binding_policy").is_some();
    if by_open_mpi && !asked_for {
        // SAFETY: a cpu_set_t is a plain bit mask, valid when zeroed; the kernel intersects it with what the
        // cpuset allows.
        unsafe {
            let mut all: libc::cpu_set_t = std::mem::zeroed();
            (0..libc::CPU_SETSIZE as usize).for_each(|cpu| libc::CPU_SET(cpu, &mut all));
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &all);
        }
    }
}

/// Cores that this process may run on.
fn affinity() -> usize {
    // SAFETY: as above; the call fills the mask.
    unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        match libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut mask) {
            0 => libc::CPU_COUNT(&mask) as usize,
            _ => 1,
        }
    }
}

fn online_cores() -> Option<usize> {
    Some(cpu_list_len(fs::read_to_string("/sys/devices/system/cpu/online").ok()?.trim()))
}

/// The number of CPUs in a list like `0-3,8`.
fn cpu_list_len(list: &str) -> usize {
    let number = |text: &str| text.trim().parse::<usize>().unwrap_or(0);
    list.split(',')
        .map(|range| {
            range.split_once('-').map_or(1, |(from, to)| (number(to) + 1).saturating_sub(number(from)))
        })
        .sum()
}

/// Memory that can really be used: what the kernel calls available, or what a cgroup leaves.
fn usable_memory() -> u64 {
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let limits = cgroup_dirs().into_iter().filter_map(|dir| cgroup_room(&dir));
    limits.chain(available).min().unwrap_or(0)
}

/// Bytes of this process, as the kernel calls them: `VmRSS` what it has, `VmHWM` the most that it had.
pub fn own_memory(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// This process's cgroup and those around it, in both versions' hierarchies.
fn cgroup_dirs() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut dirs = vec![];
    for (controllers, path) in cgroup_paths(&text) {
        let root = if controllers.is_empty() {
            PathBuf::from("/sys/fs/cgroup")
        } else if controllers.split(',').any(|c| c == "memory" || c == "cpu") {
            Path::new("/sys/fs/cgroup").join(controllers)
        } else {
            continue;
        };
        let mut path = Path::new(path);
        loop {
            dirs.push(root.join(path.strip_prefix("/").unwrap_or(path)));
            match path.parent() {
                Some(parent) => path = parent,
                None => break,
            }
        }
    }
    dirs
}

/// (controllers, path) by line of /proc/self/cgroup; version 2 has no controllers.
fn cgroup_paths(text: &str) -> Vec<(&str, &str)> {
    text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':')).collect()
}

/// What a cgroup's memory limit leaves; its page cache counts as free, since it can be dropped.
fn cgroup_room(dir: &Path) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?),
    };
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let cache =
        stat_value(&stat, "inactive_file").or_else(|| stat_value(&stat, "total_inactive_file")).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

fn stat_value(stat: &str, name: &str) -> Option<u64> {
    let line = stat.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Whole cores that the narrowest cgroup CPU quota allows.
fn cpu_quota() -> Option<usize> {
    cgroup_dirs()
        .iter()
        .filter_map(|dir| {
            if let Ok(text) = fs::read_to_string(dir.join("cpu.max")) {
                return quota(&text);
            }
            let part = |name: &str| fs::read_to_string(dir.join(name)).ok();
            quota(&format!("{} {}", part("cpu.cfs_quota_us")?.trim(), part("cpu.cfs_period_us")?.trim()))
        })
        .min()
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

    #[test]
    fn a_gpu_s_memory_counts_and_where_both_share_one_the_smaller_figure() {
        let of = |host, free, integrated| {
            let mut machine =
                Machine { host: "a".into(), threads: 1, crowding: 1.0, memory: host, kind: MemoryKind::Host };
            machine.computes_on(free, integrated);
            (machine.memory, machine.kind)
        };
        assert_eq!(of(10, 24, false), (24, MemoryKind::Device));
        assert_eq!(of(128, 100, true), (100, MemoryKind::Unified));
        assert_eq!(of(60, 100, true), (60, MemoryKind::Unified));
    }

    #[test]
    fn kernel_files_are_read() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2048 * 1024));
        assert_eq!(cpu_list_len("0-3,8"), 5);
        assert_eq!(cpu_list_len("0"), 1);
        assert_eq!(quota("150000 100000\n"), Some(2));
        assert_eq!(quota("max 100000\n"), None);
        assert_eq!(quota("-1 100000"), None);
        let paths = cgroup_paths("0::/job/step\n4:memory:/slurm\n");
        assert_eq!(paths, [("", "/job/step"), ("memory", "/slurm")]);
        assert_eq!(stat_value("anon 5\ninactive_file 7\n", "inactive_file"), Some(7));
    }

    #[test]
    fn a_cgroup_leaves_its_limit_less_what_can_not_be_dropped() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in
            [("memory.max", "1000\n"), ("memory.current", "700\n"), ("memory.stat", "inactive_file 200\n")]
        {
            fs::write(dir.path().join(name), text).unwrap();
        }
        assert_eq!(cgroup_room(dir.path()), Some(500));
        fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        assert_eq!(cgroup_room(dir.path()), None);
    }

    #[test]
    fn this_machine_has_cores_and_memory() {
        let machine = Machine::here(&host_name(), 1, None);
        assert!(machine.threads >= 1 && machine.memory > 1 << 20);
        assert!(own_memory("VmRSS") > 1 << 20 && own_memory("VmHWM") >= own_memory("VmRSS"));
        assert_eq!(own_memory("Vm"), 0);
        assert_eq!(Machine::here("h", 2, Some(5)).memory, 5);
    }
}
