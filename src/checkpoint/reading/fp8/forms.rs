//! What a configuration says of FP8 weights: which elements of a weight share a scale.

use serde_json::{Map, Value};

/// Where the description of quantized weights can stand, and other fields that speak of nothing else.
const FIELDS: [&str; 4] = ["quantization_config", "compression_config", "expert_dtype", "scale_fmt"];

/// Elements of a weight `[.., n, k]` that share a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// A whole matrix. Scales are `[.., 1, 1]`, or one number of any shape where there is one matrix.
    Tensor,
    /// A row: scales are `[.., n, 1]`.
    Row,
    /// A block of so many rows and columns, of which those at the ends may be partial ones: scales are
    /// `[.., ceil(n / rows), ceil(k / columns)]`.
    Block([usize; 2]),
}

impl Form {
    /// The forms that a configuration allows; none where it does not describe FP8 weights, or others besides. Of
    /// `quant_method` "fp8" (Transformers and vLLM) a `weight_block_size` that is null means one scale for each tensor;
    /// where it is absent, Transformers takes blocks of 128 times 128, vLLM one scale for each tensor, and the scales
    /// tell. Of "compressed-tensors" each group of modules says its own.
    pub fn described(config: &Map<String, Value>) -> Option<Vec<Form>> {
        let quantization = description(config)?;
        match quantization["quant_method"].as_str()? {
            "fp8" => match quantization.get("weight_block_size") {
                None => Some(vec![Form::Tensor, Form::Block([128, 128])]),
                Some(Value::Null) => Some(vec![Form::Tensor]),
                Some(sizes) => Some(vec![Form::Block(sizes_of(sizes)?)]),
            },
            "compressed-tensors" => {
                let groups = quantization["config_groups"].as_object()?;
                groups.values().map(|group| Form::of_group(&group["weights"])).collect()
            }
            _ => None,
        }
    }

    /// The form of a group of compressed-tensors, where its weights are FP8.
    fn of_group(weights: &Value) -> Option<Form> {
        if weights["num_bits"] != 8 || weights["type"] != "float" {
            return None;
        }
        match weights["strategy"].as_str()? {
            "tensor" => Some(Form::Tensor),
            "channel" => Some(Form::Row),
            "block" => Some(Form::Block(sizes_of(&weights["block_structure"])?)),
            _ => None,
        }
    }

    /// Rows and columns that share a scale in a weight of this shape, where the scales have the shape that this form
    /// gives them.
    pub fn block(self, weight: &[usize], scales: &[usize]) -> Option<[usize; 2]> {
        let [matrices @ .., rows, cols] = weight else { return None };
        let block = match self {
            Form::Tensor => [(*rows).max(1), (*cols).max(1)],
            Form::Row => [1, (*cols).max(1)],
            Form::Block(block) => block,
        };
        let grid = [matrices, &[rows.div_ceil(block[0]), cols.div_ceil(block[1])]].concat();
        let is_one = self == Form::Tensor && matrices.is_empty() && matches!(scales, [] | [1]);
        (is_one || scales == grid).then_some(block)
    }
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Form::Tensor => write!(f, "one for each matrix"),
            Form::Row => write!(f, "one for each row"),
            Form::Block([rows, cols]) => write!(f, "one for each block of {rows} times {cols}"),
        }
    }
}

/// Two sizes that are not zero.
fn sizes_of(value: &Value) -> Option<[usize; 2]> {
    let size = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|&size| size > 0);
    match value.as_array()?.as_slice() {
        [rows, cols] => Some([size(rows)?, size(cols)?]),
        _ => None,
    }
}

/// The description of quantized weights: at the top, or beside the text model's fields.
pub fn description(config: &Map<String, Value>) -> Option<&Value> {
    let text = config.get("text_config").and_then(Value::as_object);
    let found = [Some(config), text].into_iter().flatten().flat_map(|fields| {
        FIELDS[..2].iter().filter_map(|field| fields.get(*field).filter(|value| !value.is_null()))
    });
    found.into_iter().next()
}

