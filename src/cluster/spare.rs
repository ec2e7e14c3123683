//! Memory of messages that have been sent or taken, for the next ones: fresh pages cost more than a copy into them.

use std::sync::Mutex;

static BUFFERS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Buffers that are kept: a few messages of each direction.
const KEPT: usize = 4;

/// Bytes from which a buffer is worth keeping.
const LARGE: usize = 1 << 20;

/// A buffer of `bytes` bytes with any contents.
pub fn take(bytes: usize) -> Vec<u8> {
    let large = bytes >= LARGE;
    let kept = if large { BUFFERS.lock().expect("no holder of this lock panics").pop() } else { None };
    let mut buffer = kept.unwrap_or_default();
    if buffer.is_empty() {
        return vec![0; bytes];
    }
    buffer.resize(bytes, 0);
    buffer
}

/// Takes a buffer that nobody needs any more.
pub fn give(buffer: Vec<u8>) {
    let mut buffers = BUFFERS.lock().expect("no holder of this lock panics");
    if buffer.len() >= LARGE && buffers.len() < KEPT {
        buffers.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_the_length_that_was_asked_for() {
        for bytes in [0, 10, LARGE, 3 * LARGE, LARGE] {
            let buffer = take(bytes);
            assert_eq!(buffer.len(), bytes);
            give(buffer);
        }
    }
}
