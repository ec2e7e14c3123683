//! Opening a file: what its first bytes say about it, compression, and the marks that editors leave.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;

use super::{damaged, unreadable};
use crate::error::{Error, Result};

/// Bytes by which the kind of a file is told.
const HEAD: u64 = 64 << 10;

/// An open file.
pub enum Opened {
    /// Parquet, which is read at any place.
    Parquet(File),
    /// Text of any kind, unpacked and without a byte order mark.
    Text {
        /// Its beginning, which `stream` gives too.
        head: Vec<u8>,
        /// All of it.
        stream: Box<dyn BufRead>,
    },
}

/// Opens the file at `path`.
///
/// # Errors
/// Exit code 3: no readable file, or one of a kind that is known and not read.
pub fn open(path: &Path) -> Result<Opened> {
    let cant = |e: std::io::Error| {
        unreadable(path, format!("can't open the file: {e}")).fix("check the path given to --calib")
    };
    let kind = std::fs::metadata(path).map_err(cant)?;
    if kind.is_dir() {
        return Err(unreadable(path, "this is a directory").fix("give --calib one of the files in it"));
    }
    if !kind.is_file() {
        return Err(unreadable(path, "this is a pipe or a device, not a file")
            .fix("write the documents to a file and give --calib that"));
    }
    let file = File::open(path).map_err(cant)?;
    let (head, stream) = begun(path, file.try_clone().map_err(cant)?)?;
    if head.starts_with(b"PAR1") {
        return Ok(Opened::Parquet(file));
    }
    let (head, stream): (Vec<u8>, Box<dyn Read>) = if head.starts_with(&[0x1F, 0x8B]) {
        begun(path, flate2::read::MultiGzDecoder::new(stream))?
    } else if head.starts_with(&[0x28, 0xB5, 0x2F, 0xFD]) {
        let decoder = zstd::stream::read::Decoder::with_buffer(BufReader::new(stream));
        begun(path, decoder.map_err(|e| damaged(path, &e))?)?
    } else {
        (head, stream)
    };
    if let Some(error) = another_kind(path, &head) {
        return Err(error);
    }
    let mark = if head.starts_with(&[0xEF, 0xBB, 0xBF]) { 3 } else { 0 };
    let mut stream: Box<dyn BufRead> = Box::new(BufReader::with_capacity(256 << 10, stream));
    // A buffer of this size holds the whole mark.
    stream.fill_buf().map_err(|e| damaged(path, &e))?;
    stream.consume(mark);
    Ok(Opened::Text { head: head[mark..].to_vec(), stream })
}

/// The beginning of `stream`, and all of it.
fn begun(path: &Path, mut stream: impl Read + 'static) -> Result<(Vec<u8>, Box<dyn Read>)> {
    let mut head = Vec::new();
    stream.by_ref().take(HEAD).read_to_end(&mut head).map_err(|e| damaged(path, &e))?;
    let all = Cursor::new(head.clone()).chain(stream);
    Ok((head, Box::new(all)))
}

/// The error for a file whose first bytes say that it is no text.
fn another_kind(path: &Path, head: &[u8]) -> Option<Error> {
    let name = path.display();
    let kinds: [(&[u8], &str, String); 10] = [
        (b"BZh", "it is compressed with bzip2", format!("unpack it first: bunzip2 -k '{name}'")),
        (
            &[0xFD, b'7', b'z', b'X', b'Z'],
            "it is compressed with xz",
            format!("unpack it first: unxz -k '{name}'"),
        ),
        (&[0x04, 0x22, 0x4D, 0x18], "it is compressed with LZ4", format!("unpack it first: unlz4 '{name}'")),
        (b"PK\x03\x04", "it is a zip archive", format!("unpack it first: unzip '{name}'")),
        (&[0x1F, 0x8B], "it is packed twice", format!("unpack it first: gunzip -k '{name}'")),
        (b"PAR1", "it is a compressed Parquet file", "unpack it first: Parquet compresses by itself".into()),
        (
            b"ARROW1",
            "it is an Arrow file",
            format!(
                "make Parquet of it: python3 -c \"import pyarrow.feather, pyarrow.parquet; \
                 pyarrow.parquet.write_table(pyarrow.feather.read_table('{name}'), '{name}.parquet')\""
            ),
        ),
        (
            b"version https://git-lfs",
            "it is a pointer that Git LFS left in the place of the file",
            "fetch the file itself: git lfs pull".into(),
        ),
        (b"\xFF\xFE", "it is UTF-16 text", utf8(path, "UTF-16")),
        (b"\xFE\xFF", "it is UTF-16 text", utf8(path, "UTF-16")),
    ];
    let (what, fix) = match kinds.into_iter().find(|(magic, ..)| head.starts_with(magic)) {
        Some((_, what, fix)) => (what, fix),
        None if head.iter().filter(|&&byte| byte == 0).count() > head.len() / 16 => {
            ("it is binary data of an unknown kind", "use JSON lines, plain text or Parquet".into())
        }
        None => return None,
    };
    Some(unreadable(path, what).fix(fix))
}

/// The command that makes UTF-8 of a file.
pub fn utf8(path: &Path, from: &str) -> String {
    format!("make UTF-8 of it: iconv -f {from} -t UTF-8 '{0}' > '{0}.utf8'", path.display())
}
