//! Sizes, times, rates and choices as people write and read them.

use std::fmt;

use clap::ValueEnum;

use crate::error::{Error, Result};

/// Bytes in binary units: `1.50 GiB`.
pub fn binary(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", units[unit]) }
}

/// A number with the word for one or for several: `1 file`, `2 files`.
pub fn counted(n: usize, one: &str, several: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { several })
}

/// Seconds in the unit that fits: `350 ms`, `12.3 s`, `4 min 05 s`, `2 h 10 min`.
pub fn duration(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 100.0 {
        format!("{seconds:.1} s")
    } else {
        let whole = seconds.round() as u64;
        match whole / 3600 {
            0 => format!("{} min {:02} s", whole / 60, whole % 60),
            hours => format!("{hours} h {:02} min", whole % 3600 / 60),
        }
    }
}

/// Writes a value as it is typed on the command line.
pub fn write_name(value: &impl ValueEnum, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.pad(value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string()).as_str())
}

/// The smallest size that may be given without a unit, in bytes.
const UNIT_FORGOTTEN: u64 = 1 << 20;

/// Reads a size: a number with a decimal (`5GB`) or binary (`5GiB`) unit, or of bytes (`4096B`). A number without a unit
/// counts bytes; where those are fewer than 1 MiB, the unit was forgotten.
///
/// # Errors
/// Exit code 2 with the accepted forms.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let wrong = || {
        Error::usage(format!("{text:?} is not a size"))
            .fix("write a number above zero with a unit, such as 118GiB, 5GB or 4096B")
    };
    let (number, unit) = split_unit(text);
    let factor: u64 = match unit.as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    let bytes = number.ok_or_else(wrong)? * factor as f64;
    if !(1.0..u64::MAX as f64).contains(&bytes) {
        return Err(wrong());
    }
    if unit.is_empty() && bytes < UNIT_FORGOTTEN as f64 {
        return Err(Error::usage(format!("{text:?} is a size without a unit"))
            .fix(format!("write {text}GiB or {text}GB, or {text}B if bytes are meant")));
    }
    Ok(bytes as u64)
}

/// Reads the rate of a link in bits a second (`2.5Gbit`, `100Mbit`; `Gbit/s` and `Gbps` are the same) as bytes a second.
///
/// # Errors
/// Exit code 2 with the accepted forms.
pub fn parse_link(text: &str) -> Result<f64> {
    let wrong = || {
        Error::usage(format!("{text:?} is not the rate of a link"))
            .fix("write a number above zero with a unit, such as 2.5Gbit or 100Mbit")
    };
    let (number, unit) = split_unit(text);
    let factor = match unit.trim_end_matches("/s") {
        "mbit" | "mbps" => 1e6,
        "gbit" | "gbps" => 1e9,
        _ => return Err(wrong()),
    };
    number
        .map(|number| number * factor / 8.0)
        .filter(|rate| rate.is_finite() && *rate > 0.0)
        .ok_or_else(wrong)
}

/// A number and the unit behind it, in small letters.
fn split_unit(text: &str) -> (Option<f64>, String) {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    (number.parse().ok(), unit.trim().to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_kinds_of_units() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("118GiB", 118 << 30),
            ("1.5 MiB", 3 << 19),
            ("4096B", 4096),
            ("1048576", 1 << 20),
            ("2kb", 2000),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
        for text in
            ["", "GB", "5XB", "-1GB", "0", "0GB", "1e400GB", "99999999999TiB", "1.2.3GB", "118", "1048575"]
        {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        let said = parse_bytes("118").unwrap_err().to_string();
        assert!(said.contains("118GiB") && said.contains("118B"), "{said}");
    }

    #[test]
    fn links_are_read_in_bits_a_second() {
        assert_eq!(parse_link("2.5Gbit").unwrap(), 312_500_000.0);
        assert_eq!(parse_link("100 mbit").unwrap(), 12_500_000.0);
        assert_eq!(parse_link("200Gbps").unwrap(), 25e9);
        assert_eq!(parse_link("1Gbit/s").unwrap(), 125e6);
        for text in ["", "10", "0Gbit", "Gbit", "1GB", "1GB/s"] {
            assert!(parse_link(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_times_are_written_briefly() {
        assert_eq!(binary(1023), "1023 B");
        assert_eq!(binary(3 << 29), "1.50 GiB");
        assert_eq!(duration(0.35), "350 ms");
        assert_eq!(duration(12.34), "12.3 s");
        assert_eq!(duration(245.0), "4 min 05 s");
        assert_eq!(duration(7800.0), "2 h 10 min");
    }
}
