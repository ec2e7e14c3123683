//! Rows in an order that a seed determines, without holding all of them.

use std::collections::BTreeMap;
use std::collections::btree_map::IntoIter;

use super::documents::{Document, Row, Source};
use super::select::CalibOptions;
use crate::error::Result;

/// Bytes of rows that are held at a time.
const HELD: usize = 256 << 20;

/// Where a row comes in the order: sorting by a hash of (seed, position) is a shuffle that depends on nothing else.
type Key = (u64, usize);

/// Rows in the order of their keys. Each pass over the source keeps those with the smallest keys that have not been
/// given yet; one pass is enough where few rows are skipped.
pub struct Shuffled {
    source: Source,
    seed: u64,
    /// Rows to keep in a pass.
    most: usize,
    /// Bytes to keep in a pass.
    room: usize,
    kept: IntoIter<Key, Row>,
    /// The last key of the passes before.
    last: Option<Key>,
    is_done: bool,
}

impl Shuffled {
    /// The rows that `options` ask for.
    pub fn new(options: &CalibOptions) -> Shuffled {
        let most = options.samples.saturating_mul(4).max(64);
        let source = options.source.clone();
        Shuffled {
            source,
            seed: options.seed,
            most,
            room: HELD,
            kept: IntoIter::default(),
            last: None,
            is_done: false,
        }
    }

    fn pass(&mut self) -> Result<()> {
        let mut kept: BTreeMap<Key, Row> = BTreeMap::new();
        let (mut bytes, mut end) = (0, None);
        for (position, row) in self.source.rows()?.enumerate() {
            let row = row?;
            let key = (splitmix(self.seed ^ splitmix(position as u64)), position);
            if self.last.is_some_and(|last| key <= last) || end.is_some_and(|end| key >= end) {
                continue;
            }
            bytes += size(&row);
            kept.insert(key, row);
            while kept.len() > self.most || (bytes > self.room && kept.len() > 1) {
                let (key, row) = kept.pop_last().expect("there is more than one");
                bytes -= size(&row);
                end = Some(key);
            }
        }
        self.is_done = end.is_none();
        // Where few rows can be used, the file is not to be read again for every few of them.
        self.most = self.most.saturating_mul(4);
        self.last = kept.keys().next_back().copied();
        self.kept = kept.into_iter();
        Ok(())
    }
}

impl Iterator for Shuffled {
    type Item = Result<(usize, Row)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(((_, position), row)) = self.kept.next() {
                return Some(Ok((position, row)));
            }
            if self.is_done {
                return None;
            }
            if let Err(error) = self.pass() {
                self.is_done = true;
                return Some(Err(error));
            }
        }
    }
}

/// About how many bytes a row holds.
fn size(row: &Row) -> usize {
    match &row.document {
        Ok(Document::Text(text)) => text.len(),
        Ok(Document::Ids(ids)) => 4 * ids.len(),
        Ok(Document::Conversation(conversation)) => conversation.messages.to_string().len(),
        Err(reason) => reason.len(),
    }
}

/// One step of SplitMix64 (Steele, Lea and Flood, 2014).
fn splitmix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(change: impl Fn(&mut Shuffled)) -> Vec<usize> {
        let options =
            CalibOptions { source: Source::Builtin, samples: 1, min_tokens: 0, max_tokens: 1, seed: 3 };
        let mut shuffled = Shuffled::new(&options);
        change(&mut shuffled);
        shuffled.map(|row| row.unwrap().0).collect()
    }

    #[test]
    fn the_order_is_that_of_all_rows_however_few_are_held() {
        let all = Source::Builtin.rows().unwrap().count();
        let mut expected: Vec<usize> = (0..all).collect();
        expected.sort_by_key(|&position| splitmix(3 ^ splitmix(position as u64)));
        assert_eq!(order(|s| s.most = usize::MAX), expected);
        assert_eq!(order(|_| {}), expected);
        assert_eq!(order(|s| s.room = 100_000), expected);
    }
}
