//! The parts of a model, and what is recorded of each: the journal holds these records, and the report shows them.

use crate::methods::Smoothing;
use crate::methods::layer::Verdict;

/// A part of the model, as the journal and the report name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartId {
    /// The embedding.
    Head,
    /// A decoder layer.
    Layer(usize),
    /// The final norm and lm_head.
    Tail,
}

impl std::fmt::Display for PartId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PartId::Head => write!(f, "the embedding"),
            PartId::Layer(layer) => write!(f, "layer {layer}"),
            PartId::Tail => write!(f, "the final norm and lm_head"),
        }
    }
}

impl PartId {
    /// Whether the output tensors of this part depend on the weights of `other`. Where the forward pass is computed
    /// (`forwarded`), a layer's inputs depend on all layers before it.
    pub(super) fn depends_on(self, other: PartId, forwarded: bool) -> bool {
        match (self, other) {
            (PartId::Layer(layer), PartId::Layer(before)) if forwarded => before <= layer,
            (PartId::Layer(_), PartId::Head) => forwarded,
            _ => self == other,
        }
    }
}

/// A finished part: all its tensors are at their places.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PartRecord {
    /// Which part.
    pub part: PartId,
    /// blake3 of each of its output tensors, in the inventory's order.
    pub digests: Vec<String>,
    /// The measurements of its fused groups.
    pub groups: Vec<GroupRecord>,
}

/// The measurements of one fused group.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GroupRecord {
    /// The name of its site in the layer.
    pub site: String,
    /// `max |x|` of the input over all calibration tokens; absent where none was needed.
    pub input_amax: Option<f32>,
    /// Module names and their `max |w|`.
    pub members: Vec<(String, f32)>,
    /// What a method other than max chose, and the errors of that choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
}

/// What was chosen for one fused group.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Chosen {
    /// Its fold.
    pub smoothing: Option<Smoothing>,
    /// The largest input that its scale can represent, as a multiple of the largest calibrated one.
    pub headroom: f32,
    /// The damping of its Hessian.
    pub damping: Option<f32>,
    /// The reason where codes were chosen in another way than the method says.
    pub fallback: Option<String>,
    /// The errors of each member.
    pub verdicts: Vec<Verdict>,
}

/// The running maxima of an unfinished layer's inputs. They don't depend on how documents were grouped.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Observed {
    /// The decoder layer.
    pub layer: usize,
    /// So many documents have passed, from the first on.
    pub documents: usize,
    /// `max |x|` by site.
    pub maxima: Vec<f32>,
}
