//! FP8 weights of a source, which everybody else sees as BF16.
//!
//! Where config.json describes FP8 weights ([`Form::described`]), each weight that is F8_E4M3 in the files becomes a BF16
//! tensor of the same name and shape, and its scales disappear from the list of tensors, as do the scales of FP8 inputs
//! and caches, which belong to an FP8 engine. Which weights are FP8 is what the tensors say, not the configuration's
//! list of modules. Nothing is decoded before its bytes are asked for, and then no more than was asked for.

mod decode;
mod forms;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use safetensors::Dtype;
use serde_json::Value;

use super::source::{Checkpoint, Entry};
use crate::checkpoint::declared::strings;
use crate::error::{Error, Result};
use crate::units::counted;

pub(in crate::checkpoint) use decode::Decoder;
use forms::Form;

/// What a tensor of scales is called: its weight's name, and one of these.
const SCALES: [&str; 2] = ["_scale_inv", "_scale"];

/// What the scale of a weight's FP8 inputs is called: instead of the last part of the weight's name, or behind it.
const INPUT_SCALES: [&str; 3] = [".activation_scale", ".input_scale", "_activation_scale"];

/// Ends of the names of an FP8 cache's scales.
const CACHE_SCALES: [&str; 4] = [".k_scale", ".v_scale", ".q_scale", ".output_scale"];

const AGAIN: &str = "download the checkpoint again: config.json and its weights don't belong together";

/// How a weight that is seen as BF16 is stored.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::checkpoint) struct Fp8 {
    /// Name of its scales.
    pub scales: String,
    /// Where its scales lie.
    pub lie: Entry,
    /// Rows and columns that share a scale.
    block: [usize; 2],
}

/// What an FP8 checkpoint has besides the tensors that everybody sees.
#[derive(Debug)]
pub(in crate::checkpoint) struct Unseen {
    /// The description that was taken out of config.json.
    pub quantization: Value,
    /// Scales of inputs and caches, which nobody reads.
    pub unread: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Puts BF16 tensors in the place of FP8 weights and scales where config.json describes such weights and there are
    /// any.
    ///
    /// # Errors
    /// Exit code 3, naming the tensor: scales that are missing, of another shape or of an unknown dtype; scales without
    /// a weight that is FP8.
    pub(in crate::checkpoint) fn see_fp8_as_bf16(&mut self) -> Result<()> {
        let Some(forms) = Form::described(&self.config) else { return Ok(()) };
        let is_weight = |(name, entry): &(&String, &Entry)| {
            entry.dtype == Dtype::F8_E4M3 && !SCALES.iter().any(|end| name.ends_with(end))
        };
        let weights: Vec<String> =
            self.tensors.iter().filter(is_weight).map(|(name, _)| name.clone()).collect();
        for name in &weights {
            let fp8 = self.scales_of(name, &forms)?;
            self.tensors.remove(&fp8.scales);
            let entry = self.tensors.get_mut(name).expect("its name was just read here");
            entry.dtype = Dtype::BF16;
            entry.bytes += fp8.lie.bytes;
            entry.fp8 = Some(Box::new(fp8));
        }
        self.refuse_other_scales()?;
        let Some(quantization) = forms::description(&self.config).filter(|_| !weights.is_empty()).cloned()
        else {
            return Ok(());
        };
        let unread = self.take_unread(!quantization["kv_cache_scheme"].is_null());
        self.notes.push(format!(
            "{} in the files: read as BF16, each code times its scale{}",
            match weights.len() {
                1 => "1 weight is FP8".to_string(),
                n => format!("{n} weights are FP8"),
            },
            match unread.len() {
                0 => String::new(),
                n => format!("; {} of FP8 inputs or caches left out", counted(n, "scale", "scales")),
            }
        ));
        forms::forget(&mut self.config);
        self.fp8 = Some(Unseen { quantization, unread });
        Ok(())
    }

    /// The same where there are no weights yet: what has rows and columns, is no embedding and is not left out by name is
    /// FP8, and takes one byte for each element. Its scales are not counted.
    pub(in crate::checkpoint) fn expect_fp8(&mut self) {
        if Form::described(&self.config).is_none() {
            return;
        }
        let description = forms::description(&self.config).expect("just read");
        let lists =
            ["modules_to_not_convert", "ignored_layers", "ignore"].map(|list| strings(&description[list]));
        let ends = [lists.concat(), vec!["embed_tokens".into(), "lm_head".into()]].concat();
        for (name, entry) in &mut self.tensors {
            let left_out =
                |part: &String| name.split(part.as_str()).nth(1).is_some_and(|rest| rest.starts_with('.'));
            if entry.shape.len() > 1 && !ends.iter().any(left_out) {
                entry.dtype = Dtype::BF16;
                entry.bytes = entry.shape.iter().product::<usize>() as u64;
            }
        }
        forms::forget(&mut self.config);
    }

