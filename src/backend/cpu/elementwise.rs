//! Loops over elements, in f32 with the rounding of the activation's type where the reference
//! implementation rounds.

use super::tensor::Scalar;
use crate::backend::{Activation, NormKind, Rotation};
use crate::simd::wide;

/// The parts of eˣ = (1 + part) · 2ⁿ, without branches so that loops vectorize: x = n·ln 2 + r, then a polynomial in r
/// (the classic Cephes coefficients). Saturates outside of ±87.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0; // rounds: 1.5 · 2^23
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    (p * r * r + r, f32::from_bits(((n as i32 + 127) as u32) << 23))
}

/// eˣ to about 2 ulp.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let (part, power) = exp_parts(x);
    (part + 1.0) * power
}

/// eˣ - 1 to a few ulp, also near 0.
#[inline(always)]
fn expm1(x: f32) -> f32 {
    let (part, power) = exp_parts(x);
    part * power + (power - 1.0)
}

/// tanh to a few ulp.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let e = expm1(-2.0 * x.abs());
    (-e / (e + 2.0)).copysign(x)
}

/// The complement of the error function, for `x >= 0`, to 1.2e-7 of its value (Numerical Recipes, `erfcc`).
#[inline(always)]
fn erfc(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.5 * x);
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    t * exp(p - x * x)
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

/// Sum of `term` over the elements, in 16 lanes.
#[inline(always)]
fn sum_of<T: Scalar>(x: &[T], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += term(x.get());
        }
    }
    lanes.iter().sum::<f32>() + lane_sum(tail.iter().map(|x| term(x.get())))
}

wide! {
    /// One row, or one head, of [`crate::backend::Backend::norm`]: `gamma` and `bias` as they meet the values.
    pub fn norm<T: Scalar>(x: &[T], kind: &NormKind, gamma: &[f32], bias: Option<&[f32]>, out: &mut [T]) => norm_body
}

#[inline(always)]
fn norm_body<T: Scalar>(x: &[T], kind: &NormKind, gamma: &[f32], bias: Option<&[f32]>, out: &mut [T]) {
    let n = x.len() as f32;
    let mean = if kind.centers { sum_of(x, |x| x) / n } else { 0.0 };
    let squares = sum_of(x, |x| (x - mean) * (x - mean));
    let scale = 1.0 / (squares / n + kind.eps).sqrt();
    let elements = out.iter_mut().zip(x).zip(gamma);
    match (bias, kind.rounds_first) {
        (None, true) => elements
            .for_each(|((out, x), gamma)| *out = T::round(T::round((x.get() - mean) * scale).get() * gamma)),
        (None, false) => {
            elements.for_each(|((out, x), gamma)| *out = T::round((x.get() - mean) * scale * gamma));
        }
        (Some(bias), rounds_first) => {
            for (((out, x), gamma), bias) in elements.zip(bias) {
                let normalized = (x.get() - mean) * scale;
                let normalized = if rounds_first { T::round(normalized).get() } else { normalized };
                *out = T::round(normalized * gamma + bias);
            }
        }
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `1 + tanh(u)` is `2 / (1 + e^-2u)`, which keeps its digits where it is small.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
    x / (1.0 + exp(-2.0 * u))
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    let beyond = 0.5 * erfc(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    if x < 0.0 { x * beyond } else { x * (1.0 - beyond) }
}

#[inline(always)]
fn relu2(x: f32) -> f32 {
    let x = if x < 0.0 { 0.0 } else { x };
    x * x
}

/// -1e-6 as BF16 holds it: so the reference implementation does, whatever it computes in.
const XIELU_EPS: f32 = f32::from_bits(0xB586_0000);

#[inline(always)]
fn xielu<T: Scalar>(x: f32, alpha_p: f32, alpha_n: f32) -> f32 {
    let round = |x: f32| T::round(x).get();
    let half = round(0.5 * x);
    let above = round(round(round(alpha_p * x) * x) + half);
    let least = if x > XIELU_EPS { XIELU_EPS } else { x };
    let below = round(round(round(round(expm1(least)) - x) * alpha_n) + half);
    if x > 0.0 { above } else { below }
}

#[inline(always)]
fn gated<T: Scalar>(gate: &mut [T], up: &[T], activated: impl Fn(f32) -> f32) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let activated = T::round(activated(gate.get()));
        *gate = T::round(activated.get() * up.get());
    }
}

