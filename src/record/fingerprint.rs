//! What the output's bytes depend on, which a resumed run must have in common with the run that it continues.

use super::part::PartId;

/// Everything that the output's bytes depend on. Two runs with equal fingerprints write the same files.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint {
    /// distq's version.
    pub version: String,
    /// Digest of the source's configuration and headers.
    pub model: String,
    /// Digest of a sample of the source's weights, by part: the embedding, each layer, what follows the layers.
    pub weights: Vec<String>,
    /// Digest of the calibration tokens; empty where none are needed.
    pub data: String,
    /// Layout, scheme, method, ignored modules and shard size, as text.
    pub options: String,
}

impl Fingerprint {
    /// What differs between this fingerprint and the one in the journal, in words. Weights are not compared.
    pub(super) fn difference(&self, journal: &Fingerprint) -> Option<String> {
        let pairs = [
            ("the version of distq", &self.version, &journal.version),
            ("the model", &self.model, &journal.model),
            ("the calibration data", &self.data, &journal.data),
            ("the options", &self.options, &journal.options),
        ];
        pairs
            .into_iter()
            .find(|(_, now, then)| now != then)
            .map(|(what, now, then)| format!("{what} differs: now {now:?}, then {then:?}"))
    }

    /// Parts whose weights are not those of the journal's.
    pub(super) fn changed(&self, journal: &Fingerprint) -> Vec<PartId> {
        let count = self.weights.len().max(journal.weights.len());
        let part = |i: usize| match i {
            0 => PartId::Head,
            i if i + 1 == count => PartId::Tail,
            i => PartId::Layer(i - 1),
        };
        (0..count).filter(|&i| self.weights.get(i) != journal.weights.get(i)).map(part).collect()
    }
}
