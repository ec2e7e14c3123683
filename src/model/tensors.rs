//! Names and shapes of a model's tensors, and which linears an engine fuses.

use super::config::ModelConfig;

/// A tensor of the source checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name, e.g. `model.norm.weight`.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

/// A linear layer: `out = x · weightᵀ + bias`.
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

/// The four places of a layer where an input meets weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// Input norm → q, k, v.
    Qkv,
    /// Attention → o.
    O,
    /// Post-attention norm → gate, up.
    GateUp,
    /// MLP activation → down.
    Down,
}

impl Site {
    /// All sites, in the order of the forward pass.
    pub const ALL: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];
}

/// Linears that read the same input. Engines merge their matrices, so they share one weight global
/// scale and one input scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Where in the layer.
    pub site: Site,
    /// The linears, in the order in which engines stack them.
    pub members: Vec<LinearSpec>,
}

impl ModelConfig {
    /// The fused groups of a layer, in the order of [`Site::ALL`].
    pub fn groups(&self, layer: usize) -> Vec<Group> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let attention = |name: &str, rows, cols| LinearSpec {
            name: format!("model.layers.{layer}.self_attn.{name}"),
            rows,
            cols,
            bias: self.attention_bias,
        };
        let mlp = |name: &str, rows, cols| LinearSpec {
            name: format!("model.layers.{layer}.mlp.{name}"),
            rows,
            cols,
            bias: self.mlp_bias,
        };
        vec![
            Group {
                site: Site::Qkv,
                members: vec![
                    attention("q_proj", q, self.hidden),
                    attention("k_proj", kv, self.hidden),
                    attention("v_proj", kv, self.hidden),
                ],
            },
            Group { site: Site::O, members: vec![attention("o_proj", self.hidden, q)] },
            Group {
                site: Site::GateUp,
                members: vec![
                    mlp("gate_proj", self.intermediate, self.hidden),
                    mlp("up_proj", self.intermediate, self.hidden),
                ],
            },
            Group { site: Site::Down, members: vec![mlp("down_proj", self.hidden, self.intermediate)] },
        ]
    }

    /// Features of a site's input.
    pub fn site_features(&self, site: Site) -> usize {
        match site {
            Site::Qkv | Site::GateUp => self.hidden,
            Site::O => self.heads * self.head_dim,
            Site::Down => self.intermediate,
        }
    }

    /// The two norms of a layer: before attention and before the MLP.
    pub fn layer_norms(&self, layer: usize) -> [TensorSpec; 2] {
        ["input_layernorm", "post_attention_layernorm"].map(|name| TensorSpec {
            name: format!("model.layers.{layer}.{name}.weight"),
            shape: vec![self.hidden],
        })
    }

    /// Every source tensor of a layer.
    pub fn layer_tensors(&self, layer: usize) -> Vec<TensorSpec> {
        let mut tensors = self.layer_norms(layer).to_vec();
        for linear in self.groups(layer).into_iter().flat_map(|group| group.members) {
            tensors.push(TensorSpec { name: linear.weight(), shape: vec![linear.rows, linear.cols] });
            tensors.extend(linear.bias().map(|name| TensorSpec { name, shape: vec![linear.rows] }));
        }
        tensors
    }

    /// The token embedding `[vocab, hidden]`, which the first stage owns.
    pub fn embedding(&self) -> TensorSpec {
        TensorSpec { name: "model.embed_tokens.weight".into(), shape: vec![self.vocab, self.hidden] }
    }

    /// What the last stage owns: the final norm, and lm_head where it is not tied.
    pub fn tail_tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = vec![TensorSpec { name: "model.norm.weight".into(), shape: vec![self.hidden] }];
        if !self.tie_embeddings {
            tensors.push(TensorSpec { name: "lm_head.weight".into(), shape: vec![self.vocab, self.hidden] });
        }
        tensors
    }
}