    /// The scales of an FP8 weight.
    fn scales_of(&self, name: &str, forms: &[Form]) -> Result<Fp8> {
        let weight = &self.tensors[name];
        let refused = |what: String, file: usize, tensor: &str| {
            Err(Error::input(what).file(&self.files[file]).tensor(tensor).fix(AGAIN))
        };
        let names = SCALES.map(|end| format!("{name}{end}"));
        let scales = match names.each_ref().map(|scales| self.tensors.contains_key(scales)) {
            [true, true] => {
                let what = format!(
                    "the weight is FP8, and has two tensors of scales: {} and {}",
                    names[0], names[1]
                );
                return refused(what, weight.file, name);
            }
            [true, false] => &names[0],
            [false, true] => &names[1],
            [false, false] => {
                let what = format!(
                    "the weight is FP8, and its scales are missing: neither {} nor {}",
                    names[0], names[1]
                );
                return refused(what, weight.file, name);
            }
        };
        let lie = self.tensors[scales].clone();
        if decode::scales(lie.dtype, &[]).is_none() {
            let what = format!("scales are F32, BF16, F16 or F8_E8M0, not {:?}", lie.dtype);
            return refused(what, lie.file, scales);
        }
        match forms.iter().find_map(|form| form.block(&weight.shape, &lie.shape)) {
            Some(block) => Ok(Fp8 { scales: scales.clone(), lie, block }),
            None => {
                let forms: Vec<String> = forms.iter().map(Form::to_string).collect();
                let what = format!(
                    "the scales' shape is {:?}, the weight's is {:?}, and config.json says {}",
                    lie.shape,
                    weight.shape,
                    forms.join(", or ")
                );
                refused(what, lie.file, scales)
            }
        }
    }

    /// Scales of a weight that is not FP8, or not there, would be left out without a word.
    fn refuse_other_scales(&self) -> Result<()> {
        for (name, entry) in &self.tensors {
            let Some(weight) = SCALES.iter().find_map(|end| name.strip_suffix(end)) else { continue };
            let what = match self.tensors.get(weight) {
                Some(weight) => {
                    format!("these are the scales of a weight that is {:?}, not FP8", weight.dtype)
                }
                None if weight.ends_with(".weight") => {
                    format!("these are the scales of {weight}, which is missing")
                }
                None => continue,
            };
            return Err(Error::input(what).file(&self.files[entry.file]).tensor(name).fix(AGAIN));
        }
        Ok(())
    }

    /// Takes the scales of FP8 inputs, and of caches where the configuration has such, out of the list of tensors.
    fn take_unread(&mut self, caches: bool) -> BTreeMap<String, Entry> {
        let is_fp8 = |name: &str| self.tensors.get(name).is_some_and(|entry| entry.fp8.is_some());
        let is_unread = |name: &String| {
            let of_input = INPUT_SCALES.iter().filter_map(|end| name.strip_suffix(end));
            of_input.into_iter().any(|weight| is_fp8(weight) || is_fp8(&format!("{weight}.weight")))
                || caches && CACHE_SCALES.iter().any(|end| name.ends_with(end))
        };
        let names: Vec<String> = self.tensors.keys().filter(|name| is_unread(name)).cloned().collect();
        names.into_iter().filter_map(|name| self.tensors.remove_entry(&name)).collect()
    }

    /// What decodes an FP8 weight. Its scales are read here.
    ///
    /// # Errors
    /// Exit code 3, naming the tensor of scales, where one is not finite and positive; 5 where they can't be read.
    pub(in crate::checkpoint) fn decoder(&self, shape: &[usize], fp8: &Fp8) -> Result<Decoder> {
        let Fp8 { scales: name, lie, block } = fp8;
        let mut bytes = vec![0; lie.bytes as usize];
        self.handles[lie.file].read_exact_at(&mut bytes, lie.offset).map_err(|e| {
            Error::run(format!("can't read the source: {e}"))
                .file(&self.files[lie.file])
                .tensor(name)
                .fix("check the disk or the network it is on, then use --resume")
        })?;
        let scales = decode::scales(lie.dtype, &bytes).expect("the dtype was looked at when it was opened");
        match scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
            None => Ok(Decoder::new(scales, *block, shape)),
            Some(at) => {
                Err(Error::input(format!("scale {at} is {:e}, no finite positive number", scales[at]))
                    .file(&self.files[lie.file])
                    .tensor(name)
                    .fix("repair or replace this tensor in the source"))
            }
        }
    }

    /// Description of FP8 weights that was taken out of [`Checkpoint::config`].
    pub fn fp8_description(&self) -> Option<&Value> {
        self.fp8.as_ref().map(|unseen| &unseen.quantization)
    }

    /// Every tensor as the files hold it: name, dtype, shape.
    pub fn stored_tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        let seen = self.tensors.iter().flat_map(|(name, entry)| {
            let scales =
                entry.fp8.as_ref().map(|fp8| (fp8.scales.as_str(), fp8.lie.dtype, &fp8.lie.shape[..]));
            [Some((name.as_str(), entry.stored_dtype(), &entry.shape[..])), scales].into_iter().flatten()
        });
        let unread = self.fp8.iter().flat_map(|unseen| &unseen.unread);
        seen.chain(unread.map(|(name, entry)| (name.as_str(), entry.dtype, &entry.shape[..])))
    }
}
