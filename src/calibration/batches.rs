//! Documents packed into micro-batches: made once from the data, whatever the ranks.

use std::ops::Range;

/// Consecutive documents that walk through the layers together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// The documents.
    pub samples: Range<usize>,
}

/// Packs documents of these lengths, in order, up to `target` tokens each; a longer one stands alone.
pub fn micro_batches(lengths: &[usize], target: usize) -> Vec<MicroBatch> {
    let mut batches: Vec<MicroBatch> = Vec::new();
    let mut tokens = usize::MAX;
    for (i, &length) in lengths.iter().enumerate() {
        match batches.last_mut() {
            Some(batch) if tokens + length <= target => {
                batch.samples.end = i + 1;
                tokens += length;
            }
            _ => {
                batches.push(MicroBatch { samples: i..i + 1 });
                tokens = length;
            }
        }
    }
    batches
}

/// Pairs of a token and one that it sees, itself included, in documents of these lengths, where a token sees at most
/// `window` tokens.
pub fn pairs(window: Option<usize>, lengths: &[usize]) -> u64 {
    let seen = |length: usize| {
        let window = window.unwrap_or(length).min(length);
        window * (window + 1) / 2 + (length - window) * window
    };
    lengths.iter().map(|&length| seen(length) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_bounds_what_a_token_sees() {
        assert_eq!(pairs(None, &[1, 4]), 1 + 10);
        assert_eq!(pairs(Some(2), &[1, 4]), 1 + 7);
    }

    #[test]
    fn documents_are_packed_in_order_up_to_the_target() {
        let packed = micro_batches(&[400, 600, 1, 2000, 500, 500, 500], 1000);
        let ranges: Vec<_> = packed.into_iter().map(|batch| batch.samples).collect();
        assert_eq!(ranges, [0..2, 2..3, 3..4, 4..6, 6..7]);
        assert!(micro_batches(&[], 1000).is_empty());
    }
}
