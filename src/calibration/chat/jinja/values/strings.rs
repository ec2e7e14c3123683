//! What Python's `str` does and Rust's does not, or otherwise.

/// Python's `str.isspace` for one character.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1C'..='\x1F').contains(&c)
}

/// Without white space at the end.
pub fn trim_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// The first letter in title case, or nothing for an empty text.
fn title_letter(c: char) -> String {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".into(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".into(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".into(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".into(),
        'ß' => "Ss".into(),
        // A ligature is two letters, of which one becomes large.
        'ﬀ'..='ﬆ' => {
            let upper: Vec<char> = c.to_uppercase().collect();
            upper[..1].iter().copied().chain(upper[1..].iter().flat_map(|c| c.to_lowercase())).collect()
        }
        'ა'..='ჿ' => c.into(),
        c => c.to_uppercase().collect(),
    }
}

/// Python's `str.capitalize`.
pub fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => title_letter(first) + &lower_after(text, first.len_utf8()),
        None => String::new(),
    }
}

/// The lower case of what follows; the end of a word may depend on what stands before it.
fn lower_after(text: &str, at: usize) -> String {
    let first: String = text[..at].to_lowercase();
    text.to_lowercase().split_off(first.len().min(text.to_lowercase().len()))
}

/// Python's `str.title`: every run of letters is a word.
pub fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        let cased = c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ');
        match (cased, inside) {
            (true, false) => titled.push_str(&title_letter(c)),
            _ => titled.extend(c.to_lowercase()),
        }
        inside = cased;
    }
    titled
}

/// Python's `str.swapcase`.
pub fn swap_case(text: &str) -> String {
    let mut swapped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_uppercase() {
            swapped.extend(c.to_lowercase());
        } else {
            swapped.extend(c.to_uppercase());
        }
    }
    swapped
}

/// Python's `str.splitlines`.
pub fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(c, '\n' | '\r' | '\x0B' | '\x0C' | '\x1C'..='\x1E' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let after = &rest[at..];
        let end = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        lines.push(if keep_ends { &rest[..at + end] } else { &rest[..at] });
        rest = &rest[at + end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Python's `str.split` and `str.rsplit`; no separator means runs of white space, no limit any number.
pub fn split<'a>(
    text: &'a str,
    separator: Option<&str>,
    limit: Option<usize>,
    from_right: bool,
) -> Vec<&'a str> {
    let most = limit.unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match (separator, from_right) {
        (Some(separator), false) => text.splitn(most.saturating_add(1), separator).collect(),
        (Some(separator), true) => text.rsplitn(most.saturating_add(1), separator).collect(),
        (None, false) => {
            let mut parts = Vec::new();
            let mut rest = text.trim_start_matches(is_space);
            while !rest.is_empty() {
                let end = if parts.len() == most { None } else { rest.find(is_space) };
                let end = end.unwrap_or(rest.len());
                parts.push(&rest[..end]);
                rest = rest[end..].trim_start_matches(is_space);
            }
            parts
        }
        (None, true) => {
            let mut parts = Vec::new();
            let mut rest = trim_end(text);
            while !rest.is_empty() {
                let start = if parts.len() == most { None } else { rest.rfind(is_space) };
                let start = start.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                parts.push(&rest[start..]);
                rest = trim_end(&rest[..start]);
            }
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    parts
}

/// Text padded to a width, `fill` on either side as Python's `str.center` has it.
pub fn centered(text: &str, width: usize, fill: char) -> String {
    let length = text.chars().count();
    let missing = width.saturating_sub(length);
    let left = missing / 2 + (missing & width & 1);
    let pad = |count: usize| std::iter::repeat_n(fill, count);
    pad(left).chain(text.chars()).chain(pad(missing - left)).collect()
}

/// Escapes what HTML would read as markup.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&#39;"),
            '"' => escaped.push_str("&#34;"),
            c => escaped.push(c),
        }
    }
    escaped
}
