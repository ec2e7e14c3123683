//! Rotary position embedding: inverse frequencies for every scaling type, and the cosine tables.
//!
//! Formulas: linear interpolation (Chen et al., arXiv 2306.15595); dynamic NTK (as published by its
//! author and used by Transformers); YaRN (Peng et al., arXiv 2309.00071); Llama 3.1's smoothed
//! wavelengths. Intermediate values are f32 where the reference implementation's are.

use serde_json::Value;

use super::config::Config;
use super::fields::Fields;
use super::sizes::Sizes;
use crate::error::{Error, Result};

/// Rotary embedding of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    theta: f64,
    dim: usize,
    scaling: Scaling,
    /// Which features are pairs, and how turned pairs are rounded.
    pub style: RopeStyle,
}

/// Which features are pairs, and how turned pairs are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RopeStyle {
    /// Whether features `2i` and `2i + 1` are a pair; otherwise features `i` and `i + dim / 2` are.
    pub interleaved: bool,
    /// Whether a turned feature is rounded once; otherwise each of its two products is, and then their sum.
    pub rounds_once: bool,
    /// Whether cosines and sines stay f32, whatever is computed in.
    pub exact_tables: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Scaling {
    Default,
    Linear { factor: f64 },
    Dynamic { factor: f64, max_positions: usize },
    Llama3 { factor: f64, low: f64, high: f64, original_positions: f64 },
    Yarn { factor: f64, attention: f64, low: f64, high: f64 },
}

/// Cosines and sines of a set of documents, and the table row of each token.
///
/// Documents share rows unless the scaling depends on a document's length (dynamic NTK beyond the
/// trained positions): such a document has rows of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Columns: half of the head's features.
    pub cols: usize,
    /// `[rows, cols]`, attention scaling included.
    pub cos: Vec<f32>,
    /// `[rows, cols]`, attention scaling included.
    pub sin: Vec<f32>,
    starts: Vec<u32>,
}

impl RopeTable {
    /// The table rows of document `index`'s tokens, in order.
    pub fn rows(&self, index: usize, length: usize) -> impl Iterator<Item = u32> {
        let start = self.starts[index];
        (0..length as u32).map(move |position| start + position)
    }
}

impl Rope {
    /// Reads the one rotary embedding of a model whose layers all have the same, of heads with `dim` features. Where
    /// `rope_scaling` has fields, it takes the place of `rope_parameters` with all that is in it, as in Transformers 5.
    ///
    /// # Errors
    /// Exit code 3: a field that is malformed or missing, a kind of scaling that is not known, rotary embeddings that
    /// differ by kind of layer.
    pub fn read(config: &Config<'_>, sizes: &Sizes, dim: usize) -> Result<Rope> {
        let scaling = parameters(&config.text)?;
        if let Some((kind, _)) = scaling.iter().flat_map(|s| s.map).find(|(_, value)| value.is_object()) {
            let what = format!("differ by kind of layer ({kind}), which this family does not have");
            return Err(config.text.wrong("rope_parameters", what));
        }
        Rope::of(&config.text, scaling, (sizes.theta, sizes.max_positions), dim)
    }

    /// The rotary embedding that an object of parameters describes, or `fields` alone. The theta of a file that has none
    /// is `default_theta`.
    fn of(
        fields: &Fields<'_>,
        scaling: Option<Fields<'_>>,
        (default_theta, max_positions): (f64, usize),
        dim: usize,
    ) -> Result<Rope> {
        let either = |name: &str| match &scaling {
            Some(s) => Ok(s.number(name)?.or(fields.number(name)?)),
            None => fields.number(name),
        };
        let theta = either("rope_theta")?.unwrap_or(default_theta);
        let partial = either("partial_rotary_factor")?;
        if partial.is_some_and(|factor| factor != 1.0) {
            return Err(Error::input("config.json: partial_rotary_factor other than 1 is not supported")
                .fix("use a checkpoint with full rotary embedding"));
        }
        let scaling = match scaling {
            None => Scaling::Default,
            Some(s) => Scaling::parse(&s, fields, theta, max_positions, dim)?,
        };
        Ok(Rope { theta, dim, scaling, style: RopeStyle::default() })
    }

