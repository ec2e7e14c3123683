//! The health check: maxima from which no scale can be computed (zero, NaN, infinity), and what the user can do.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::model::{Group, LinearSpec};

/// The delay before NaN in a layer's input is reported. It may come from an earlier layer, whose rank finds it as well:
/// in this time that rank reports first, and names the tensor where it began.
const UPSTREAM_GRACE: Duration = Duration::from_secs(2);

/// Checks `amax`, the largest absolute value in the input of a group. It must be finite, and where inputs are quantized
/// (`scaled`) it must not be zero.
///
/// # Errors
/// Exit code 5, naming the linears that read the input. NaN is reported after [`UPSTREAM_GRACE`].
pub fn healthy_input(group: &Group, layer: usize, amax: f32, scaled: bool) -> Result<()> {
    let names: Vec<&str> = group.members.iter().map(|linear| linear.name.as_str()).collect();
    if !amax.is_finite() {
        if layer > 0 {
            std::thread::sleep(UPSTREAM_GRACE);
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

/// Checks `amax`, the largest absolute value of a linear's weight. It must be finite and not zero.
///
/// # Errors
/// Exit code 5, naming the tensor.
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
