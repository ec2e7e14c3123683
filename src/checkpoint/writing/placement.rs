//! Where every output tensor will lie, known before the first byte is computed. Pure: touches no file.

use std::collections::HashMap;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutTensor {
    /// Full name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl OutTensor {
    /// A tensor of this name, dtype and shape.
    pub fn new(name: &str, dtype: Dtype, shape: &[usize]) -> OutTensor {
        OutTensor { name: name.to_string(), dtype, shape: shape.to_vec() }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }

    fn element_bytes(&self) -> usize {
        self.dtype.bitsize().div_ceil(8)
    }
}

/// One file of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// File name inside the output directory.
    pub file_name: String,
    /// The whole header: its length and its JSON, padded to 8 bytes.
    pub header: Vec<u8>,
    /// Length of the whole file.
    pub bytes: u64,
}

/// A tensor's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index into [`Placement::shards`].
    pub shard: usize,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// The whole output: files, headers, offsets.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// The files, in model order.
    pub shards: Vec<Shard>,
    /// Contents of `model.safetensors.index.json`, where there is more than one file.
    pub index: Option<Value>,
    slots: HashMap<String, Slot>,
}

impl Placement {
    /// Fills files in the given order, none larger than `max_shard` data bytes unless one tensor alone is.
    /// `metadata` goes into every header.
    pub fn new(tensors: &[OutTensor], max_shard: u64, metadata: &Map<String, Value>) -> Placement {
        let mut files: Vec<Vec<&OutTensor>> = vec![vec![]];
        let mut filled = 0;
        for tensor in tensors {
            if filled > 0 && filled + tensor.bytes() > max_shard {
                files.push(vec![]);
                filled = 0;
            }
            filled += tensor.bytes();
            files.last_mut().expect("starts with one").push(tensor);
        }
        let count = files.len();
        let mut placement = Placement { shards: vec![], index: None, slots: HashMap::new() };
        let mut weight_map = Map::new();
        for (number, mut tensors) in files.into_iter().enumerate() {
            let file_name = match count {
                1 => "model.safetensors".to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            // Wider elements first: then every tensor is aligned to its element without holes, which the
            // format forbids.
            tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.element_bytes()));
            for tensor in &tensors {
                weight_map.insert(tensor.name.clone(), json!(file_name));
            }
            placement.add_shard(file_name, &tensors, metadata);
        }
        if count > 1 {
            let total: u64 = tensors.iter().map(OutTensor::bytes).sum();
            weight_map.sort_keys();
            placement.index = Some(json!({"metadata": {"total_size": total}, "weight_map": weight_map}));
        }
        placement
    }

    fn add_shard(&mut self, file_name: String, tensors: &[&OutTensor], metadata: &Map<String, Value>) {
        let mut header = Map::new();
        header.insert("__metadata__".into(), Value::Object(metadata.clone()));
        let mut end = 0;
        for tensor in tensors {
            let (start, bytes) = (end, tensor.bytes());
            end += bytes;
            header.insert(
                tensor.name.clone(),
                json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}),
            );
            self.slots.insert(tensor.name.clone(), Slot { shard: self.shards.len(), offset: start, bytes });
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.extend(text);
        let start = header.len() as u64;
        for tensor in tensors {
            self.slots.get_mut(&tensor.name).expect("just inserted").offset += start;
        }
        self.shards.push(Shard { file_name, bytes: start + end, header });
    }

    /// Where a tensor goes.
    pub fn slot(&self, name: &str) -> Option<Slot> {
        self.slots.get(name).copied()
    }

    /// The names of a file's tensors, in no order.
    pub fn tensors_in(&self, shard: usize) -> impl Iterator<Item = &str> {
        self.slots.iter().filter(move |(_, slot)| slot.shard == shard).map(|(name, _)| name.as_str())
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use super::*;

    fn tensors(sizes: &[(u8, usize)]) -> Vec<OutTensor> {
        let dtypes = [Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::F8_E4M3];
        sizes
            .iter()
            .enumerate()
            .map(|(i, &(dtype, n))| OutTensor::new(&format!("t{i}"), dtypes[dtype as usize % 4], &[n]))
            .collect()
    }

    #[test]
    fn one_file_has_no_index() {
        let placement = Placement::new(&tensors(&[(0, 3), (2, 5)]), 1000, &Map::new());
        assert_eq!(placement.shards[0].file_name, "model.safetensors");
        assert!(placement.index.is_none());
    }

    #[test]
    fn a_scalar_takes_one_element() {
        assert_eq!(OutTensor::new("s", Dtype::F32, &[]).bytes(), 4);
    }

    #[test]
    fn elements_narrower_than_a_byte_take_their_bits() {
        assert_eq!(OutTensor::new("f4", Dtype::F4, &[32]).bytes(), 16);
    }

    proptest! {
        #[test]
        fn files_written_at_the_planned_places_are_valid(
            sizes in prop::collection::vec((any::<u8>(), 0usize..40), 1..30),
            max in 1u64..300,
        ) {
            let tensors = tensors(&sizes);
            let metadata = Map::from_iter([("format".to_string(), json!("pt"))]);
            let placement = Placement::new(&tensors, max, &metadata);
            let mut files: Vec<Vec<u8>> = placement.shards.iter().map(|shard| {
                let mut file = shard.header.clone();
                file.resize(shard.bytes as usize, 0xEE);
                file
            }).collect();
            for (i, tensor) in tensors.iter().enumerate() {
                let slot = placement.slot(&tensor.name).unwrap();
                prop_assert_eq!(slot.offset as usize % tensor.element_bytes(), 0, "aligned");
                let range = slot.offset as usize..(slot.offset + slot.bytes) as usize;
                files[slot.shard][range].fill(i as u8);
            }
            let mut seen = 0;
            for (shard, file) in placement.shards.iter().zip(&files) {
                let read = SafeTensors::deserialize(file).unwrap();
                for (name, view) in read.tensors() {
                    let i: usize = name[1..].parse().unwrap();
                    prop_assert_eq!(view.dtype(), tensors[i].dtype);
                    prop_assert_eq!(view.shape(), &tensors[i].shape);
                    prop_assert!(view.data().iter().all(|&byte| byte == i as u8));
                    if let Some(index) = &placement.index {
                        prop_assert_eq!(index["weight_map"][&name].as_str(), Some(shard.file_name.as_str()));
                    }
                    seen += 1;
                }
                let data = shard.bytes - shard.header.len() as u64;
                prop_assert!(data <= max || read.len() == 1 || read.tensors().iter().filter(|(_, v)| !v.data().is_empty()).count() == 1);
            }
            prop_assert_eq!(seen, tensors.len());
            if let Some(index) = &placement.index {
                let total: u64 = tensors.iter().map(OutTensor::bytes).sum();
                prop_assert_eq!(index["metadata"]["total_size"].as_u64(), Some(total));
            }
        }
    }
}
