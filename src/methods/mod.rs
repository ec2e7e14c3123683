//! How codes and scales are chosen. Knows neither files nor ranks.

mod max;

pub use max::{QuantizedLinear, quantize_linear, weight_amax};

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A way to choose codes and scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Block scales from block maxima, codes by rounding to nearest: what ModelOpt's max calibration does.
    Max,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Max => f.write_str("max"),
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(text: &str) -> Result<Method> {
        match text {
            "max" => Ok(Method::Max),
            other => Err(Error::usage(format!("there is no method {other:?}")).fix("use max")),
        }
    }
}