wide! {
    /// `gate = round(activation(gate)) · up`.
    pub fn activate_mul<T: Scalar>(gate: &mut [T], up: &[T], activation: Activation) => activate_mul_body
}

#[inline(always)]
fn activate_mul_body<T: Scalar>(gate: &mut [T], up: &[T], activation: Activation) {
    match activation {
        Activation::Silu => gated(gate, up, silu),
        Activation::GeluTanh => gated(gate, up, gelu_tanh),
        Activation::Gelu => gated(gate, up, gelu),
        Activation::Relu2 => gated(gate, up, relu2),
        Activation::Xielu { alpha_p, alpha_n } => gated(gate, up, |x| xielu::<T>(x, alpha_p, alpha_n)),
    }
}

#[inline(always)]
fn each<T: Scalar>(x: &mut [T], f: impl Fn(f32) -> f32) {
    x.iter_mut().for_each(|x| *x = T::round(f(x.get())));
}

wide! {
    /// `x = activation(x)`.
    pub fn activate<T: Scalar>(x: &mut [T], activation: Activation) => activate_body
}

#[inline(always)]
fn activate_body<T: Scalar>(x: &mut [T], activation: Activation) {
    match activation {
        Activation::Silu => each(x, silu),
        Activation::GeluTanh => each(x, gelu_tanh),
        Activation::Gelu => each(x, gelu),
        Activation::Relu2 => each(x, relu2),
        Activation::Xielu { alpha_p, alpha_n } => each(x, |x| xielu::<T>(x, alpha_p, alpha_n)),
    }
}

wide! {
    /// `x = x · round(sigmoid(gate))`.
    pub fn gate_by_sigmoid<T: Scalar>(x: &mut [T], gate: &[T]) => gate_by_sigmoid_body
}

#[inline(always)]
fn gate_by_sigmoid_body<T: Scalar>(x: &mut [T], gate: &[T]) {
    for (x, gate) in x.iter_mut().zip(gate) {
        let open = T::round(1.0 / (1.0 + exp(-gate.get())));
        *x = T::round(x.get() * open.get());
    }
}

wide! {
    /// `x = x · factor`.
    pub fn multiply<T: Scalar>(x: &mut [T], factor: f32) => multiply_body
}

#[inline(always)]
fn multiply_body<T: Scalar>(x: &mut [T], factor: f32) {
    each(x, |x| x * factor);
}

wide! {
    /// `x = cap · tanh(x / cap)`, rounded at each step.
    pub fn softcap<T: Scalar>(x: &mut [T], cap: f32) => softcap_body
}

#[inline(always)]
fn softcap_body<T: Scalar>(x: &mut [T], cap: f32) {
    let round = |x: f32| T::round(x).get();
    each(x, |x| round(tanh(round(x / cap))) * cap);
}

wide! {
    /// Scores as a softcap leaves them: `cap · tanh(scale · score / cap)`.
    pub fn cap_scores(scores: &mut [f32], scale: f32, cap: f32) => cap_scores_body
}

#[inline(always)]
fn cap_scores_body(scores: &mut [f32], scale: f32, cap: f32) {
    scores.iter_mut().for_each(|score| *score = cap * tanh(*score * scale / cap));
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

/// A pair after its turn: rounded once, or each product and then the sum.
#[inline(always)]
fn turned<T: Scalar, const ONCE: bool>(x: f32, y: f32, c: f32, s: f32) -> (T, T) {
    let product = |x: f32| if ONCE { x } else { T::round(x).get() };
    (T::round(product(x * c) - product(y * s)), T::round(product(y * c) + product(x * s)))
}

wide! {
    /// Turns the first `2 · cos.len()` features of one head.
    pub fn rotate<T: Scalar>(head: &mut [T], cos: &[f32], sin: &[f32], rotation: &Rotation) => rotate_body
}

#[inline(always)]
fn rotate_body<T: Scalar>(head: &mut [T], cos: &[f32], sin: &[f32], rotation: &Rotation) {
    let head = &mut head[..2 * cos.len()];
    match (rotation.interleaved, rotation.rounds_once) {
        (false, false) => rotate_halves::<T, false>(head, cos, sin),
        (false, true) => rotate_halves::<T, true>(head, cos, sin),
        (true, false) => rotate_pairs::<T, false>(head, cos, sin),
        (true, true) => rotate_pairs::<T, true>(head, cos, sin),
    }
}

#[inline(always)]
fn rotate_halves<T: Scalar, const ONCE: bool>(head: &mut [T], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = turned::<T, ONCE>(a.get(), b.get(), c, s);
    }
}

