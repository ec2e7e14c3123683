//! Whether a launcher started this process, before MPI is touched.
//!
//! Starting MPI without a launcher costs up to a second and fails where its helpers are not on the PATH, so
//! a process that was started alone never does it.

/// This process's place in a job, as the launcher's environment tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Rank.
    pub rank: usize,
    /// Ranks in the job, where the launcher says so.
    pub size: Option<usize>,
}

/// Reads the environment of Open MPI, MPICH's Hydra, PMIx and Slurm.
pub fn launch() -> Option<Launch> {
    from_environment(&|name| std::env::var(name).ok().and_then(|value| value.parse().ok()))
}

fn from_environment(number: &dyn Fn(&str) -> Option<usize>) -> Option<Launch> {
    let pairs = [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")];
    for (rank, size) in pairs {
        if let Some(rank) = number(rank) {
            return Some(Launch { rank, size: number(size) });
        }
    }
    if let Some(rank) = number("PMIX_RANK") {
        return Some(Launch { rank, size: number("SLURM_STEP_NUM_TASKS") });
    }
    // A batch script's body has SLURM_PROCID as well; only a step with several tasks is a launch.
    match number("SLURM_STEP_NUM_TASKS") {
        Some(size) if size > 1 => Some(Launch { rank: number("SLURM_PROCID")?, size: Some(size) }),
        _ => None,
    }
}

/// Programs that start ranks on the host where the user is, by the names that the kernel has for them.
pub(in crate::cluster) const LAUNCHERS: [&str; 4] = ["mpirun", "mpiexec", "orterun", "prterun"];

/// Programs that start ranks on other hosts.
const DAEMONS: [&str; 2] = ["orted", "prted"];

/// The process that started this rank: Open MPI's launcher, or its daemon on this host. Scripts in between are passed
/// over.
pub(in crate::cluster) fn launcher() -> Option<u32> {
    let mut process = std::os::unix::process::parent_id();
    while process > 1 {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let field = |name| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_string()));
        let name = field("Name:")?;
        if LAUNCHERS.iter().chain(&DAEMONS).any(|known| *known == name) {
            return Some(process);
        }
        process = field("PPid:")?.parse().ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(environment: &[(&str, usize)]) -> Option<Launch> {
        from_environment(&|name| environment.iter().find(|(n, _)| *n == name).map(|(_, v)| *v))
    }

    #[test]
    fn launchers_are_told_from_a_plain_start() {
        assert_eq!(of(&[]), None);
        let open_mpi = [("OMPI_COMM_WORLD_RANK", 2), ("OMPI_COMM_WORLD_SIZE", 3), ("PMIX_RANK", 2)];
        assert_eq!(of(&open_mpi), Some(Launch { rank: 2, size: Some(3) }));
        assert_eq!(of(&[("PMI_RANK", 0), ("PMI_SIZE", 4)]), Some(Launch { rank: 0, size: Some(4) }));
        assert_eq!(of(&[("SLURM_PROCID", 0), ("SLURM_STEP_NUM_TASKS", 1)]), None);
        let srun = [("SLURM_PROCID", 1), ("SLURM_STEP_NUM_TASKS", 2)];
        assert_eq!(of(&srun), Some(Launch { rank: 1, size: Some(2) }));
    }
}