    /// Tables for documents of these lengths (tokens).
    pub fn table(&self, lengths: &[usize]) -> RopeTable {
        let mut table = RopeTable { cols: self.dim / 2, cos: vec![], sin: vec![], starts: vec![] };
        let shared = lengths.iter().copied().filter(|&n| !self.own_rows(n)).max().unwrap_or(0);
        table.extend(&self.inverse_frequencies(shared), self.attention(), shared);
        for &length in lengths {
            if self.own_rows(length) {
                table.starts.push((table.cos.len() / table.cols) as u32);
                table.extend(&self.inverse_frequencies(length), self.attention(), length);
            } else {
                table.starts.push(0);
            }
        }
        table
    }

    fn own_rows(&self, length: usize) -> bool {
        matches!(self.scaling, Scaling::Dynamic { max_positions, .. } if length > max_positions)
    }

    fn attention(&self) -> f32 {
        match self.scaling {
            Scaling::Yarn { attention, .. } => attention as f32,
            _ => 1.0,
        }
    }

    /// `[dim / 2]` inverse frequencies for a document of `length` tokens.
    fn inverse_frequencies(&self, length: usize) -> Vec<f32> {
        let dim = self.dim as f64;
        let theta = match self.scaling {
            Scaling::Dynamic { factor, max_positions } if length > max_positions => {
                let stretch = factor * length as f64 / max_positions as f64 - (factor - 1.0);
                self.theta * stretch.powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        let base = (0..self.dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / self.dim as f32;
            1.0 / (theta as f32).powf(exponent)
        });
        match self.scaling {
            Scaling::Default | Scaling::Dynamic { .. } => base.collect(),
            Scaling::Linear { factor } => base.map(|f| f / factor as f32).collect(),
            Scaling::Llama3 { factor, low, high, original_positions } => base
                .map(|f| {
                    let wavelength = 2.0 * std::f64::consts::PI / f as f64;
                    if wavelength < original_positions / high {
                        f
                    } else if wavelength > original_positions / low {
                        (f as f64 / factor) as f32
                    } else {
                        let smooth = (original_positions / wavelength - low) / (high - low);
                        ((1.0 - smooth) * f as f64 / factor + smooth * f as f64) as f32
                    }
                })
                .collect(),
            Scaling::Yarn { factor, low, high, .. } => base
                .enumerate()
                .map(|(i, f)| {
                    let high = if low == high { high + 0.001 } else { high };
                    let interpolate = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    f / factor as f32 * interpolate + f * (1.0 - interpolate)
                })
                .collect(),
        }
    }
}

/// The object that holds rotary parameters: `rope_scaling` or `rope_parameters`, whichever has fields, in this order.
fn parameters<'a>(fields: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    let filled = |name: &str, path| Ok(fields.object(name, path)?.filter(|object| !object.map.is_empty()));
    match filled("rope_scaling", "rope_scaling.")? {
        Some(scaling) => Ok(Some(scaling)),
        None => filled("rope_parameters", "rope_parameters."),
    }
}

impl RopeTable {
    fn extend(&mut self, inverse_frequencies: &[f32], attention: f32, positions: usize) {
        for position in 0..positions {
            for &frequency in inverse_frequencies {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                self.cos.push(cos * attention);
                self.sin.push(sin * attention);
            }
        }
    }
}

