//! Source to tokens, with the white space rules `trim_blocks` and `lstrip_blocks`.

use std::sync::Arc;

use crate::calibration::chat::jinja::meter::{Fault, Outcome};
use crate::calibration::chat::jinja::values::strings::{is_space, trim_end};

/// A token and where it stands.
#[derive(Clone, Debug)]
pub struct Token {
    /// What it is.
    pub kind: Kind,
    /// The line, from 1.
    pub line: u32,
}

/// Kinds of tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Text outside of tags.
    Data(Arc<str>),
    /// `{{`
    PrintBegin,
    /// `}}`
    PrintEnd,
    /// `{%`
    TagBegin,
    /// `%}`
    TagEnd,
    /// A name or a keyword.
    Name(Arc<str>),
    /// A string literal's value.
    Text(Arc<str>),
    /// An integer literal's value.
    Int(i128),
    /// A float literal's value.
    Float(f64),
    /// An operator.
    Op(&'static str),
    /// The end of the template.
    End,
}

/// Longer operators stand before those that begin like them.
const OPERATORS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",",
];

/// The tokens of a template.
pub fn tokens(source: &str) -> Outcome<Vec<Token>> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { rest: &source, line: 1, line_start: true, tokens: Vec::new() };
    lexer.template()?;
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    rest: &'a str,
    line: u32,
    /// The last token ended a line.
    line_start: bool,
    tokens: Vec<Token>,
}

impl<'a> Lexer<'a> {
    fn template(&mut self) -> Outcome<()> {
        while let Some(at) = ["{%", "{{", "{#"].iter().filter_map(|mark| self.rest.find(mark)).min() {
            let (data, begin) = (&self.rest[..at], &self.rest[at..at + 2]);
            let after = &self.rest[at + 2..];
            let sign = after.chars().next().filter(|c| "+-".contains(*c));
            let length = at + 2 + sign.map_or(0, char::len_utf8);
            let data = self.stripped(data, sign, begin != "{{");
            self.push_data(data);
            self.eat(length);
            match begin {
                "{#" => self.comment()?,
                "{{" => self.inside(Kind::PrintBegin, Kind::PrintEnd)?,
                _ => match raw_begin(self.rest) {
                    Some(length) => self.raw(length)?,
                    None => self.inside(Kind::TagBegin, Kind::TagEnd)?,
                },
            }
        }
        self.push_data(self.rest);
        self.eat(self.rest.len());
        self.push(Kind::End);
        Ok(())
    }

