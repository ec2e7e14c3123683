//! One decoder layer as data: its blocks, the tensors that they are made of, and the sites at which inputs meet
//! weights. A family says how a layer is put together; everything else reads it here.

use super::attention::{Attention, Projections};
use super::mlp::Mlp;
use crate::backend::{Gamma, NormKind};

/// A tensor of the source checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name, e.g. `model.norm.weight`.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

/// A linear layer as it is stored: `out = x · weightᵀ + bias`. Some families store several matrices as one, for example
/// q, k and v; that is one linear, of whose output the forward pass takes columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module name, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Whether the source has a bias `[rows]`.
    pub bias: bool,
}

impl LinearSpec {
    /// The weight's tensor name.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The bias's tensor name, where there is one.
    pub fn bias(&self) -> Option<String> {
        self.bias.then(|| format!("{}.bias", self.name))
    }
}

/// A norm and its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// What is computed.
    pub kind: NormKind,
    /// The stored weight, where it has one.
    pub weight: Option<TensorSpec>,
    /// The stored bias, where it has one.
    pub bias: Option<TensorSpec>,
}

impl Gamma {
    /// What a stored weight multiplies by. `round` rounds to the dtype that the weight is stored in, in which it is
    /// computed with.
    pub fn of_weight(self, weight: f32, round: impl Fn(f32) -> f32) -> f32 {
        match self {
            Gamma::Weight => weight,
            Gamma::OnePlus => 1.0 + weight,
            Gamma::OnePlusRounded => round(1.0 + weight),
            Gamma::One => 1.0,
        }
    }

    /// The stored weight that multiplies by `factor`.
    pub fn to_weight(self, factor: f32) -> f32 {
        match self {
            Gamma::Weight | Gamma::One => factor,
            Gamma::OnePlus | Gamma::OnePlusRounded => factor - 1.0,
        }
    }
}

/// What a family says of a norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormForm {
    /// What is computed.
    pub kind: NormKind,
    /// Whether there is a bias.
    pub bias: bool,
}

impl From<NormKind> for NormForm {
    fn from(kind: NormKind) -> NormForm {
        NormForm { kind, bias: false }
    }
}

impl Norm {
    /// The norm of module `name`, whose tensors have this shape.
    pub(super) fn new(form: NormForm, name: &str, shape: &[usize]) -> Norm {
        let tensor = |part: &str| TensorSpec { name: format!("{name}.{part}"), shape: shape.to_vec() };
        let weight = (form.kind.gamma != Gamma::One).then(|| tensor("weight"));
        Norm { kind: form.kind, weight, bias: form.bias.then(|| tensor("bias")) }
    }

    /// The tensors of this norm.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.weight.iter().chain(&self.bias)
    }
}

/// What produces the input of a site. A factor that multiplies a channel of the input can be moved into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Producer {
    /// The norm with this number; all that reads its output is a member of the site.
    Norm(usize),
    /// Rows of another linear.
    Rows(Rows),
    /// Something that no factor can be moved into, such as the residual stream.
    Fixed,
}

/// The rows of a linear that produce the channels of a site's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The number of the linear.
    pub linear: usize,
    /// The first of its rows that do.
    pub first: usize,
    /// How many of them there are.
    pub count: usize,
    /// How many times each run of `width` rows is read in turn: query heads that share a value head.
    pub repeats: usize,
    /// Rows that are read together: the features of a head.
    pub width: usize,
    /// Whether the channel is the square of what the row gives, so that rows take the root of its factor.
    pub squared: bool,
}

impl Rows {
    /// Rows that produce one channel each, in order.
    pub fn each(linear: usize, first: usize, count: usize) -> Rows {
        Rows { linear, first, count, repeats: 1, width: count, squared: false }
    }

    /// The row, counted from `first`, that produces a channel.
    pub fn of_channel(&self, channel: usize) -> usize {
        channel / (self.repeats * self.width) * self.width + channel % self.width
    }

    /// The factor of each of the rows, where channels have these factors; channels of one row have the same.
    pub fn factors(&self, channels: &[f32]) -> Vec<f32> {
        let heads = channels.chunks_exact(self.repeats * self.width);
        let read = heads.flat_map(|head| &head[..self.width]).copied();
        read.map(|factor| if self.squared { factor.sqrt() } else { factor }).collect()
    }

    /// The factor of each channel, where the rows have these factors.
    pub fn channels(&self, rows: &[f32]) -> Vec<f32> {
        let heads = rows.chunks_exact(self.width);
        let read = heads.flat_map(|head| std::iter::repeat_n(head, self.repeats).flatten()).copied();
        read.map(|factor| if self.squared { factor * factor } else { factor }).collect()
    }
}

/// A place of a layer where an input meets weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// What it is called in records and reports.
    pub name: &'static str,
    /// Features of the input.
    pub features: usize,
    /// The numbers of the linears that read it. They share one input scale and one weight global scale.
    pub members: Vec<usize>,
    /// Positions in `members` that engines merge into one matrix: either all of them are quantized or none is.
    pub fused: Vec<Vec<usize>>,
    /// What produces the input.
    pub producer: Producer,
}

/// A step of a layer: `x += scale · output_norm(mixer(input_norm(x)))` for each of its mixers.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The number of the norm of its input; none where the mixers read the residual stream itself.
    pub input: Option<usize>,
    /// What is computed; where there are two, both read the same normed input.
    pub mixers: Vec<Mixer>,
    /// The number of the norm of its output.
    pub output: Option<usize>,
    /// What the output is multiplied by.
    pub scale: Option<f32>,
}

