//! Rotary position embedding: inverse frequencies for every scaling type, and the cosine tables.
//!
//! Formulas: linear interpolation (Chen et al., arXiv 2306.15595); dynamic NTK (as published by its
//! author and used by Transformers); YaRN (Peng et al., arXiv 2309.00071); Llama 3.1's smoothed
//! wavelengths. Intermediate values are f32 where the reference implementation's are.

use serde_json::{Map, Value};

use super::config::fields::Fields;
use super::config::sizes::Sizes;
use super::config::{Config, FULL};
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
    Linear {
        factor: f64,
    },
    Dynamic {
        factor: f64,
        max_positions: usize,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original_positions: f64,
    },
    Yarn {
        factor: f64,
        attention: f64,
        low: f64,
        high: f64,
    },
    /// Each pair has a factor, another one in documents that are longer than `original_positions`.
    LongRope {
        short: Vec<f32>,
        long: Vec<f32>,
        attention: f64,
        original_positions: usize,
    },
    /// The first `pairs` rotate, at frequencies that all of the head's features share.
    Proportional {
        pairs: usize,
    },
}

/// What a family says of its rotary embedding.
#[derive(Clone, Debug)]
pub struct RopeOptions {
    /// The base where config.json has none.
    pub theta: f64,
    /// The share of a head's features that rotate, where config.json has none.
    pub partial: f64,
    /// Features of a head.
    pub head_dim: usize,
    /// Positions before scaling, where config.json has none; as many as after it where the family does not say.
    pub original_positions: Option<usize>,
    /// The parameters of a file that has none.
    pub absent: Value,
    /// Names of kinds that mean another kind here.
    pub renamed: &'static [(&'static str, &'static str)],
    /// Which features are pairs, and how they are rounded.
    pub style: RopeStyle,
}

impl RopeOptions {
    /// Llama's: all features of a head rotate, in halves.
    pub fn llama(theta: f64, head_dim: usize) -> RopeOptions {
        RopeOptions {
            theta,
            partial: 1.0,
            head_dim,
            original_positions: None,
            absent: Value::Null,
            // Three positions that are equal for text.
            renamed: &[("mrope", "default")],
            style: RopeStyle::default(),
        }
    }
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
    /// Reads the one rotary embedding of a model whose layers all have the same. Where `rope_scaling` has fields, it
    /// takes the place of `rope_parameters` with all that is in it, as in Transformers 5.
    ///
    /// # Errors
    /// Exit code 3: a field that is malformed or missing, a kind of scaling that is not known, rotary embeddings that
    /// differ by kind of layer.
    pub fn read(config: &Config<'_>, sizes: &Sizes, options: &RopeOptions) -> Result<Rope> {
        let given = parameters(&config.text)?;
        if let Some((kind, _)) = given.iter().flat_map(|given| given.map).find(|(_, value)| value.is_object())
        {
            let what = format!("differ by kind of layer ({kind}), which this family does not have");
            return Err(config.text.wrong("rope_parameters", what));
        }
        let absent = options.absent.as_object();
        let mut merged = given.map(|given| given.map).or(absent).cloned().unwrap_or_default();
        for name in ["rope_theta", "partial_rotary_factor"] {
            if let (false, Some(value)) = (merged.contains_key(name), config.text.get(name)) {
                merged.insert(name.into(), value.clone());
            }
        }
        // At the top it overrides the one among the parameters.
        const ORIGINAL: &str = "original_max_position_embeddings";
        if let Some(value) = config.text.get(ORIGINAL) {
            merged.insert(ORIGINAL.into(), value.clone());
        }
        Rope::of(merged, sizes.max_positions, options)
    }

    /// Reads the rotary embedding of one kind of layers, where each kind has its own: the parameters stand under the
    /// kind's name in `rope_parameters`. In the older spelling `rope_scaling` is about layers that see everything, and
    /// `theta_field` has this kind's theta.
    ///
    /// # Errors
    /// As [`Rope::read`].
    pub fn of_kind(
        config: &Config<'_>,
        sizes: &Sizes,
        (kind, theta_field): (&str, &str),
        options: &RopeOptions,
    ) -> Result<Rope> {
        let given = config.text.object("rope_parameters", "rope_parameters.")?;
        let of_kind = given.map(|given| given.object(kind, "rope_parameters.")).transpose()?.flatten();
        let mut merged = match (given, of_kind, &options.absent) {
            (_, Some(of_kind), _) => of_kind.map.clone(),
            (None, None, Value::Object(absent)) => absent.clone(),
            _ => Map::new(),
        };
        if kind == FULL
            && let Some(scaling) = config.text.object("rope_scaling", "rope_scaling.")?
        {
            merged.extend(scaling.map.clone());
        }
        if let (false, Some(theta)) = (merged.contains_key("rope_theta"), config.text.get(theta_field)) {
            merged.insert("rope_theta".into(), theta.clone());
        }
        // Transformers looks for it where there can't be one.
        merged.remove("truncate");
        Rope::of(merged, sizes.max_positions, options)
    }

