//! How many floating-point operations a decoder layer takes: what the planner weighs, and what the probe's
//! time is divided by.

use crate::calibration::Sampling;
use crate::methods::Method;
use crate::model::ModelConfig;
use crate::planner::Operations;

/// Weights of a layer's linears.
pub fn weights(model: &ModelConfig) -> usize {
    model.groups(0).iter().flat_map(|group| &group.members).map(|linear| linear.rows * linear.cols).sum()
}

/// What one layer of `model` takes under `method`.
pub fn operations(model: &ModelConfig, method: Method) -> Operations {
    let squares: usize = model.groups(0).iter().map(|group| group.members[0].cols.pow(2)).sum();
    Operations {
        token: 2.0 * weights(model) as f64,
        // Scores, and the sum of values that they weigh.
        pair: 4.0 * (model.heads * model.head_dim) as f64,
        statistics: if method.needs_products() { 2.0 * squares as f64 } else { 0.0 },
        solving: solving(model, method),
    }
}

/// Pairs of a token and one that it sees, in documents of these lengths.
pub fn pairs(model: &ModelConfig, lengths: &[usize]) -> u64 {
    let seen = |length: usize| {
        let window = model.sliding_window.unwrap_or(length).min(length);
        window * (window + 1) / 2 + (length - window) * window
    };
    lengths.iter().map(|&length| seen(length) as u64).sum()
}

/// Choosing a layer's codes. Max scales look at each weight once. Everything else multiplies sampled rows with
/// the weights: to judge a fold (the outputs, no fold and six candidates), max scales and codes (the outputs, and each
/// kind of codes), and with `guard` the folds of o and down again, which are a third of the weights. GPTQ factors a Hessian and feeds every column's error back.
fn solving(model: &ModelConfig, method: Method) -> f64 {
    let weights = weights(model) as f64;
    if !method.needs_statistics() {
        return weights;
    }
    let folds_again = f64::from(method.smooth && method.guard);
    let judged = 3.0 + 8.0 * f64::from(method.smooth) + f64::from(method.guard) + folds_again;
    let feedback: f64 = (model.groups(0).iter())
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

    fn tiny() -> ModelConfig {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 128,
        });
        ModelConfig::parse(config.as_object().unwrap()).unwrap()
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

    #[test]
    fn a_window_bounds_what_a_token_sees() {
        let full = tiny();
        assert_eq!(pairs(&full, &[1, 4]), 1 + 10);
        let windowed = ModelConfig { sliding_window: Some(2), ..full };
        assert_eq!(pairs(&windowed, &[1, 4]), 1 + 7);
    }
}
