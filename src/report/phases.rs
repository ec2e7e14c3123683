//! Where a rank's time went.

/// Seconds by phase of one rank's walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Phases {
    /// The forward pass, reading weights included.
    pub forward: f64,
    /// Waiting for hidden states of the stage before.
    pub wait: f64,
    /// Choosing scales and codes.
    pub quantize: f64,
    /// Writing tensors, or handing them to rank 0.
    pub write: f64,
    /// From the first layer to the last byte.
    pub total: f64,
}