impl Scaling {
    fn parse(
        scaling: &Fields<'_>,
        config: &Fields<'_>,
        theta: f64,
        max_positions: usize,
        head_dim: usize,
    ) -> Result<Scaling> {
        let kind = scaling.text("rope_type")?.or(scaling.text("type")?).unwrap_or("default");
        let need = |name: &str| -> Result<f64> {
            scaling
                .number(name)?
                .ok_or_else(|| scaling.wrong(name, format!("is missing for rope type {kind}")))
        };
        let original_positions = || -> Result<f64> {
            Ok(config
                .number("original_max_position_embeddings")?
                .or(scaling.number("original_max_position_embeddings")?)
                .unwrap_or(max_positions as f64))
        };
        Ok(match kind {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: need("factor")? },
            "dynamic" => Scaling::Dynamic { factor: need("factor")?, max_positions },
            "llama3" => Scaling::Llama3 {
                factor: need("factor")?,
                low: need("low_freq_factor")?,
                high: need("high_freq_factor")?,
                original_positions: original_positions()?,
            },
            "yarn" => {
                let original = original_positions()?;
                let factor = scaling.number("factor")?.unwrap_or(max_positions as f64 / original);
                let optional = |name: &str| -> Result<Option<f64>> {
                    match scaling.get(name).and_then(Value::as_f64) {
                        Some(0.0) => Ok(None),
                        _ => scaling.number(name),
                    }
                };
                let magnitude =
                    |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
                let attention = match scaling.number("attention_factor")? {
                    Some(attention) => attention,
                    None => match (optional("mscale")?, optional("mscale_all_dim")?) {
                        (Some(m), Some(all)) => magnitude(m) / magnitude(all),
                        _ => magnitude(1.0),
                    },
                };
                let dim = head_dim as f64;
                let pair_of = |rotations: f64| {
                    dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
                };
                let mut low = pair_of(optional("beta_fast")?.unwrap_or(32.0));
                let mut high = pair_of(optional("beta_slow")?.unwrap_or(1.0));
                if scaling.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
                    (low, high) = (low.floor(), high.ceil());
                }
                Scaling::Yarn { factor, attention, low: low.max(0.0), high: high.min(dim - 1.0) }
            }
            other => {
                return Err(Error::input(format!("config.json: rope type {other:?} is not supported"))
                    .fix("use a checkpoint with rope type default, linear, dynamic, llama3 or yarn"));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rope(config: Value) -> Rope {
        let fields = Fields::new(config.as_object().unwrap());
        Rope::of(&fields, parameters(&fields).unwrap(), (10_000.0, 16), 8).unwrap()
    }

    #[test]
    fn documents_within_the_trained_positions_share_rows() {
        let rope = rope(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}));
        let table = rope.table(&[10, 20, 16]);
        assert_eq!(table.rows(0, 10).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
        assert_eq!(table.rows(1, 20).next(), Some(16));
        assert_eq!(table.rows(2, 16).next(), Some(0));
        assert_eq!(table.cos.len(), (16 + 20) * 4);
        assert_ne!(table.cos[4 + 1], table.cos[(16 + 1) * 4 + 1], "a long document rotates more slowly");
    }

    #[test]
    fn both_spellings_of_the_configuration_agree() {
        let old = rope(json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}));
        let new = rope(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}));
        assert_eq!(old, new);
    }

    #[test]
    fn rope_scaling_takes_the_place_of_rope_parameters() {
        let parameters = json!({"rope_type": "default", "rope_theta": 5e5});
        let scaling = json!({"rope_type": "linear", "factor": 4.0});
        // With all that is in them: theta, too, is then the default.
        let both = rope(json!({"rope_parameters": parameters, "rope_scaling": scaling}));
        assert_eq!(both, rope(json!({"rope_scaling": scaling})));
        assert_ne!(both, rope(json!({"rope_theta": 5e5, "rope_scaling": scaling})));
        for nothing in [json!(null), json!({})] {
            let one = rope(json!({"rope_parameters": parameters, "rope_scaling": nothing}));
            assert_eq!(one, rope(json!({"rope_theta": 5e5})));
        }
    }

    #[test]
    fn linear_scaling_slows_every_pair() {
        let plain = rope(json!({})).inverse_frequencies(4);
        let linear = rope(json!({"rope_scaling": {"type": "linear", "factor": 4.0}})).inverse_frequencies(4);
        assert_eq!(plain.len(), 4);
        assert!(plain.iter().zip(&linear).all(|(p, l)| (p / l - 4.0).abs() < 1e-6));
    }

    #[test]
    fn yarn_scales_the_cosines() {
        let rope = rope(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}));
        let table = rope.table(&[1]);
        assert!((table.cos[0] - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    }
}
