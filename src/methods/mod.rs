//! How codes and scales are chosen. Knows neither files nor ranks.
//!
//! [`max`](Codes::Max) needs an input's maximum alone. Everything else works on f32 matrices and on what calibration
//! summed up for a site ([`SiteStatistics`]), one layer at a time ([`layer`]). Arithmetic happens where the weights
//! are, behind [`crate::backend::Solver`]; here is what is tried and what is kept.

mod choose;
mod headroom;
mod hessian;
pub mod layer;
mod max;
mod smoothing;
mod statistics;

pub use max::{quantize_linear, weight_amax};
pub use smoothing::Smoothing;
pub use statistics::SiteStatistics;

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// How the codes of a linear are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// Block scales from block maxima, codes by rounding to nearest: what ModelOpt's max calibration does.
    Max,
    /// The block scale with the smallest squared error of the weights.
    Sweep,
    /// The same, each column weighted by its input's second moment.
    Wsweep,
    /// GPTQ, with block scales searched on the compensated weights.
    Gptq,
}

impl Codes {
    const ALL: [(&'static str, Codes); 4] =
        [("max", Codes::Max), ("sweep", Codes::Sweep), ("wsweep", Codes::Wsweep), ("gptq", Codes::Gptq)];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        Codes::ALL.iter().find(|(_, codes)| *codes == self).map(|(name, _)| *name).unwrap_or_default()
    }
}

/// A way to choose codes and scales: written as pieces joined by `+`, such as `smooth+wsweep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Fold smoothing factors into norms, v and up before anything is quantized.
    pub smooth: bool,
    /// How codes are chosen.
    pub codes: Codes,
    /// Keep GPTQ's codes of a linear only where they also win on documents that it has not seen.
    pub guard: bool,
    /// Leave room above the largest input where that costs nothing.
    pub headroom: bool,
}

impl Method {
    /// Max calibration alone.
    pub const MAX: Method = Method { smooth: false, codes: Codes::Max, guard: false, headroom: false };
    /// Every piece.
    pub const BEST: Method = Method { smooth: true, codes: Codes::Gptq, guard: true, headroom: true };

    /// What needs less memory than the others, the more accurate first: no Hessian, and no statistics at all.
    pub const LIGHTER: [Method; 2] =
        [Method { smooth: true, codes: Codes::Wsweep, guard: false, headroom: true }, Method::MAX];

    /// Whether a layer's inputs must be summed up and sampled, rather than their maximum taken.
    pub fn needs_statistics(self) -> bool {
        self != Method::MAX
    }

    /// Whether `Σ xᵀ·x` is needed.
    pub fn needs_products(self) -> bool {
        self.codes == Codes::Gptq
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Method::BEST {
            return f.write_str("best");
        }
        let smooth = if self.smooth { "smooth+" } else { "" };
        let guard = if self.guard { "+guard" } else { "" };
        let headroom = if self.headroom { "+headroom" } else { "" };
        write!(f, "{smooth}{}{guard}{headroom}", self.codes.name())
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(text: &str) -> Result<Method> {
        if text == "best" {
            return Ok(Method::BEST);
        }
        let fix =
            "use best, or pieces joined by +: [smooth+] max, sweep, wsweep, gptq or gptq+guard [+headroom]";
        let mut method = Method::MAX;
        let mut codes = None;
        for piece in text.split('+') {
            match (piece, Codes::ALL.iter().find(|(name, _)| *name == piece)) {
                ("smooth", _) if !method.smooth => method.smooth = true,
                ("guard", _) if !method.guard => method.guard = true,
                ("headroom", _) if !method.headroom => method.headroom = true,
                (_, Some((_, chosen))) if codes.is_none() => codes = Some(*chosen),
                _ => return Err(Error::usage(format!("there is no method {text:?}")).fix(fix)),
            }
        }
        method.codes = codes.unwrap_or(Codes::Max);
        if method.guard && method.codes != Codes::Gptq {
            return Err(Error::usage(format!("{text:?}: guard judges gptq, which is missing")).fix(fix));
        }
        Ok(method)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_read_as_they_are_written() {
        for text in ["max", "sweep", "wsweep", "gptq", "gptq+guard", "smooth+max", "max+headroom", "best"] {
            assert_eq!(text.parse::<Method>().unwrap().to_string(), text);
        }
        assert_eq!("smooth".parse::<Method>().unwrap().to_string(), "smooth+max");
        assert_eq!("guard+gptq+headroom+smooth".parse::<Method>().unwrap(), Method::BEST);
        for wrong in ["", "awq", "max+gptq", "smooth+smooth", "smooth+guard", "best+gptq"] {
            assert_eq!(wrong.parse::<Method>().unwrap_err().exit as i32, 2, "{wrong:?}");
        }
    }
}
