//! Merge rules of byte-pair encodings that come as a list of tokens.

use std::collections::HashMap;

/// A token of more bytes is no token: the rules of a token take its length squared to find.
const LONGEST: usize = 1024;

/// The rules by which pairs of tokens make others, in the order in which they apply: that of the tokens they make, and
/// for one token that of `order`, which is given the ids of the two parts.
///
/// # Errors
/// A token that is too long to be one.
pub fn merges<'a, K: Ord>(
    ids: &HashMap<&'a str, usize>,
    tokens: impl IntoIterator<Item = &'a str>,
    order: impl Fn(usize, usize, &str) -> K,
) -> Result<Vec<(&'a str, &'a str)>, String> {
    let mut merges = Vec::new();
    for token in tokens {
        if token.len() > LONGEST {
            return Err(format!("it has a token of {} bytes", token.len()));
        }
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let known = cuts.filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, left, right)));
        let mut pairs: Vec<_> = known.collect();
        pairs.sort_by_key(|(left, right, text, _)| order(*left, *right, text));
        merges.extend(pairs.into_iter().map(|(.., left, right)| (left, right)));
    }
    Ok(merges)
}