    /// The rotary embedding that parameters in one object describe.
    fn of(parameters: Map<String, Value>, max_positions: usize, options: &RopeOptions) -> Result<Rope> {
        let fields = Fields::inside(&parameters, "rope_parameters.");
        let theta = fields.number("rope_theta")?.unwrap_or(options.theta);
        let partial = fields.number("partial_rotary_factor")?.unwrap_or(options.partial);
        let kind = fields.text("rope_type")?.or(fields.text("type")?).unwrap_or("default");
        let kind = options.renamed.iter().find(|(old, _)| *old == kind).map_or(kind, |(_, new)| new);
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(fields.wrong("partial_rotary_factor", format!("is {partial}, not a share of a head")));
        }
        let share = (options.head_dim as f64 * partial) as usize;
        let dim = if kind == "proportional" { options.head_dim } else { share };
        if dim < 2 || dim % 2 != 0 {
            let what =
                format!("is {partial}, so {dim} of {} features rotate: not an even number", options.head_dim);
            return Err(fields.wrong("partial_rotary_factor", what));
        }
        // A fixed stretch of the base, by an older name.
        if let (true, Some(alpha)) = (kind == "dynamic", fields.number("alpha")?) {
            let theta = theta * alpha.powf(dim as f64 / (dim as f64 - 2.0));
            return Ok(Rope { theta, dim, scaling: Scaling::Default, style: options.style });
        }
        let scaling = Scaling::parse(kind, &fields, (theta, max_positions), (dim, share), options)?;
        Ok(Rope { theta, dim, scaling, style: options.style })
    }

    /// The same with another base.
    pub fn with_theta(&self, theta: f64) -> Rope {
        Rope { theta, ..self.clone() }
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
        match self.scaling {
            Scaling::Dynamic { max_positions, .. } => length > max_positions,
            Scaling::LongRope { original_positions, .. } => length > original_positions,
            _ => false,
        }
    }

    fn attention(&self) -> f32 {
        match self.scaling {
            Scaling::Yarn { attention, .. } | Scaling::LongRope { attention, .. } => attention as f32,
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
        match self.scaling.clone() {
            Scaling::Default | Scaling::Dynamic { .. } => base.collect(),
            Scaling::LongRope { short, long, original_positions, .. } => {
                let factors = if length > original_positions { long } else { short };
                let power = |i: usize| (theta as f32).powf((2 * i) as f32 / self.dim as f32);
                factors.iter().enumerate().map(|(i, factor)| 1.0 / (factor * power(i))).collect()
            }
            Scaling::Proportional { pairs } => {
                base.enumerate().map(|(i, f)| if i < pairs { f } else { 0.0 }).collect()
            }
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
pub(super) fn parameters<'a>(fields: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    let filled = |name: &str, path| Ok(fields.object(name, path)?.filter(|object| !object.map.is_empty()));
    match filled("rope_scaling", "rope_scaling.")? {
        Some(scaling) => Ok(Some(scaling)),
        None => filled("rope_parameters", "rope_parameters."),
    }
}

/// A list of as many positive numbers as there are pairs.
fn pair_factors(scaling: &Fields<'_>, name: &str, pairs: usize) -> Result<Vec<f32>> {
    let numbers = scaling.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let factors: Vec<f32> = numbers.iter().filter_map(Value::as_f64).map(|x| x as f32).collect();
    if factors.len() != pairs || factors.iter().any(|factor| !(*factor > 0.0 && factor.is_finite())) {
        return Err(scaling.wrong(name, format!("is not a list of {pairs} positive numbers")));
    }
    Ok(factors)
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
        kind: &str,
        scaling: &Fields<'_>,
        (theta, max_positions): (f64, usize),
        (dim, share): (usize, usize),
        options: &RopeOptions,
    ) -> Result<Scaling> {
        let need = |name: &str| -> Result<f64> {
            scaling
                .number(name)?
                .ok_or_else(|| scaling.wrong(name, format!("is missing for rope type {kind}")))
        };
        let original_positions = || -> Result<f64> {
            let given = scaling.number("original_max_position_embeddings")?;
            Ok(given.unwrap_or(options.original_positions.unwrap_or(max_positions) as f64))
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
                let dim = dim as f64;
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
            "longrope" => {
                let original = original_positions()?;
                let factor = scaling.number("factor")?.unwrap_or(max_positions as f64 / original);
                let attention = match scaling.number("attention_factor")? {
                    Some(attention) => attention,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original.ln()).sqrt(),
                };
                let factors = |name: &str| pair_factors(scaling, name, dim / 2);
                Scaling::LongRope {
                    short: factors("short_factor")?,
                    long: factors("long_factor")?,
                    attention,
                    original_positions: original as usize,
                }
            }
            "proportional" => Scaling::Proportional { pairs: share / 2 },
            other => {
                return Err(Error::input(format!("config.json: rope type {other:?} is not supported")).fix(
                    "use a checkpoint with rope type default, linear, dynamic, llama3, yarn, longrope or proportional",
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rope(config: Value) -> Rope {
        let mut whole = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 32, "vocab_size": 8,
            "num_attention_heads": 4, "num_hidden_layers": 1, "max_position_embeddings": 16,
        });
        whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let model = crate::model::Model::parse(whole.as_object().unwrap(), &|_| false).unwrap();
        model.ropes[0].clone()
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