/// Takes everything that describes quantized weights out of a configuration; the order of what stays is kept.
pub fn forget(config: &mut Map<String, Value>) {
    for field in FIELDS {
        config.shift_remove(field);
    }
    if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
        FIELDS.iter().for_each(|field| _ = text.shift_remove(*field));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn described(quantization: Value) -> Option<Vec<Form>> {
        Form::described(json!({ "quantization_config": quantization }).as_object().unwrap())
    }

    #[test]
    fn configurations_say_what_shares_a_scale() {
        let fp8 = |size: Value| described(json!({"quant_method": "fp8", "weight_block_size": size}));
        assert_eq!(fp8(json!([128, 64])), Some(vec![Form::Block([128, 64])]));
        assert_eq!(fp8(Value::Null), Some(vec![Form::Tensor]));
        for unusable in [json!([128]), json!([0, 128]), json!([-1, 2]), json!("x"), json!([1.5, 2])] {
            assert_eq!(fp8(unusable), None);
        }
        let absent = described(json!({"quant_method": "fp8"}));
        assert_eq!(absent, Some(vec![Form::Tensor, Form::Block([128, 128])]));

        let group = |bits: u64, strategy: &str| json!({"weights": {"num_bits": bits, "type": "float", "strategy": strategy, "block_structure": [2, 3]}});
        let groups =
            |groups: Value| described(json!({"quant_method": "compressed-tensors", "config_groups": groups}));
        let all = groups(json!({"a": group(8, "tensor"), "b": group(8, "channel"), "c": group(8, "block")}));
        assert_eq!(all, Some(vec![Form::Tensor, Form::Row, Form::Block([2, 3])]));
        assert_eq!(groups(json!({"a": group(8, "channel"), "b": group(4, "tensor_group")})), None);
        assert_eq!(
            groups(json!({"a": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}})),
            None
        );
        for other in [
            json!({"quant_method": "gptq"}),
            json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
            json!(null),
        ] {
            assert_eq!(described(other), None);
        }
    }

    #[test]
    fn scales_have_one_shape_in_each_form() {
        for (form, weight, scales, block) in [
            (Form::Block([128, 128]), &[576, 7168][..], &[5, 56][..], Some([128, 128])),
            (Form::Block([128, 128]), &[576, 7168], &[4, 56], None),
            (Form::Block([128, 128]), &[576, 7168], &[5, 56, 1], None),
            (Form::Block([128, 128]), &[64, 64], &[], None),
            (Form::Block([128, 128]), &[3, 200, 300], &[3, 2, 3], Some([128, 128])),
            (Form::Block([128, 128]), &[64], &[1], None),
            (Form::Row, &[64, 32], &[64, 1], Some([1, 32])),
            (Form::Row, &[64, 32], &[64], None),
            (Form::Tensor, &[64, 32], &[], Some([64, 32])),
            (Form::Tensor, &[64, 32], &[1], Some([64, 32])),
            (Form::Tensor, &[64, 32], &[1, 1], Some([64, 32])),
            (Form::Tensor, &[64, 32], &[2], None),
            (Form::Tensor, &[5, 64, 32], &[5, 1, 1], Some([64, 32])),
            (Form::Tensor, &[5, 64, 32], &[1], None),
        ] {
            assert_eq!(form.block(weight, scales), block, "{form:?} {weight:?} {scales:?}");
        }
    }

    #[test]
    fn nothing_that_describes_quantized_weights_stays() {
        let config = json!({
            "a": 1, "quantization_config": {"quant_method": "fp8"}, "b": 2, "scale_fmt": "ue8m0",
            "text_config": {"c": 3, "quantization_config": {}, "d": 4}, "e": 5
        });
        let mut config = config.as_object().unwrap().clone();
        assert_eq!(description(&config).unwrap()["quant_method"], "fp8");
        forget(&mut config);
        assert_eq!(Value::Object(config).to_string(), r#"{"a":1,"b":2,"text_config":{"c":3,"d":4},"e":5}"#);
    }
}
