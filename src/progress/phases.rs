//! Where a rank's time went.

/// Seconds by phase of one rank's walk, and how much it walked. Quantizing and writing run beside the forward pass, so
/// phases add up to more than the total.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Phases {
    /// The forward pass, by the clock of the device.
    pub forward: f64,
    /// Waiting for hidden states of the stage before, or of the embedding.
    pub wait: f64,
    /// Hidden states between the device and other ranks (or the embedding): copying them and handing them over, each way
    /// on a thread of its own.
    pub transfer: f64,
    /// Choosing scales and codes.
    pub quantize: f64,
    /// Writing tensors, or handing them to rank 0.
    pub write: f64,
    /// Micro-batches that were computed through a layer, counted once for each layer and each time.
    pub passes: u64,
    /// From the first layer to the last byte.
    pub total: f64,
}
