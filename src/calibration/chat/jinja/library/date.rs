//! `strftime_now`: the date that templates see.

use crate::calibration::chat::jinja::meter::{Outcome, fail};

/// The day that it always is, so that the same data gives the same tokens on any day. Templates that know no date
/// of their own often write this one, Llama 3's among them.
pub const TODAY: &str = "2024-07-26";

/// `strftime` of that day's midnight.
pub fn strftime_now(format: &str) -> Outcome<String> {
    let mut written = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            written.push(c);
            continue;
        }
        let mut code = chars.next();
        let flag = code.filter(|c| "-_^0".contains(*c));
        if flag.is_some() {
            code = chars.next();
        }
        let text = match code {
            Some('Y' | 'G') => "2024",
            Some('C') => "20",
            Some('y' | 'g') => "24",
            Some('m') => "07",
            Some('B') => "July",
            Some('b' | 'h') => "Jul",
            Some('d' | 'e') => "26",
            Some('j') => "208",
            Some('A') => "Friday",
            Some('a') => "Fri",
            Some('u' | 'w') => "5",
            Some('U') => "29",
            Some('V' | 'W') => "30",
            Some('F') => TODAY,
            Some('D' | 'x') => "07/26/24",
            Some('c') => "Fri Jul 26 00:00:00 2024",
            Some('H' | 'M' | 'S') => "00",
            Some('k') => " 0",
            Some('I') => "12",
            Some('l') => "12",
            Some('p') => "AM",
            Some('P') => "am",
            Some('f') => "000000",
            Some('T' | 'X') => "00:00:00",
            Some('R') => "00:00",
            Some('r') => "12:00:00 AM",
            Some('Z' | 'z') => "",
            Some('n') => "\n",
            Some('t') => "\t",
            Some('%') => "%",
            _ => return fail(format!("strftime_now can't write the format {format:?}")),
        };
        match flag {
            Some('^') => written.push_str(&text.to_uppercase()),
            Some(flag @ ('-' | '_')) if text.len() == 2 && text.starts_with(['0', ' ']) => {
                if flag == '_' {
                    written.push(' ');
                }
                written.push_str(&text[1..]);
            }
            _ => written.push_str(text),
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_always_the_same() {
        for (format, text) in [
            ("%Y-%m-%d", "2024-07-26"),
            ("%d %b %Y", "26 Jul 2024"),
            ("%A, %B %-d, %Y at %H:%M:%S %p", "Friday, July 26, 2024 at 00:00:00 AM"),
            ("%-m/%_m/%^a %% %j", "7/ 7/FRI % 208"),
        ] {
            assert_eq!(strftime_now(format).unwrap(), text);
        }
        assert!(strftime_now("%Q").is_err());
        assert!(strftime_now("100%").is_err());
    }
}
