//! What this rank may use: its share of the host's cores, and memory by the narrowest limit that applies.

use std::fs;
use std::path::{Path, PathBuf};

use super::cores::Share;

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
    /// Threads of all ranks on this host for each core that this rank computes on, at least one.
    pub crowding: f64,
    /// Bytes that this rank may use, those that it has included.
    pub memory: u64,
    /// Of which kind.
    pub kind: MemoryKind,
}

impl Machine {
    /// This host, which `ranks` ranks share. `chosen` replaces the memory that is found.
    pub(in crate::cluster) fn here(host: &str, ranks: usize, share: Share, chosen: Option<u64>) -> Machine {
        Machine {
            host: host.to_string(),
            threads: share.threads,
            crowding: share.crowding,
            memory: chosen.unwrap_or_else(|| usable_memory() / ranks as u64 + own_memory("VmRSS")),
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
pub(in crate::cluster) fn host_name() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer is writable for its whole length, less one byte for the terminator.
    let failed = unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) } != 0;
    let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(0);
    if failed { "unknown".into() } else { String::from_utf8_lossy(&buffer[..end]).into_owned() }
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
pub(in crate::cluster) fn cgroup_dirs() -> Vec<PathBuf> {
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
    fn memory_is_divided_unless_it_is_chosen() {
        let share = Share { threads: 3, crowding: 1.5 };
        let machine = Machine::here("h", 1, share, None);
        assert_eq!((machine.threads, machine.crowding), (3, 1.5));
        assert!(machine.memory > 1 << 20);
        assert!(own_memory("VmRSS") > 1 << 20 && own_memory("VmHWM") >= own_memory("VmRSS"));
        assert_eq!(own_memory("Vm"), 0);
        assert_eq!(Machine::here("h", 2, share, Some(5)).memory, 5);
    }
}
