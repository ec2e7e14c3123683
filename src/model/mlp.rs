//! The dense MLP as data: what a family says of it, and the linears and sites that follow.

use super::layer::{Layer, Mixer, Producer, Rows};
use crate::backend::Activation;

/// The linears of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpShape {
    /// `down(act(gate(x)) · up(x))`.
    Gated,
    /// The same, gate and up stored as one linear: the rows of gate, then those of up.
    Fused,
    /// `down(act(up(x)))`.
    Plain,
}

/// The function between an MLP's linears.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Function {
    /// One that has no parameters.
    Of(Activation),
    /// xIELU, whose two parameters each layer stores.
    Xielu,
}

/// What a family says of a layer's MLP.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpForm {
    /// The module that its linears belong to, with a dot behind it.
    pub module: &'static str,
    /// The names of gate, up and down; that of gate serves both where they are stored as one.
    pub linears: [&'static str; 3],
    /// Which linears there are.
    pub shape: MlpShape,
    /// Inner features.
    pub features: usize,
    /// The function between the linears.
    pub function: Function,
    /// Whether its linears have biases.
    pub bias: bool,
}

/// A layer's MLP: what the family says of it, and the numbers of its linears and sites in the layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Mlp {
    /// What the family says.
    pub form: MlpForm,
    /// gate and up as far as they are linears of their own.
    pub inputs: Vec<usize>,
    /// down.
    pub output: usize,
    /// The vectors of one element that xIELU's parameters are read from.
    pub parameters: Option<[usize; 2]>,
    /// The site of gate and up.
    pub input_site: usize,
    /// The site of down.
    pub output_site: usize,
}

impl MlpForm {
    /// Llama's, with so many inner features.
    pub fn llama(features: usize) -> MlpForm {
        MlpForm {
            module: "mlp.",
            linears: ["gate_proj", "up_proj", "down_proj"],
            shape: MlpShape::Gated,
            features,
            function: Function::Of(Activation::Silu),
            bias: false,
        }
    }
}

impl Layer {
    /// Adds an MLP whose input `producer` gives.
    pub(super) fn add_mlp(&mut self, form: &MlpForm, producer: Producer) -> Mixer {
        let (hidden, features) = (self.hidden, form.features);
        let name = |part: &str| format!("{}{part}", form.module);
        let [gate, up, down] = form.linears;
        let (parts, up_from) = match form.shape {
            MlpShape::Gated => (vec![(gate, features), (up, features)], (1, 0)),
            MlpShape::Fused => (vec![(gate, 2 * features)], (0, features)),
            MlpShape::Plain => (vec![(up, features)], (0, 0)),
        };
        let inputs: Vec<usize> =
            parts.into_iter().map(|(part, rows)| self.linear(&name(part), rows, hidden, form.bias)).collect();
        let fused = vec![(0..inputs.len()).collect()];
        let input_site = self.site("gate_up", hidden, inputs.clone(), fused, producer);
        let parameters = (form.function == Function::Xielu)
            .then(|| ["act_fn.alpha_p", "act_fn.alpha_n"].map(|part| self.vector(&name(part), &[1])));
        let rows = Rows::each(inputs[up_from.0], up_from.1, features);
        let values = match (form.shape, form.function) {
            (MlpShape::Gated | MlpShape::Fused, _) => Producer::Rows(rows),
            (MlpShape::Plain, Function::Of(Activation::Relu2)) => {
                Producer::Rows(Rows { squared: true, ..rows })
            }
            (MlpShape::Plain, _) => Producer::Fixed,
        };
        let output = self.linear(&name(down), hidden, features, form.bias);
        let output_site = self.site("down", features, vec![output], vec![vec![0]], values);
        Mixer::Mlp(Mlp { form: form.clone(), inputs, output, parameters, input_site, output_site })
    }
}
