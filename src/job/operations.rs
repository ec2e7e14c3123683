//! How many floating-point operations a decoder layer takes. The planner computes expected times from them, and the
//! probe divides its operations by the time that they took, to get a rate.

use crate::calibration::Sampling;
use crate::methods::Method;
use crate::model::Layer;
use crate::planner::Operations;

/// The operations of one layer under `method`.
pub fn operations(layer: &Layer, method: Method) -> Operations {
    let squares: usize = layer.sites.iter().map(|site| site.features.pow(2)).sum();
    let attention = layer.attention().map(|attention| &attention.form);
    Operations {
        token: 2.0 * layer.weights() as f64,
        // Attention scores, and the sum of values weighted with them.
        pair: attention.clone().map(|form| 4.0 * form.queries() as f64).sum::<f64>(),
        window: attention.filter_map(|form| form.window).min(),
        statistics: if method.needs_products() { 2.0 * squares as f64 } else { 0.0 },
        solving: solving(layer, method),
    }
}

/// The operations of choosing a layer's codes. Max scales read each weight once. Other methods multiply sampled rows
/// with the weights once for each thing that is judged: a fold (the source's outputs, no fold and six candidates), max
/// scales and codes (the source's outputs, and each kind of codes), and with `guard` the folds of o and down again,
/// which are a third of the weights. GPTQ also factors a Hessian, and propagates the error of every column to later
/// columns.
fn solving(layer: &Layer, method: Method) -> f64 {
    let weights = layer.weights() as f64;
    if !method.needs_statistics() {
        return weights;
    }
    let folds_again = f64::from(method.smooth && method.guard);
    let judged = 3.0 + 8.0 * f64::from(method.smooth) + f64::from(method.guard) + folds_again;
    let feedback: f64 = (layer.groups().iter())
        .map(|group| {
            let n = group.members[0].cols as f64;
            let rows: usize = group.members.iter().map(|linear| linear.rows).sum();
            2.0 * n * n * (n / 3.0 + rows as f64)
        })
        .sum();
    let feedback = if method.needs_products() { feedback } else { 0.0 };
    2.0 * Sampling::ROWS as f64 * judged * weights + feedback
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;

    fn tiny() -> Layer {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 128,
        });
        Model::parse(config.as_object().unwrap(), &|_| false).unwrap().layers.remove(0)
    }

    #[test]
    fn operations_are_counted_by_hand() {
        let weights = 64 * (64 + 32 + 32) + 64 * 64 + 2 * 64 * 96 + 96 * 64;
        let max = operations(&tiny(), Method::MAX);
        assert_eq!((max.token, max.pair), (2.0 * weights as f64, 4.0 * 64.0));
        assert_eq!((max.statistics, max.solving), (0.0, weights as f64));
        let best = operations(&tiny(), Method::BEST);
        assert_eq!(best.statistics, 2.0 * (3 * 64 * 64 + 96 * 96) as f64);
        let feedback = 64 * 64 * (64 + 128 + 64 + 192) + 96 * 96 * (32 + 64);
        assert_eq!(best.solving, (2 * 512 * 13 * weights + 2 * feedback) as f64);
    }
}
