//! Damage that knows nothing of what the bytes mean.

use crate::support::Random;

/// Numbers at which sizes and offsets overflow.
const EDGES: [u64; 8] = [0, 1, 0x7F, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 53, u64::MAX];

/// One to three changes anywhere: bits, numbers, pieces cut out, repeated or overwritten, and an early end.
pub fn bytes(valid: &[u8], random: &mut Random) -> Vec<u8> {
    let mut spoiled = valid.to_vec();
    for _ in 0..1 + random.below(3) {
        if spoiled.is_empty() {
            spoiled.push(random.next() as u8);
        }
        let at = random.below(spoiled.len());
        let piece = at..(at + 1 + random.below(64)).min(spoiled.len());
        match random.below(8) {
            0 => spoiled[at] ^= 1 << random.below(8),
            1 => spoiled[at] = random.next() as u8,
            2 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let room = (spoiled.len() - at).min([1, 2, 4, 8][random.below(4)]);
                spoiled[at..at + room].copy_from_slice(&edge[..room]);
            }
            3 => spoiled.truncate(at),
            4 => drop(spoiled.drain(piece)),
            5 => {
                let repeated = spoiled[piece].repeat(1 + random.below(20));
                spoiled.splice(at..at, repeated);
            }
            6 => spoiled[piece].fill(0),
            _ => spoiled.extend((0..random.below(64)).map(|_| random.next() as u8)),
        }
    }
    spoiled
}

/// One bit of the data behind a safetensors header.
pub fn flip(valid: &[u8], random: &mut Random) -> Vec<u8> {
    let mut spoiled = valid.to_vec();
    let data = 8 + u64::from_le_bytes(valid[..8].try_into().unwrap()) as usize;
    spoiled[data + random.below(valid.len() - data)] ^= 1 << random.below(8);
    spoiled
}

/// The same as [`bytes`] near the front, where headers are.
pub fn front(valid: &[u8], random: &mut Random) -> Vec<u8> {
    let (head, rest) = valid.split_at(valid.len().min(512));
    let mut spoiled = bytes(head, random);
    spoiled.extend(rest);
    spoiled
}

/// Changes to text: words of its language put in, pieces repeated or cut, letters that end strings or are no UTF-8.
pub fn text(valid: &[u8], words: &[&str], random: &mut Random) -> Vec<u8> {
    let mut spoiled = valid.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(spoiled.len() + 1);
        let piece = at..(at + random.below(40)).min(spoiled.len());
        let times = [1, 2, 30, 3000][random.below(4)];
        let insert: Vec<u8> = match random.below(7) {
            0 | 1 => random.of(words).as_bytes().repeat(times),
            2 => spoiled[piece.clone()].repeat(times),
            3 => {
                spoiled.drain(piece);
                Vec::new()
            }
            4 => vec![random.next() as u8],
            5 => "\u{1b}]0;title\u{7}\u{202e}\u{0}\r\n".as_bytes().to_vec(),
            _ => {
                spoiled.truncate(at);
                Vec::new()
            }
        };
        spoiled.splice(at.min(spoiled.len())..at.min(spoiled.len()), insert);
    }
    spoiled
}
