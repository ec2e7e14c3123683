//! The hidden states that a file holds.

use std::ops::Range;

/// The hidden states of consecutive documents before a layer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Kept {
    /// The decoder layer whose input they are.
    pub layer: usize,
    /// The documents.
    pub documents: Range<usize>,
}

impl Kept {
    /// Whether it holds the hidden states of these documents before this layer.
    pub fn holds(&self, layer: usize, documents: &Range<usize>) -> bool {
        self.layer == layer && self.covers(documents)
    }

    /// Whether it holds these documents.
    pub fn covers(&self, documents: &Range<usize>) -> bool {
        self.documents.start <= documents.start && documents.end <= self.documents.end
    }
}
