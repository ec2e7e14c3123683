//! Telling models of one shape apart: a digest of some of every tensor's bytes.

use std::os::unix::fs::FileExt;

use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, Entry};
use crate::error::{Error, Result};

/// Blocks that are read of all tensors together, and bytes of each. On a disk that seeks these are a minute at most.
const BLOCKS: u64 = 8192;
const BLOCK: u64 = 4096;

/// Blocks of a tensor at least: the first, the last, and two between them.
const LEAST: u64 = 4;

impl Checkpoint {
    /// For each group of tensors, blake3 of bytes that lie spread over each of them, from its first to its last: all of
    /// a small tensor, and of a large one so many blocks that all tensors together have no more than 32 MiB; of FP8 weights, scales as well. Paths
    /// and shards don't count, so copies on other hosts compare equal. A change of all of a tensor's elements, of low rank
    /// or not, is seen; one of a few elements may not be.
    ///
    /// # Errors
    /// Exit code 3 where a tensor is missing; 5, naming the file, where one can't be read.
    pub fn sample(&self, groups: impl IntoIterator<Item = Vec<String>>) -> Result<Vec<String>> {
        self.sample_blocks(&groups.into_iter().collect::<Vec<_>>(), BLOCKS)
    }

    fn sample_blocks(&self, groups: &[Vec<String>], most: u64) -> Result<Vec<String>> {
        let tensors: u64 = groups.iter().map(|group| group.len() as u64).sum();
        let blocks = (most / tensors.max(1)).max(LEAST);
        let sampled = |group: &Vec<String>| {
            let digests = group.par_iter().map(|name| self.sample_of(name, self.entry(name)?, blocks));
            let mut whole = blake3::Hasher::new();
            for digest in digests.collect::<Result<Vec<_>>>()? {
                whole.update(digest.as_bytes());
            }
            Ok(whole.finalize().to_hex().to_string())
        };
        groups.par_iter().map(sampled).collect()
    }

    fn sample_of(&self, name: &str, entry: &Entry, blocks: u64) -> Result<blake3::Hash> {
        let mut digest = blake3::Hasher::new();
        digest.update(format!("{name} {:?} {:?}\n", entry.stored_dtype(), entry.shape).as_bytes());
        let mut read = |at: u64, bytes: u64| {
            let mut buffer = vec![0; bytes as usize];
            self.handles[entry.file].read_exact_at(&mut buffer, entry.offset + at).map_err(|e| {
                Error::run(format!("can't read the source: {e}"))
                    .file(&self.files[entry.file])
                    .tensor(name)
                    .fix("check the disk or the network it is on")
            })?;
            digest.update(&buffer);
            Ok(())
        };
        let bytes = entry.length();
        if bytes <= blocks * BLOCK {
            read(0, bytes)?;
        } else {
            let last = bytes - BLOCK;
            (0..blocks).try_for_each(|i| read(last * i / (blocks - 1), BLOCK))?;
        }
        if let Some(fp8) = &entry.fp8 {
            digest.update(self.sample_of(&fp8.scales, &fp8.lie, blocks)?.as_bytes());
        }
        Ok(digest.finalize())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    /// A checkpoint of two tensors, one of them larger than what is sampled of it.
    fn write(dir: &Path, large: &[u8], small: &[u8]) {
        let view = |bytes| TensorView::new(Dtype::U8, vec![<[u8]>::len(bytes)], bytes).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        let tensors = [("large", view(large)), ("small", view(small))];
        safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors")).unwrap();
    }

    #[test]
    fn changes_of_any_part_are_seen_in_their_group_alone() {
        let dir = tempfile::tempdir().unwrap();
        let sample = |large: &[u8], small: &[u8]| {
            write(dir.path(), large, small);
            Checkpoint::open(dir.path())
                .unwrap()
                .sample([vec!["large".into()], vec!["small".into()], vec![]])
                .unwrap()
        };
        let (large, small) = (vec![7; 1 << 20], vec![7; 1000]);
        let before = sample(&large, &small);
        assert_eq!(sample(&large, &small), before);
        for at in [0, large.len() - 1] {
            let mut changed = large.clone();
            changed[at] ^= 1;
            let after = sample(&changed, &small);
            assert!(after[0] != before[0] && after[1..] == before[1..], "byte {at}");
        }
        // Every hundredth of it has a block.
        for part in 0..100 {
            let mut changed = large.clone();
            let length = large.len() / 100;
            changed[part * length..][..length].fill(8);
            assert_ne!(sample(&changed, &small)[0], before[0], "part {part}");
        }
        let mut changed = small.clone();
        changed[500] ^= 1;
        assert_ne!(sample(&large, &changed)[1], before[1]);
        // As large as the blocks that are read, and a byte more.
        for bytes in [128 * 4096, 128 * 4096 + 1] {
            assert_eq!(sample(&vec![7; bytes], &small), sample(&vec![7; bytes], &small));
        }
    }
}
