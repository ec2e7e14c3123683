//! The NVFP4 number format: E2M1 codes in blocks of 16 with an E4M3 scale, and one f32 global scale a
//! tensor. Pure functions on slices; knows neither files, ranks nor models.
//!
//! One computation serves both on-disk layouts, every step one IEEE f32 operation in this order:
//!
//! ```text
//! global = amax / 2688                              2688 = 6 · 448
//! s      = block_amax / (6 · global), 1.0 if zero   the product is formed first
//! scale  = E4M3(clamp(s, 2^-9, 448))
//! code   = E2M1(w / (scale · global))
//! ```

pub mod activation;
mod block;
pub mod content;
pub mod e2m1;
pub mod e4m3;
mod error;
mod global;
mod quantized;
mod search;
#[cfg(test)]
mod tests;

pub use block::{Element, amax, dequantize, first_non_finite, quantize};
pub use error::Distance;
pub use global::GlobalScale;
pub use quantized::QuantizedLinear;
pub use search::{best_scale, quantize_searched};

/// Consecutive input features that share a block scale.
pub const BLOCK: usize = 16;