#[inline(always)]
fn rotate_pairs<T: Scalar, const ONCE: bool>(head: &mut [T], cos: &[f32], sin: &[f32]) {
    for ((pair, &c), &s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
        (pair[0], pair[1]) = turned::<T, ONCE>(pair[0].get(), pair[1].get(), c, s);
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
    /// activation's type. Returns their f32 sum (of the unrounded values, as the reference does) and `max`.
    pub fn softmax<T: Scalar>(scores: &[f32], scale: f32, out: &mut [T]) -> (f32, f32) => softmax_body
}

#[inline(always)]
fn softmax_body<T: Scalar>(scores: &[f32], scale: f32, out: &mut [T]) -> (f32, f32) {
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
    (lanes.iter().sum(), max)
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
        let xielu = Activation::Xielu { alpha_p: 0.8, alpha_n: 1.1 };
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu2, xielu]
        {
            activate_mul(&mut here, &x, activation);
            activate_mul_body(&mut there, &x, activation);
            assert_eq!(here, there, "{activation:?}");
            activate(&mut here, activation);
            activate_body(&mut there, activation);
            assert_eq!(here, there, "{activation:?}");
        }
        softcap(&mut here, 2.0);
        softcap_body(&mut there, 2.0);
        assert_eq!(here, there);
        let gamma: Vec<f32> = x.iter().map(|x| x.get()).collect();
        for (centers, bias) in [(false, None), (true, None), (true, Some(&gamma[..]))] {
            let kind = NormKind { centers, ..NormKind::llama(1e-5) };
            norm(&x, &kind, &gamma, bias, &mut here);
            norm_body(&x, &kind, &gamma, bias, &mut there);
            assert_eq!(here, there);
        }
        let scores: Vec<f32> = x.iter().map(|x| x.get()).collect();
        assert_eq!(softmax(&scores, 0.5, &mut here), softmax_body(&scores, 0.5, &mut there));
        assert_eq!(here, there);
    }

    /// The largest error of `f` over `from..to`, relative to the value in f64.
    fn error(from: f32, to: f32, f: fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let points = (0..20_000).map(|i| from + (to - from) * i as f32 / 20_000.0);
        let errors = points.map(|x| {
            let (got, exact) = (f(x) as f64, exact(x as f64));
            if got == exact { 0.0 } else { ((got - exact) / exact).abs() }
        });
        errors.fold(0.0, f64::max)
    }

    #[test]
    fn functions_are_as_exact_as_f32_allows() {
        for (from, to) in [(-80.0, 80.0), (-0.5, 0.5), (-1e-6, 1e-6)] {
            assert!(error(from, to, expm1, f64::exp_m1) < 4e-7, "expm1 in {from}..{to}");
            assert!(error(from, to, tanh, f64::tanh) < 4e-7, "tanh in {from}..{to}");
        }
        assert_eq!((tanh(1e9), tanh(-1e9), tanh(f32::INFINITY)), (1.0, -1.0, 1.0));
        assert!(tanh(f32::NAN).is_nan() && expm1(f32::NAN).is_nan() && erfc(f32::NAN).is_nan());
        // To 16 digits (Abramowitz and Stegun, table 7.1, and its complements).
        for (x, exact) in [
            (0.0, 1.0),
            (0.5, 0.479_500_122_186_953_5),
            (1.0, 0.157_299_207_050_285_13),
            (2.0, 0.004_677_734_981_047_266),
            (5.0, 1.537_459_794_428_035e-12),
        ] {
            assert!((erfc(x) as f64 / exact - 1.0).abs() < 1e-6, "erfc({x}) = {}", erfc(x));
        }
    }
}
