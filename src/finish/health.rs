//! Maxima that no scale can be made of, and what to do about them.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::model::{Group, LinearSpec};

/// How long a fault that may have come from a layer before is kept back.
const DEFERENCE: Duration = Duration::from_secs(2);

/// The maximum of an input that can be turned into a scale; zero is one where inputs are not `scaled`. NaN passes from
/// layer to layer and from stage to stage: where it began, a weight may say so, which is what the user must know, and
/// that stage is given the time to speak first.
pub fn healthy_input(group: &Group, layer: usize, amax: f32, scaled: bool) -> Result<()> {
    let names: Vec<&str> = group.members.iter().map(|linear| linear.name.as_str()).collect();
    if !amax.is_finite() {
        if layer > 0 {
            std::thread::sleep(DEFERENCE);
        }
        return Err(Error::run(format!(
            "health check: NaN or infinity in what {} read from the calibration data",
            names.join(", ")
        ))
        .fix(format!(
            "look for NaN, infinity or huge numbers in the weights of layer {layer} and of those before it, or \
             calibrate with other data (--calib)"
        )));
    }
    if amax > 0.0 || !scaled {
        return Ok(());
    }
    let ignored: Vec<String> = names.iter().map(|name| format!("--ignore {name}")).collect();
    Err(Error::run(format!("health check: all that {} read from the calibration data is zero", names.join(", "))).fix(
        format!(
            "calibrate with more or other data (--calib, --calib-samples), leave them in their dtype ({}), or quantize \
             weights only (--scheme nvfp4a16)",
            ignored.join(" ")
        ),
    ))
}

/// The maximum of a weight that can be turned into a scale.
pub fn healthy_weight(linear: &LinearSpec, amax: f32) -> Result<()> {
    let (fault, fix) = match amax {
        _ if !amax.is_finite() => {
            ("hold NaN or infinity", "repair or replace this tensor in the source".to_string())
        }
        0.0 => {
            let ignored = format!("leave the linear in its dtype with --ignore {}", linear.name);
            ("are all zero", format!("repair or replace this tensor in the source, or {ignored}"))
        }
        _ => return Ok(()),
    };
    Err(Error::run(format!("health check: the weights {fault}")).tensor(linear.weight()).fix(fix))
}
