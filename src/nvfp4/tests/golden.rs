//! Byte-exact comparison with what nvidia-modelopt and compressed-tensors wrote (tests/golden/).

use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::nvfp4::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u8).collect()
}

fn bf16s(value: &Value) -> Vec<f32> {
    let rows = value.as_array().unwrap().iter();
    rows.flat_map(|row| row.as_array().unwrap())
        .map(|v| bf16::from_bits(v.as_u64().unwrap() as u16).to_f32())
        .collect()
}

#[test]
fn every_codec_vector() {
    let vectors = json("codec_vectors.json");
    for pair in vectors["e2m1"]["vectors"].as_array().unwrap() {
        let x = f32::from_bits(pair["f32_bits"].as_u64().unwrap() as u32);
        assert_eq!(e2m1::encode(x) as u64, pair["code"].as_u64().unwrap(), "{x:e}");
    }
    for (byte, bits) in vectors["e4m3"]["decode_f32_bits"].as_array().unwrap().iter().enumerate() {
        assert_eq!(e4m3::decode(byte as u8).to_bits() as u64, bits.as_u64().unwrap(), "byte {byte:#x}");
    }
    for pair in vectors["e4m3"]["encode"].as_array().unwrap() {
        let x = f32::from_bits(pair[0].as_u64().unwrap() as u32);
        assert_eq!(e4m3::encode(x) as u64, pair[1].as_u64().unwrap(), "{x:e}");
    }
}

#[test]
fn edge_blocks() {
    let edges = json("edgeHEAD.json");
    let global = GlobalScale::from_multiplier(edges["ws2"].as_f64().unwrap() as f32);
    for row in 0..4 {
        let w = floats(&edges["w"][row]);
        let (mut codes, mut scales) = (vec![0; w.len() / 2], vec![0; w.len() / BLOCK]);
        quantize(&w, global, &mut codes, &mut scales);
        assert_eq!(scales, bytes(&edges["scale_u8"][row]), "row {row}");
        assert_eq!(codes, bytes(&edges["packed"][row]), "row {row}");
    }
}

/// Module names of the golden model's linears, by fused group.
fn groups() -> Vec<Vec<String>> {
    let sets: [&[&str]; 4] = [
        &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        &["self_attn.o_proj"],
        &["mlp.gate_proj", "mlp.up_proj"],
        &["mlp.down_proj"],
    ];
    (0..2)
        .flat_map(|layer| sets.map(|set| set.iter().map(|m| format!("model.layers.{layer}.{m}")).collect()))
        .collect()
}

#[test]
fn the_whole_model_as_modelopt_wrote_it() {
    let source = std::fs::read(golden("src_bf16/model.safetensors")).unwrap();
    let source = SafeTensors::deserialize(&source).unwrap();
    let expected = std::fs::read(golden("model.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let (view, raw) = (json("compressed_tensors_view.json"), json("raw_amax.json"));
    let scalar = |name: &str| f32::from_le_bytes(expected.tensor(name).unwrap().data().try_into().unwrap());
    let viewed = |name: &str| {
        let bits = view[name]["f32_bits_hex"].as_str().unwrap();
        u32::from_str_radix(bits, 16).unwrap()
    };
    for group in groups() {
        let weights: Vec<Vec<bf16>> = group
            .iter()
            .map(|m| source.tensor(&format!("{m}.weight")).unwrap())
            .map(|t| bytemuck::pod_collect_to_vec(t.data()))
            .collect();
        let global = GlobalScale::from_amax(weights.iter().map(|w| amax(w)).fold(0.0, f32::max));
        for (module, w) in group.iter().zip(&weights) {
            let (mut codes, mut scales) = (vec![0; w.len() / 2], vec![0; w.len() / BLOCK]);
            quantize(w, global, &mut codes, &mut scales);
            assert_eq!(codes, expected.tensor(&format!("{module}.weight")).unwrap().data(), "{module}");
            assert_eq!(
                scales,
                expected.tensor(&format!("{module}.weight_scale")).unwrap().data(),
                "{module}"
            );
            assert_eq!(global.multiplier(), scalar(&format!("{module}.weight_scale_2")), "{module}");
            assert_eq!(global.divisor().to_bits(), viewed(&format!("{module}.weight_global_scale")));

            let input = raw[format!("{module}.input_quantizer")].as_f64().unwrap() as f32;
            let input = GlobalScale::from_amax(input);
            assert_eq!(input.multiplier(), scalar(&format!("{module}.input_scale")), "{module}");
            assert_eq!(input.divisor().to_bits(), viewed(&format!("{module}.input_global_scale")));
        }
    }
}

#[test]
fn activations_as_compressed_tensors_simulates_them() {
    let golden = json("ct_nvfp4_golden.json");
    let case = golden["cases"].as_array().unwrap().iter().find(|c| c["name"] == "act_local_dynamic").unwrap();
    let mut x = bf16s(&case["x_bf16_bits"]);
    let input = GlobalScale::from_divisor(case["input_global_scale"].as_f64().unwrap() as f32);
    activation::quantize_dequantize(&mut x, input);
    let rounded: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
    assert_eq!(rounded, bf16s(&case["fake_quant_bf16_bits"]));
}