    /// Text before a tag without the white space that the tag takes.
    fn stripped(&self, data: &'a str, sign: Option<char>, strips_line: bool) -> &'a str {
        if sign == Some('-') {
            return trim_end(data);
        }
        if sign != Some('+') && strips_line {
            let start = data.rfind('\n').map_or(0, |at| at + 1);
            if (start > 0 || self.line_start) && data[start..].chars().all(is_space) {
                return &data[..start];
            }
        }
        data
    }

    fn push(&mut self, kind: Kind) {
        self.tokens.push(Token { kind, line: self.line });
    }

    fn push_data(&mut self, data: &str) {
        if !data.is_empty() {
            self.push(Kind::Data(data.into()));
        }
    }

    fn eat(&mut self, length: usize) {
        let (eaten, rest) = self.rest.split_at(length);
        self.line += eaten.matches('\n').count() as u32;
        if let Some(last) = eaten.chars().last() {
            self.line_start = last == '\n';
        }
        self.rest = rest;
    }

    fn eat_space(&mut self) {
        self.eat(self.rest.len() - self.rest.trim_start_matches(is_space).len());
    }

    fn fault<T>(&self, message: impl Into<String>) -> Outcome<T> {
        Err(Fault::new(message).at(self.line))
    }

    /// Eats an end mark with its sign and the white space that it takes, if it is next.
    fn end(&mut self, mark: &str, plus: bool, trims_newline: bool) -> bool {
        let rest = self.rest;
        if let Some(after) = rest.strip_prefix('-').and_then(|rest| rest.strip_prefix(mark)) {
            self.eat(rest.len() - after.trim_start_matches(is_space).len());
        } else if let Some(after) = rest.strip_prefix('+').and_then(|rest| rest.strip_prefix(mark))
            && plus
        {
            self.eat(rest.len() - after.len());
        } else if let Some(after) = rest.strip_prefix(mark) {
            let after = if trims_newline { after.strip_prefix('\n').unwrap_or(after) } else { after };
            self.eat(rest.len() - after.len());
        } else {
            return false;
        }
        true
    }

    fn comment(&mut self) -> Outcome<()> {
        // Jinja2 lets a template end with the begin of a comment.
        if self.rest.is_empty() {
            return Ok(());
        }
        let Some(at) = self.rest.find("#}") else { return self.fault("a comment has no end") };
        let sign = self.rest[..at].ends_with(['-', '+']);
        self.eat(at - usize::from(sign));
        self.end("#}", true, true);
        Ok(())
    }

    fn raw(&mut self, begin: usize) -> Outcome<()> {
        self.eat(begin);
        let mut from = 0;
        while let Some(at) = self.rest[from..].find("{%").map(|at| from + at) {
            let after = &self.rest[at + 2..];
            let sign = after.chars().next().filter(|c| "+-".contains(*c));
            let name = after[sign.map_or(0, char::len_utf8)..].trim_start_matches(is_space);
            if let Some(end) = name.strip_prefix("endraw").map(|end| end.trim_start_matches(is_space))
                && ["%}", "-%}", "+%}"].iter().any(|mark| end.starts_with(mark))
            {
                let data = self.stripped(&self.rest[..at], sign, true);
                let length = self.rest.len() - end.len();
                self.push_data(data);
                self.eat(length);
                self.end("%}", true, true);
                return Ok(());
            }
            from = at + 2;
        }
        self.fault("a raw block has no end")
    }

    /// The tokens between two marks.
    fn inside(&mut self, begin: Kind, end: Kind) -> Outcome<()> {
        let is_tag = end == Kind::TagEnd;
        self.push(begin);
        let mut open = Vec::new();
        loop {
            let line = self.line;
            if open.is_empty() && self.end(if is_tag { "%}" } else { "}}" }, is_tag, is_tag) {
                self.tokens.push(Token { kind: end, line });
                return Ok(());
            }
            let Some(first) = self.rest.chars().next() else {
                return self.fault("the template ends inside a tag");
            };
            if is_space(first) {
                self.eat_space();
            } else if first.is_ascii_digit() {
                self.number()?;
            } else if first == '_' || first.is_alphabetic() {
                let length =
                    self.rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(self.rest.len());
                let name = self.rest[..length].into();
                self.push(Kind::Name(name));
                self.eat(length);
            } else if first == '\'' || first == '"' {
                self.string(first)?;
            } else if let Some(op) = OPERATORS.iter().find(|op| self.rest.starts_with(**op)) {
                match *op {
                    "(" | "[" | "{" => open.push(*op),
                    ")" | "]" | "}" => {
                        let pair = open.pop().unwrap_or_default();
                        if !matches!((pair, *op), ("(", ")") | ("[", "]") | ("{", "}")) {
                            return self.fault(format!("unexpected '{op}'"));
                        }
                    }
                    _ => {}
                }
                self.push(Kind::Op(op));
                self.eat(op.len());
            } else {
                return self.fault(format!("unexpected character {first:?}"));
            }
        }
    }

    fn number(&mut self) -> Outcome<()> {
        let bytes = self.rest.as_bytes();
        let digits = |from: usize| {
            let mut at = from;
            while at < bytes.len()
                && (bytes[at].is_ascii_digit()
                    || (bytes[at] == b'_' && at > from && bytes.get(at + 1).is_some_and(u8::is_ascii_digit)))
            {
                at += 1;
            }
            at
        };
        let whole = digits(0);
        let after_dot = matches!(self.tokens.last(), Some(Token { kind: Kind::Op("."), .. }));
        let mut end = whole;
        if !after_dot {
            if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
                end = digits(end + 1);
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
                if bytes.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
                    end = digits(end + 1 + sign);
                }
            }
        }
        if end > whole {
            let value: f64 =
                self.rest[..end].replace('_', "").parse().expect("digits, a point and an exponent");
            self.push(Kind::Float(value));
            self.eat(end);
            return Ok(());
        }
        let radix = match bytes.get(1) {
            Some(b'x' | b'X') if bytes[0] == b'0' => Some(16),
            Some(b'o' | b'O') if bytes[0] == b'0' => Some(8),
            Some(b'b' | b'B') if bytes[0] == b'0' => Some(2),
            _ => None,
        };
        let (text, radix, length) = match radix {
            Some(radix) => {
                let text = &self.rest[2..];
                let length = text.find(|c: char| c != '_' && !c.is_digit(radix)).unwrap_or(text.len());
                (&text[..length], radix, 2 + length)
            }
            None => (&self.rest[..whole], 10, whole),
        };
        let Ok(value) = i128::from_str_radix(&text.replace('_', ""), radix) else {
            return self.fault("a number is too large or not a number");
        };
        self.push(Kind::Int(value));
        self.eat(length);
        Ok(())
    }

    fn string(&mut self, quote: char) -> Outcome<()> {
        let mut value = String::new();
        let mut chars = self.rest.char_indices().skip(1).peekable();
        let hex = |chars: &mut std::iter::Peekable<std::iter::Skip<std::str::CharIndices>>, digits: usize| {
            let mut code = 0;
            for _ in 0..digits {
                code = code * 16 + chars.next()?.1.to_digit(16)?;
            }
            char::from_u32(code)
        };
        while let Some((at, c)) = chars.next() {
            if c == quote {
                self.push(Kind::Text(value.into()));
                self.eat(at + 1);
                return Ok(());
            }
            if c != '\\' {
                value.push(c);
                continue;
            }
            let Some((_, escape)) = chars.next() else { break };
            let known = match escape {
                '\n' => continue,
                '\\' | '\'' | '"' => Some(escape),
                'a' => Some('\x07'),
                'b' => Some('\x08'),
                'f' => Some('\x0C'),
                'n' => Some('\n'),
                'r' => Some('\r'),
                't' => Some('\t'),
                'v' => Some('\x0B'),
                'x' => hex(&mut chars, 2),
                'u' => hex(&mut chars, 4),
                'U' => hex(&mut chars, 8),
                'N' => None,
                '0'..='7' => {
                    let mut code = escape.to_digit(8).expect("just matched");
                    for _ in 0..2 {
                        let Some(digit) = chars.peek().and_then(|(_, c)| c.to_digit(8)) else { break };
                        code = code * 8 + digit;
                        chars.next();
                    }
                    char::from_u32(code)
                }
                other => {
                    value.push('\\');
                    Some(other)
                }
            };
            match known {
                Some(c) => value.push(c),
                None => return self.fault("a string holds an escape that can't be read"),
            }
        }
        self.fault("a string has no end")
    }
}

/// The length of the rest of a tag that begins a raw block, where this is one.
fn raw_begin(rest: &str) -> Option<usize> {
    let name = rest.trim_start_matches(is_space).strip_prefix("raw")?.trim_start_matches(is_space);
    let after = match name.strip_prefix("-%}") {
        Some(after) => after.trim_start_matches(is_space),
        None => name.strip_prefix("%}")?,
    };
    Some(rest.len() - after.len())
}
