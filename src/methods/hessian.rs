//! The order in which GPTQ visits columns, and the damping that its Hessian needs.

use crate::backend::Solver;
use crate::error::Result;
use crate::nvfp4::BLOCK;

/// How often a failed factor is tried again with twice the damping.
const ATTEMPTS: u32 = 10;

/// Factors `h` `[n, n]`, damped by `damping` times the mean of its diagonal; where a pivot is not positive, by twice
/// that, up to ten times. Returns the damping that did. None where none does: the statistics hold NaN, infinity or
/// nothing but zeros.
///
/// # Errors
/// What the device returns.
pub fn factor<S: Solver>(
    solver: &S,
    h: &S::Matrix,
    diagonal: &[f32],
    damping: f32,
) -> Result<Option<(S::Factor, f32)>> {
    let order = order(diagonal);
    let mean = diagonal.iter().map(|&h| h as f64).sum::<f64>() / diagonal.len() as f64;
    if !(mean > 0.0 && mean.is_finite()) {
        return Ok(None);
    }
    for attempt in 0..ATTEMPTS {
        let damping = damping * 2f32.powi(attempt as i32);
        if let Some(factor) = solver.factor(h, &order, (damping as f64 * mean) as f32)? {
            return Ok(Some((factor, damping)));
        }
    }
    Ok(None)
}

/// The columns from the least to the most important block, and inside a block likewise, so that walking from
/// the end meets the most important first. Ties by index.
pub fn order(diagonal: &[f32]) -> Vec<u32> {
    let mut blocks: Vec<usize> = (0..diagonal.len() / BLOCK).collect();
    let total = |block: usize| diagonal[block * BLOCK..(block + 1) * BLOCK].iter().sum::<f32>();
    blocks.sort_by(|&a, &b| total(b).total_cmp(&total(a)));
    let columns = |block: usize| {
        let mut columns: Vec<usize> = (block * BLOCK..(block + 1) * BLOCK).collect();
        columns.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        columns
    };
    let mut order: Vec<u32> = blocks.into_iter().flat_map(columns).map(|column| column as u32).collect();
    order.reverse();
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Compute;
    use crate::backend::cpu::Cpu;

    fn factored(h: Vec<f32>, n: usize) -> Option<f32> {
        let cpu = Cpu::new(Compute::F32, 2).unwrap();
        let h = cpu.matrix(h, n).unwrap();
        let diagonal = cpu.diagonal(&h).unwrap();
        factor(&cpu, &h, &diagonal, 0.05).unwrap().map(|(_, damping)| damping)
    }

    #[test]
    fn a_failed_pivot_is_tried_again_with_more_damping() {
        let n = 32;
        let mut h = vec![0.0; n * n];
        (0..n).for_each(|i| h[i * n + i] = 1.0);
        (h[1], h[n]) = (1.2, 1.2);
        let damping = factored(h, n).unwrap();
        assert!((damping - 0.4).abs() < 1e-6, "{damping}");
    }

    #[test]
    fn nothing_helps_where_there_is_nothing_to_factor() {
        assert_eq!(factored(vec![0.0; 64 * 64], 64), None);
        assert_eq!(factored(vec![f32::NAN; 64 * 64], 64), None);
    }

    #[test]
    fn blocks_stay_whole_and_the_most_important_comes_last() {
        let diagonal: Vec<f32> = (0..48).map(|i| [3.0, 9.0, 1.0][i / 16] + (i % 16) as f32 / 100.0).collect();
        let order = order(&diagonal);
        let blocks: Vec<u32> = order.iter().map(|column| column / 16).collect();
        assert_eq!(blocks, [[2; 16], [0; 16], [1; 16]].concat());
        assert_eq!((order[47], order[32]), (31, 16));
    }
}