/// What a block computes.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Between tokens.
    Attention(Attention),
    /// Inside a token.
    Mlp(Mlp),
}

impl Mixer {
    /// The number of the site that its input meets.
    pub fn input_site(&self) -> usize {
        match self {
            Mixer::Attention(attention) => attention.input_site,
            Mixer::Mlp(mlp) => mlp.input_site,
        }
    }
}

/// One decoder layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// What its tensors' names begin with, e.g. `model.layers.0.`.
    pub prefix: String,
    /// Features of the residual stream.
    pub hidden: usize,
    /// Its steps, in order.
    pub blocks: Vec<Block>,
    /// Its norms, by number.
    pub norms: Vec<Norm>,
    /// Its linears, by number: site after site.
    pub linears: Vec<LinearSpec>,
    /// Its sites, by number, in the order of the forward pass.
    pub sites: Vec<Site>,
    /// Other tensors, by number.
    pub vectors: Vec<TensorSpec>,
    /// The number of the vector of one element that the layer's output is multiplied by.
    pub scalar: Option<usize>,
}

/// Linears that read the same input, with the number of their site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The number of the site.
    pub site: usize,
    /// Its name.
    pub name: &'static str,
    /// The numbers of the linears in the layer.
    pub numbers: Vec<usize>,
    /// The linears, in the order in which engines stack them.
    pub members: Vec<LinearSpec>,
}

impl Layer {
    /// A layer without blocks.
    pub fn empty(prefix: String, hidden: usize) -> Layer {
        Layer { prefix, hidden, ..Layer::default() }
    }

    /// Adds a norm over `features` features; returns its number.
    pub(super) fn norm(&mut self, form: NormForm, name: &str, features: &[usize]) -> usize {
        self.norms.push(Norm::new(form, &format!("{}{name}", self.prefix), features));
        self.norms.len() - 1
    }

    /// Adds a linear; returns its number.
    pub(super) fn linear(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> usize {
        self.linears.push(LinearSpec { name: format!("{}{name}", self.prefix), rows, cols, bias });
        self.linears.len() - 1
    }

    /// Adds a vector; returns its number.
    pub(super) fn vector(&mut self, name: &str, shape: &[usize]) -> usize {
        self.vectors.push(TensorSpec { name: format!("{}{name}", self.prefix), shape: shape.to_vec() });
        self.vectors.len() - 1
    }

    /// The linears of each site.
    pub fn groups(&self) -> Vec<Group> {
        let group = |(site, of): (usize, &Site)| Group {
            site,
            name: of.name,
            numbers: of.members.clone(),
            members: of.members.iter().map(|&number| self.linears[number].clone()).collect(),
        };
        self.sites.iter().enumerate().map(group).collect()
    }

    /// The linears that engines merge with each other, or leave alone.
    pub fn fused(&self) -> Vec<Vec<&LinearSpec>> {
        let of_site = |site: &Site| -> Vec<Vec<&LinearSpec>> {
            let linears = |positions: &Vec<usize>| {
                positions.iter().map(|&position| &self.linears[site.members[position]]).collect()
            };
            site.fused.iter().map(linears).collect()
        };
        self.sites.iter().flat_map(of_site).collect()
    }

    /// Where values are what the linear of keys gives: its name, and the one that a linear of values would have.
    pub fn values_from_keys(&self) -> impl Iterator<Item = (String, String)> {
        let shared = self.attention().filter(|of| of.form.projections == Projections::KeyIsValue);
        shared.map(|attention| {
            let key = &self.linears[attention.inputs[1]].name;
            let [_, k, v, _] = attention.form.names.linears;
            (key.clone(), format!("{}{v}", key.strip_suffix(k).unwrap_or(key)))
        })
    }

    /// The site that a linear reads.
    pub fn site_of(&self, linear: usize) -> usize {
        let reads = |site: &Site| site.members.contains(&linear);
        self.sites.iter().position(reads).expect("every linear reads a site")
    }

    /// The norms and biases that a fold of a site's input may change.
    pub fn changed_by_fold(&self, site: &Site) -> Vec<String> {
        match &site.producer {
            Producer::Norm(norm) => self.norms[*norm].tensors().map(|spec| spec.name.clone()).collect(),
            Producer::Rows(rows) => self.linears[rows.linear].bias().into_iter().collect(),
            Producer::Fixed => vec![],
        }
    }

    /// Every source tensor of the layer: those that stay as they are first, then the linears'.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = self.plain_tensors();
        for linear in &self.linears {
            tensors.push(TensorSpec { name: linear.weight(), shape: vec![linear.rows, linear.cols] });
            tensors.extend(linear.bias().map(|name| TensorSpec { name, shape: vec![linear.rows] }));
        }
        tensors
    }

    /// The tensors that belong to no linear.
    pub fn plain_tensors(&self) -> Vec<TensorSpec> {
        let norms = self.norms.iter().flat_map(Norm::tensors);
        norms.chain(&self.vectors).cloned().collect()
    }

    /// Its attention; a layer may have none.
    pub fn attention(&self) -> impl Iterator<Item = &Attention> + Clone {
        self.blocks.iter().flat_map(|block| &block.mixers).filter_map(|mixer| match mixer {
            Mixer::Attention(attention) => Some(attention),
            Mixer::Mlp(_) => None,
        })
    }

    /// Weights of the linears.
    pub fn weights(&self) -> usize {
        self.linears.iter().map(|linear| linear.rows * linear.cols).sum()
    }
}
