//! Damage that keeps JSON valid, so that it gets past the parser to what reads the fields.

use serde_json::{Value, json};

use super::bytes;
use crate::support::Random;

/// One to three changes to values, names and structure; now and then damage to the text itself.
pub fn json(valid: &[u8], random: &mut Random) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(valid) else { return bytes::bytes(valid, random) };
    for _ in 0..1 + random.below(3) {
        let nodes = count(&value);
        change(&mut value, random.below(nodes), random);
    }
    let text = value.to_string().into_bytes();
    match random.below(12) {
        0 => bytes::bytes(&text, random),
        _ => text,
    }
}

/// The same for one line of JSON lines, and for the lines' order and number.
pub fn lines(valid: &[u8], random: &mut Random) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = valid.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    let at = random.below(lines.len());
    match random.below(8) {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, lines[at].clone()),
        2 => {
            let other = random.below(lines.len());
            lines.swap(at, other);
        }
        3 => lines[at] = bytes::bytes(&lines[at].clone(), random),
        _ => lines[at] = json(&lines[at].clone(), random),
    }
    lines.join(&b'\n')
}

/// The header of a safetensors file: its JSON, under a length that fits; or raw bytes at the front.
pub fn safetensors(valid: &[u8], random: &mut Random) -> Vec<u8> {
    if random.below(4) == 0 {
        return bytes::front(valid, random);
    }
    let length = u64::from_le_bytes(valid[..8].try_into().unwrap()) as usize;
    let header = json(&valid[8..8 + length], random);
    let mut spoiled = (header.len() as u64).to_le_bytes().to_vec();
    spoiled.extend(header);
    spoiled.extend(&valid[8 + length..]);
    spoiled
}

/// Values of a number, and the number itself.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum::<usize>(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Changes the `node`-th value in the order of reading.
fn change(value: &mut Value, node: usize, random: &mut Random) {
    if node == 0 {
        return replace(value, random);
    }
    let children: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    let mut left = node - 1;
    for child in children {
        let nodes = count(child);
        if left < nodes {
            return change(child, left, random);
        }
        left -= nodes;
    }
}

fn replace(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(fields) if random.below(3) > 0 && !fields.is_empty() => {
            let key = fields.keys().nth(random.below(fields.len())).expect("within the length").clone();
            let field = fields.remove(&key).expect("the key is there");
            match random.below(3) {
                0 => {}
                1 => drop(fields.insert(odd_text(random), field)),
                _ => {
                    fields.insert(key.clone() + "x", field.clone());
                    fields.insert(key, any(random));
                }
            }
        }
        Value::Array(items) if random.below(3) > 0 && !items.is_empty() => {
            let at = random.below(items.len());
            match random.below(3) {
                0 => drop(items.remove(at)),
                1 => items.insert(at, any(random)),
                _ => items.insert(at, items[at].clone()),
            }
        }
        Value::Number(number) if random.below(2) == 0 => {
            let n = number.as_f64().unwrap_or(0.0);
            let factor = [-1.0, 0.5, 2.0, 1e3, 1e9][random.below(5)];
            let changed = if random.below(2) == 0 { n + 1.0 } else { n * factor };
            *value = if changed.fract() == 0.0 && changed.abs() < 1e15 {
                json!(changed as i64)
            } else {
                json!(changed)
            };
        }
        _ => *value = any(random),
    }
}

fn any(random: &mut Random) -> Value {
    match random.below(16) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(0),
        3 => json!(-1),
        4 => json!(3),
        5 => json!(1u64 << 31),
        6 => json!(1u64 << 62),
        7 => json!(u64::MAX),
        8 => json!(1e308),
        9 => json!(0.3),
        10 => json!([]),
        11 => json!({}),
        12 => (0..100).fold(json!(1), |inner, _| json!([inner])),
        13 => json!([0, 1, 2, 3, 4, 5, 6, 7]),
        _ => json!(odd_text(random)),
    }
}

fn odd_text(random: &mut Random) -> String {
    match random.below(8) {
        0 => String::new(),
        1 => "x".repeat(200_000),
        2 => "\u{1b}[2J\u{1b}]0;owned\u{7}\u{202e}\r\u{8}".into(),
        3 => "../../etc/passwd".into(),
        4 => "model.layers.0.self_attn.q_proj.weight".into(),
        5 => "(((a+)+)+)+b\\w{900}".into(),
        6 => "{{ range(99999) }}".into(),
        _ => "BF16".into(),
    }
}
