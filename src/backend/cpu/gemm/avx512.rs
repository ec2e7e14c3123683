//! BF16 products with AVX512-BF16: `vdpbf16ps` multiplies 16 pairs and adds them to 16 f32 sums.
//!
//! A tile of 12 rows by 32 columns keeps 24 sums in registers; each step loads two vectors of `w` and
//! broadcasts one pair of `x` for each row, so 24 multiplications hide behind 14 loads. `w` is packed by
//! panels of 32 rows so that those loads are contiguous, and cut along `k` so that a panel's part stays in
//! the first-level cache. Sums continue across the cuts in the same order as without them.

use std::arch::x86_64::*;
use std::cell::RefCell;

use half::bf16;
use rayon::prelude::*;

use super::Finish;

const ROWS: usize = 12;
const COLS: usize = 32;
/// Pairs along `k` in a packed part: 256 · 32 columns · 4 bytes = 32 KiB.
const DEPTH: usize = 256;

/// Whether the processor has the instructions.
pub fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

thread_local! {
    /// Packed weights and sums of one panel, kept between products.
    static SCRATCH: RefCell<(Vec<u32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// The whole product, panels of 32 columns in parallel.
///
/// # Safety
/// The processor is one for which [`available`] holds.
pub unsafe fn product(m: usize, n: usize, k: usize, x: &[bf16], w: &[bf16], finish: Finish<'_>) {
    let pairs = even(m, k, x);
    let (x, k_even) = pairs.as_ref().map_or((x, k), |copy| (copy.as_slice(), k + 1));
    (0..n.div_ceil(COLS)).into_par_iter().for_each(|panel| {
        let first = panel * COLS;
        let width = COLS.min(n - first);
        SCRATCH.with_borrow_mut(|(packed, sums)| {
            // SAFETY: by this function's own contract.
            unsafe { panel_sums(m, width, k, k_even, x, &w[first * k..(first + width) * k], packed, sums) };
            for (row, sums) in sums[..m * COLS].chunks_exact(COLS).enumerate() {
                finish(row, first, &sums[..width]);
            }
        });
    });
}

/// The whole product on this thread.
///
/// # Safety
/// The processor is one for which [`available`] holds.
pub unsafe fn small(m: usize, n: usize, k: usize, x: &[bf16], w: &[bf16], out: &mut [f32]) {
    let pairs = even(m, k, x);
    let (x, k_even) = pairs.as_ref().map_or((x, k), |copy| (copy.as_slice(), k + 1));
    SCRATCH.with_borrow_mut(|(packed, sums)| {
        for first in (0..n).step_by(COLS) {
            let width = COLS.min(n - first);
            // SAFETY: by this function's own contract.
            unsafe { panel_sums(m, width, k, k_even, x, &w[first * k..(first + width) * k], packed, sums) };
            for (row, sums) in sums[..m * COLS].chunks_exact(COLS).enumerate() {
                out[row * n + first..][..width].copy_from_slice(&sums[..width]);
            }
        }
    });
}

/// `x` with a zero column where `k` is odd: pairs must not cross rows.
fn even(m: usize, k: usize, x: &[bf16]) -> Option<Vec<bf16>> {
    if k.is_multiple_of(2) {
        return None;
    }
    let mut copy = vec![bf16::ZERO; m * (k + 1)];
    for (to, from) in copy.chunks_exact_mut(k + 1).zip(x.chunks_exact(k)) {
        to[..k].copy_from_slice(from);
    }
    Some(copy)
}

/// Fills `sums [m, 32]` with `x [m, k_even] · wᵀ [width, k]`; columns beyond `width` are zero.
///
/// # Safety
/// The processor is one for which [`available`] holds.
#[allow(clippy::too_many_arguments)]
unsafe fn panel_sums(
    m: usize,
    width: usize,
    k: usize,
    k_even: usize,
    x: &[bf16],
    w: &[bf16],
    packed: &mut Vec<u32>,
    sums: &mut Vec<f32>,
) {
    assert!(x.len() >= m * k_even && w.len() >= width * k && width <= COLS, "operands fit their shapes");
    sums.clear();
    sums.resize(m.next_multiple_of(ROWS) * COLS, 0.0);
    packed.resize(DEPTH * COLS, 0);
    let pairs = k_even / 2;
    for from in (0..pairs).step_by(DEPTH) {
        let depth = DEPTH.min(pairs - from);
        pack(width, k, from, depth, w, packed);
        for row in (0..m).step_by(ROWS) {
            // SAFETY: the processor has the instructions by this function's contract. Rows beyond `m` are clamped to the
            // last one, so every pair read lies inside `x`; `packed` holds `depth` rows of 32 pairs; `sums`
            // has whole tiles.
            unsafe {
                tile(&x[2 * from..], row, m, k_even, depth, packed.as_ptr(), sums[row * COLS..].as_mut_ptr());
            }
        }
    }
}

/// Packs `depth` pairs from pair `from` on: `packed[pair][column]`, zero beyond `width` columns and beyond `k`.
fn pack(width: usize, k: usize, from: usize, depth: usize, w: &[bf16], packed: &mut [u32]) {
    if width < COLS {
        packed[..depth * COLS].fill(0);
    }
    for column in 0..width {
        let row = &w[column * k + 2 * from..(column + 1) * k];
        let row = &row[..row.len().min(2 * depth)];
        for (pair, values) in row.chunks(2).enumerate() {
            let high = values.get(1).map_or(0, |value| value.to_bits() as u32);
            packed[pair * COLS + column] = values[0].to_bits() as u32 | high << 16;
        }
    }
}

/// Adds one tile's products to its sums.
///
/// # Safety
/// The processor has AVX512F and AVX512-BF16. `x` starts at the part's first pair of row 0 and holds
/// `depth` pairs at each of the rows `0..m` of length `k`; `packed` holds `depth · 32` pairs; `sums` holds
/// 12 rows of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile(x: &[bf16], row: usize, m: usize, k: usize, depth: usize, packed: *const u32, sums: *mut f32) {
    let rows: [*const i32; ROWS] = std::array::from_fn(|i| x[(row + i).min(m - 1) * k..].as_ptr().cast());
    // SAFETY: see the function's contract; all loads may be unaligned.
    unsafe {
        let mut acc: [[__m512; 2]; ROWS] = std::array::from_fn(|i| {
            [_mm512_loadu_ps(sums.add(i * COLS)), _mm512_loadu_ps(sums.add(i * COLS + 16))]
        });
        for pair in 0..depth {
            let w0: __m512bh = std::mem::transmute(_mm512_loadu_si512(packed.add(pair * COLS).cast()));
            let w1: __m512bh = std::mem::transmute(_mm512_loadu_si512(packed.add(pair * COLS + 16).cast()));
            for i in 0..ROWS {
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(rows[i].add(pair).read_unaligned()));
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, w0);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, w1);
            }
        }
        for (i, [low, high]) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(sums.add(i * COLS), low);
            _mm512_storeu_ps(sums.add(i * COLS + 16), high);
        }
    }
}
