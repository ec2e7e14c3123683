//! Loops over elements, in f32 with the rounding of the activation's type where the reference
//! implementation rounds.

use super::tensor::Scalar;
use crate::simd::wide;

/// eˣ to about 2 ulp, without branches so that loops vectorize: x = n·ln 2 + r, then a polynomial in r
/// (the classic Cephes coefficients), then n added to the exponent. Saturates outside of ±87.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0; // rounds: 1.5 · 2^23
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// Sum of 16 strided partial sums: an order that vectorizes and is the same everywhere.
#[inline(always)]
fn lane_sum(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut lanes = [0f32; 16];
    for (i, value) in values.enumerate() {
        lanes[i % 16] += value;
    }
    lanes.iter().sum()
}

wide! {
    /// One row of [`crate::backend::Backend::rms_norm`].
    pub fn rms_norm<T: Scalar>(x: &[T], weight: &[T], eps: f32, out: &mut [T]) => rms_norm_body
}

#[inline(always)]
fn rms_norm_body<T: Scalar>(x: &[T], weight: &[T], eps: f32, out: &mut [T]) {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x.get() * x.get();
        }
    }
    let sum = lanes.iter().sum::<f32>() + lane_sum(tail.iter().map(|x| x.get() * x.get()));
    let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = T::round(T::round(x.get() * scale).get() * w.get());
    }
}

wide! {
    /// `gate = round(silu(gate)) · up`.
    pub fn silu_mul<T: Scalar>(gate: &mut [T], up: &[T]) => silu_mul_body
}

#[inline(always)]
fn silu_mul_body<T: Scalar>(gate: &mut [T], up: &[T]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = gate.get();
        let silu = T::round(x / (1.0 + exp(-x)));
        *gate = T::round(silu.get() * up.get());
    }
}

wide! {
    /// `x += y`.
    pub fn add<T: Scalar>(x: &mut [T], y: &[T]) => add_body
}

#[inline(always)]
fn add_body<T: Scalar>(x: &mut [T], y: &[T]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x = T::round(x.get() + y.get());
    }
}

wide! {
    /// Rotates one head: its halves are the real and imaginary parts. Each product is rounded, then the sum.
    pub fn rotate<T: Scalar>(head: &mut [T], cos: &[T], sin: &[T]) => rotate_body
}

#[inline(always)]
fn rotate_body<T: Scalar>(head: &mut [T], cos: &[T], sin: &[T]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (x, y, c, s) = (a.get(), b.get(), c.get(), s.get());
        *a = T::round(T::round(x * c).get() - T::round(y * s).get());
        *b = T::round(T::round(y * c).get() + T::round(x * s).get());
    }
}

wide! {
    /// Rounds finished sums, after adding the bias.
    pub fn finish<T: Scalar>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) => finish_body
}

#[inline(always)]
fn finish_body<T: Scalar>(sums: &[f32], bias: Option<&[T]>, out: &mut [T]) {
    match bias {
        None => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = T::round(sum)),
        Some(bias) => {
            for ((out, &sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                *out = T::round(sum + bias.get());
            }
        }
    }
}

wide! {
    /// Turns a row of scores into unnormalized probabilities `exp(scale · (score − max))`, rounded to the
    /// activation's type, and returns their f32 sum (of the unrounded values, as the reference does).
    pub fn softmax<T: Scalar>(scores: &[f32], scale: f32, out: &mut [T]) -> f32 => softmax_body
}

#[inline(always)]
fn softmax_body<T: Scalar>(scores: &[f32], scale: f32, out: &mut [T]) -> f32 {
    let mut top = [f32::NEG_INFINITY; 16];
    for chunk in scores.chunks(16) {
        for (top, &score) in top.iter_mut().zip(chunk) {
            *top = if score > *top { score } else { *top };
        }
    }
    let max = top.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0f32; 16];
    for (scores, out) in scores.chunks(16).zip(out.chunks_mut(16)) {
        for ((lane, &score), out) in lanes.iter_mut().zip(scores).zip(out) {
            let p = exp((score - max) * scale);
            *lane += p;
            *out = T::round(p);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn exp_is_as_exact_as_f32_allows() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (got, exact) = (exp(x) as f64, (x as f64).exp());
            assert!((got / exact - 1.0).abs() < 3e-7, "exp({x}) = {got}");
            x += 0.0137;
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 1e-37);
    }

    #[test]
    fn wide_and_portable_loops_give_the_same_bits() {
        let x: Vec<bf16> = (0..101).map(|i| bf16::from_f32((i as f32 * 0.37).sin() * 3.0)).collect();
        let (mut here, mut there) = (x.clone(), x.clone());
        silu_mul(&mut here, &x);
        silu_mul_body(&mut there, &x);
        assert_eq!(here, there);
        rms_norm(&x, &x, 1e-5, &mut here);
        rms_norm_body(&x, &x, 1e-5, &mut there);
        assert_eq!(here, there);
        let scores: Vec<f32> = x.iter().map(|x| x.get()).collect();
        assert_eq!(softmax(&scores, 0.5, &mut here), softmax_body(&scores, 0.5, &mut there));
        assert_eq!(here, there);
    }

    #[test]
    fn norms_and_activations_follow_their_definitions() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 - 18.0) / 7.0).collect();
        let mut out = vec![f32::NAN; 37];
        rms_norm(&x, &[2.0; 37], 1e-6, &mut out);
        let mean = x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / 37.0;
        for (x, out) in x.iter().zip(&out) {
            assert!((*out as f64 - 2.0 * *x as f64 / (mean + 1e-6).sqrt()).abs() < 1e-5);
        }
        let mut gate = x.clone();
        silu_mul(&mut gate, &[3.0; 37]);
        for (x, got) in x.iter().zip(&gate) {
            assert!((*got as f64 - 3.0 * *x as f64 / (1.0 + (-*x as f64).exp())).abs() < 1e-5);
        }
    }
}
