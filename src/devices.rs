//! Opens each rank's device. The ranks of a host divide its GPUs according to which of them each rank sees.

use crate::backend::{Compute, Device, DeviceChoice, cuda};
use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// Opens this rank's device: a GPU that no other rank of its host has, or the CPU. Warns of ranks that compute on the
/// CPU while others compute on GPUs.
///
/// # Errors
/// Exit code 5, the same on every rank, where a device can't be had or used.
pub fn open_device(
    cluster: &Cluster,
    choice: DeviceChoice,
    compute: Compute,
    threads: usize,
) -> Result<Device> {
    let visible = cluster.attend(|| if choice == DeviceChoice::Cpu { vec![] } else { cuda::visible() });
    let seen = cluster.all_gather(&visible)?;
    let neighbours: Vec<&[String]> =
        cluster.local_ranks().iter().map(|&rank| seen[rank].as_slice()).collect();
    let gpu = own_gpus(&neighbours)[cluster.local_rank()];
    let opened = match (choice, gpu) {
        (DeviceChoice::Cuda, None) if !visible.is_empty() => Err(Error::run(format!(
            "the {} of this host that rank {} sees {} taken by other ranks",
            if visible.len() == 1 { "GPU".to_string() } else { format!("{} GPUs", visible.len()) },
            cluster.rank(),
            if visible.len() == 1 { "is" } else { "are" },
        ))
        .fix("start one rank for each GPU, show every rank one of its own, or use --device auto")),
        _ => cluster.attend(|| Device::open(choice, compute, gpu, threads)),
    };
    let device = cluster.agree(opened)?;
    let on_gpu = cluster.all_gather(&matches!(device, Device::Cuda(_)))?;
    if cluster.is_root() && on_gpu.contains(&true) {
        for rank in (0..on_gpu.len()).filter(|&rank| !on_gpu[rank]) {
            let why = match seen[rank].len() {
                0 => "it sees none of its own".to_string(),
                1 => "another rank of its host has the only one that it sees".to_string(),
                many => format!("other ranks of its host have the {many} that it sees"),
            };
            tracing::warn!(
                "rank {rank} computes on the CPU, which is far slower than the GPUs of other ranks: {why}; start one \
                 rank for each GPU, or use --device cuda to end such a job"
            );
        }
    }
    Ok(device)
}

/// Which of the GPUs that it sees each rank of a host gets, so that none has two ranks and as many ranks as possible
/// have one. Ranks that see the same ones get them in order.
fn own_gpus(seen: &[&[String]]) -> Vec<Option<usize>> {
    let mut own = vec![None; seen.len()];
    for rank in 0..seen.len() {
        find(rank, seen, &mut own, &mut vec![false; seen.len()]);
    }
    own
}

/// Finds `rank` a free GPU, or one whose rank finds itself another.
fn find(rank: usize, seen: &[&[String]], own: &mut [Option<usize>], asked: &mut [bool]) -> bool {
    let owner = |own: &[Option<usize>], gpu: &String| {
        (0..own.len()).find(|&other| own[other].is_some_and(|at| seen[other][at] == *gpu))
    };
    if let Some(free) = seen[rank].iter().position(|gpu| owner(own, gpu).is_none()) {
        own[rank] = Some(free);
        return true;
    }
    for (at, gpu) in seen[rank].iter().enumerate() {
        let Some(other) = owner(own, gpu).filter(|&other| other != rank && !asked[other]) else { continue };
        asked[other] = true;
        if find(other, seen, own, asked) {
            own[rank] = Some(at);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(seen: &[&str]) -> Vec<Option<usize>> {
        let lists: Vec<Vec<String>> =
            seen.iter().map(|list| list.chars().map(|gpu| gpu.to_string()).collect()).collect();
        own_gpus(&lists.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    #[test]
    fn every_rank_gets_a_gpu_of_its_own_where_there_is_one() {
        assert_eq!(own(&["abcd", "abcd", "abcd"]), [Some(0), Some(1), Some(2)]);
        // Each rank is shown one: by CUDA_VISIBLE_DEVICES, or by Slurm.
        assert_eq!(own(&["a", "b", "c"]), [Some(0), Some(0), Some(0)]);
        assert_eq!(own(&["ab", "a", "bc"]), [Some(1), Some(0), Some(1)]);
        assert_eq!(own(&["ab", "ab", "a"]).iter().flatten().count(), 2);
        assert_eq!(own(&["a", "a", ""]), [Some(0), None, None]);
        assert_eq!(own(&["ba", "ab"]), [Some(0), Some(0)]);
    }
}
