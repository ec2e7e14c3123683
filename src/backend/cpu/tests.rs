//! The operations against their definitions.

use super::*;
use crate::backend::Heads;

#[test]
fn nan_sticks_to_an_observed_maximum() {
    let cpu = Cpu::new(Compute::F32, 2).unwrap();
    let mut amax = cpu.amax(2).unwrap();
    for values in [[1.0, -3.0], [f32::NAN, 0.0], [5.0, 5.0]] {
        cpu.observe(&Tensor::from_f32(Compute::F32, &values, 2), &mut amax, 1).unwrap();
    }
    assert_eq!(amax[0], 0.0);
    assert!(amax[1].is_nan());
}

#[test]
fn chunked_maxima_keep_nan_wherever_it_is() {
    let cpu = Cpu::new(Compute::F32, 2).unwrap();
    for at in [0, CHUNK, 3 * CHUNK - 1] {
        let mut values = vec![1.0; 3 * CHUNK];
        values[at] = f32::NAN;
        assert!(cpu.amax_as(&values).is_nan());
        values[at] = -7.0;
        assert_eq!(cpu.amax_as(&values), 7.0);
    }
}

#[test]
fn quantizing_in_parallel_gives_the_bytes_of_one_thread() {
    let cpu = Cpu::new(Compute::Bf16, 2).unwrap();
    let values: Vec<f32> = (0..3 * CHUNK + 64).map(|i| ((i * 37 % 1001) as f32 - 500.0) / 333.0).collect();
    let w = Tensor::from_f32(Compute::Bf16, &values, values.len());
    let global = GlobalScale::from_amax(cpu.weight_amax(&w).unwrap());
    let mut here = (vec![0; values.len() / 2], vec![0; values.len() / 16]);
    let mut there = here.clone();
    cpu.quantize(&w, global, &mut here.0, &mut here.1).unwrap();
    nvfp4::quantize(bf16::of(&w), global, &mut there.0, &mut there.1);
    assert_eq!(here, there);
}

#[test]
fn a_linear_adds_its_bias_before_rounding() {
    let cpu = Cpu::new(Compute::Bf16, 1).unwrap();
    let x = Tensor::from_f32(Compute::Bf16, &[1.0, 2.0], 2);
    let w = Tensor::from_f32(Compute::Bf16, &[256.0, 0.5, 1.0, 1.0], 2);
    let bias = Tensor::from_f32(Compute::Bf16, &[1.0, -3.0], 2);
    let mut out = Tensor::zeros(Compute::Bf16, 1, 2);
    cpu.linear(&x, &w, Some(&bias), &mut out).unwrap();
    assert_eq!(bf16::of(&out).iter().map(|x| x.get()).collect::<Vec<_>>(), [258.0, 0.0]);
}

/// Rounds as activations are stored.
type Rounding = fn(f64) -> f64;

/// Each compute dtype with its rounding, and what a result may be off, relative to its value: a last bit, since f32
/// arithmetic can fall on the other side of a tie.
const DTYPES: [(Compute, Rounding, f64); 2] =
    [(Compute::Bf16, |x| bf16::from_f64(x).to_f64(), 1.0 / 128.0), (Compute::F32, |x| x as f32 as f64, 4e-6)];

/// Values in ±`range` that both dtypes hold.
fn values(n: usize, seed: f32, range: f32) -> Vec<f32> {
    (0..n).map(|i| bf16::from_f32(((i as f32 + 1.0) * seed).sin() * range).to_f32()).collect()
}

fn matrix(cpu: &Cpu, values: &[f32], cols: usize) -> Tensor {
    Tensor::from_f32(cpu.compute, values, cols)
}

/// Compares a result with what the definition gives in f64. Nearly all values must be equal: that shows roundings at
/// other places than the definition's. A value may be a difference of terms of size `cancelled`.
fn check(what: &str, cpu: &Cpu, got: &Tensor, exact: &[f64], bound: f64, cancelled: f64) {
    let got = cpu.values(got).unwrap();
    assert_eq!(got.len(), exact.len(), "{what}");
    let mut differ = 0;
    for (i, (&got, &exact)) in got.iter().zip(exact).enumerate() {
        let error = (got as f64 - exact).abs();
        assert!(
            error <= bound * exact.abs().max(cancelled).max(1e-6),
            "{what}, {:?}, {i}: {got} {exact}",
            cpu.compute
        );
        differ += usize::from(error > 0.0);
    }
    let few = cpu.compute == Compute::F32 || differ * 50 <= exact.len();
    assert!(few, "{what}: {differ} of {} values are rounded otherwise", exact.len());
}

/// What a norm makes of one piece of a row, by its definition.
fn normalized(x: &[f32], kind: &NormKind, w: &[f32], b: Option<&[f32]>, round: Rounding) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = if kind.centers { x.iter().map(|&x| x as f64).sum::<f64>() / n } else { 0.0 };
    let squares = x.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / n;
    let of = |(i, &x): (usize, &f32)| {
        let value = (x as f64 - mean) / (squares + kind.eps as f64).sqrt();
        let value = if kind.rounds_first { round(value) } else { value };
        let gamma = match kind.gamma {
            Gamma::Weight => w[i] as f64,
            Gamma::OnePlus => 1.0 + w[i] as f64,
            Gamma::OnePlusRounded => round(1.0 + w[i] as f64),
            Gamma::One => 1.0,
        };
        round(value * gamma + b.map_or(0.0, |b| b[i] as f64))
    };
    x.iter().enumerate().map(of).collect()
}

fn kinds() -> Vec<NormKind> {
    let mut kinds = vec![];
    for gamma in [Gamma::Weight, Gamma::OnePlus, Gamma::OnePlusRounded, Gamma::One] {
        for (centers, rounds_first) in [(false, false), (false, true), (true, false), (true, true)] {
            kinds.push(NormKind { centers, gamma, rounds_first, eps: 1e-5 });
        }
    }
    kinds
}

#[test]
fn norms() {
    for (compute, round, bound) in DTYPES {
        let cpu = Cpu::new(compute, 2).unwrap();
        for (rows, cols) in [(1, 1), (3, 37), (19, 576)] {
            let (x, w, b) = (values(rows * cols, 0.37, 3.0), values(cols, 1.7, 0.9), values(cols, 2.3, 0.5));
            for kind in kinds() {
                for biased in [false, true] {
                    let weighted = kind.gamma != Gamma::One;
                    // A centered row of one element is 0; of its digits nothing is left to compare.
                    if (biased && !weighted) || (kind.centers && cols == 1) {
                        continue;
                    }
                    let (weight, bias) = (matrix(&cpu, &w, cols), matrix(&cpu, &b, cols));
                    let mut out = matrix(&cpu, &vec![f32::NAN; rows * cols], cols);
                    let (weight, bias) = (weighted.then_some(&weight), biased.then_some(&bias));
                    cpu.norm(&matrix(&cpu, &x, cols), &kind, weight, bias, &mut out).unwrap();
                    let b = biased.then_some(&b[..]);
                    let exact: Vec<f64> =
                        x.chunks(cols).flat_map(|x| normalized(x, &kind, &w, b, round)).collect();
                    let cancelled = if biased || kind.centers { 3.0 } else { 0.0 };
                    check(&format!("{kind:?}, bias {biased}"), &cpu, &out, &exact, bound, cancelled);
                }
            }
        }
    }
}

#[test]
fn norms_of_heads() {
    for (compute, round, bound) in DTYPES {
        let cpu = Cpu::new(compute, 2).unwrap();
        for (rows, heads, dim) in [(1, 1, 2), (5, 3, 10), (18, 4, 64), (2, 1, 256)] {
            let cols = heads * dim;
            let (x, w) = (values(rows * cols, 0.61, 3.0), values(cols, 1.9, 0.9));
            for kind in kinds() {
                for own in [false, true] {
                    let given = if own { &w[..] } else { &w[..dim] };
                    let weight = matrix(&cpu, given, given.len());
                    let weight = (kind.gamma != Gamma::One).then_some(&weight);
                    let mut out = matrix(&cpu, &x, cols);
                    cpu.norm_heads(&mut out, dim, &kind, weight).unwrap();
                    let head = |(i, x): (usize, &[f32])| {
                        let first = if own { i % heads * dim } else { 0 };
                        normalized(x, &kind, &w[first..first + dim], None, round)
                    };
                    let exact: Vec<f64> = x.chunks(dim).enumerate().flat_map(head).collect();
                    let cancelled = if kind.centers { 3.0 } else { 0.0 };
                    check(&format!("{kind:?} of heads, own {own}"), &cpu, &out, &exact, bound, cancelled);
                }
            }
        }
    }
}

/// A weight of one row a head is one of its own for each head, whatever dtype it is stored in.
#[test]
fn a_norm_takes_the_weights_of_heads_as_a_stored_matrix() {
    let w = values(6, 1.1, 2.0);
    let bytes: Vec<u8> = w.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect();
    let source = SourceTensor::from_bytes("w", safetensors::Dtype::BF16, &[2, 3], &bytes).unwrap();
    for (compute, ..) in DTYPES {
        let cpu = Cpu::new(compute, 1).unwrap();
        let (mut here, mut there) =
            (matrix(&cpu, &values(12, 0.3, 1.0), 6), matrix(&cpu, &values(12, 0.3, 1.0), 6));
        let kind = NormKind { centers: true, ..NormKind::llama(1e-5) };
        cpu.norm_heads(&mut here, 3, &kind, Some(&cpu.load(&source).unwrap())).unwrap();
        cpu.norm_heads(&mut there, 3, &kind, Some(&matrix(&cpu, &w, 6))).unwrap();
        assert_eq!(cpu.values(&here).unwrap(), cpu.values(&there).unwrap());
    }
}

#[test]
fn rotations() {
    for (compute, round, bound) in DTYPES {
        let cpu = Cpu::new(compute, 2).unwrap();
        for (heads, dim, turned) in [(1, 2, 2), (3, 10, 10), (2, 64, 64), (3, 10, 4), (2, 96, 48), (2, 5, 2)]
        {
            let (cols, half) = (heads * dim, turned / 2);
            let x = values(4 * cols, 0.77, 2.0);
            let (cos, sin): (Vec<f32>, Vec<f32>) =
                (0..9 * half).map(|i| ((i as f32 * 0.37).cos(), (i as f32 * 0.37).sin())).unzip();
            let rows = [8, 0, 3, 3];
            for flags in 0..8 {
                let (interleaved, rounds_once, exact_tables) = (flags & 1 > 0, flags & 2 > 0, flags & 4 > 0);
                let table = |x: &[f32]| match exact_tables {
                    true => cpu.exact_constant(x, half).unwrap(),
                    false => cpu.constant(x, half).unwrap(),
                };
                let rotation = Rotation { head_dim: dim, interleaved, rounds_once };
                let mut out = matrix(&cpu, &x, cols);
                cpu.rope(&mut out, &rotation, &table(&cos), &table(&sin), &rows.to_vec()).unwrap();
                let stored = |x: f32| if exact_tables { x as f64 } else { round(x as f64) };
                let product = |x: f64| if rounds_once { x } else { round(x) };
                let mut exact: Vec<f64> = x.iter().map(|&x| x as f64).collect();
                for (i, head) in exact.chunks_mut(dim).enumerate() {
                    for pair in 0..half {
                        let at = rows[i / heads] * half as u32 + pair as u32;
                        let (c, s) = (stored(cos[at as usize]), stored(sin[at as usize]));
                        let (a, b) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
                        let (x, y) = (head[a], head[b]);
                        head[a] = round(product(x * c) - product(y * s));
                        head[b] = round(product(y * c) + product(x * s));
                    }
                }
                check(&format!("{rotation:?}, exact tables {exact_tables}"), &cpu, &out, &exact, bound, 3.0);
            }
        }
    }
}

/// erf by its series: for the values here, exact to 1e-12.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn activated(x: f64, activation: Activation, round: Rounding) -> f64 {
    round(match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::Xielu { alpha_p, .. } if x > 0.0 => round(round(alpha_p as f64 * x) * x) + round(0.5 * x),
        Activation::Xielu { alpha_n, .. } => {
            let least = x.min(bf16::from_f64(-1e-6).to_f64());
            round(round(round(least.exp_m1()) - x) * alpha_n as f64) + round(0.5 * x)
        }
    })
}

#[test]
fn activations() {
    let xielu = Activation::Xielu { alpha_p: 0.8125, alpha_n: 1.3125 };
    for (compute, round, bound) in DTYPES {
        let cpu = Cpu::new(compute, 2).unwrap();
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::Relu2, xielu]
        {
            for (rows, cols) in [(1, 1), (7, 143)] {
                let (x, up) = (values(rows * cols, 0.31, 4.0), values(rows * cols, 1.3, 2.0));
                let mut alone = matrix(&cpu, &x, cols);
                cpu.activate(&mut alone, activation).unwrap();
                let exact: Vec<f64> = x.iter().map(|&x| activated(x as f64, activation, round)).collect();
                // Far below zero, and where xIELU's terms cancel, few digits are left in f32.
                let bound = if compute == Compute::F32 { 20.0 * bound } else { 4.0 * bound };
                check(&format!("{activation:?}"), &cpu, &alone, &exact, bound, 0.0);
                let mut gate = matrix(&cpu, &x, cols);
                cpu.activate_mul(&mut gate, &matrix(&cpu, &up, cols), activation).unwrap();
                let exact: Vec<f64> =
                    exact.iter().zip(&up).map(|(gate, &up)| round(gate * up as f64)).collect();
                check(&format!("{activation:?} times up"), &cpu, &gate, &exact, bound, 0.0);
            }
        }
    }
}

#[test]
fn products_with_gates_factors_and_caps() {
    for (compute, round, bound) in DTYPES {
        let cpu = Cpu::new(compute, 2).unwrap();
        for (rows, cols) in [(1, 1), (5, 143)] {
            let (x, gate) = (values(rows * cols, 0.31, 40.0), values(rows * cols, 1.3, 5.0));
            let of = |f: &dyn Fn(usize, f64) -> f64| -> Vec<f64> {
                x.iter().enumerate().map(|(i, &x)| f(i, x as f64)).collect()
            };
            let mut out = matrix(&cpu, &x, cols);
            cpu.gate_by_sigmoid(&mut out, &matrix(&cpu, &gate, cols)).unwrap();
            let open = |i: usize| round(1.0 / (1.0 + (-gate[i] as f64).exp()));
            check("gate_by_sigmoid", &cpu, &out, &of(&|i, x| round(x * open(i))), bound, 0.0);

            let mut out = matrix(&cpu, &x, cols);
            cpu.multiply(&mut out, 0.19611613).unwrap();
            check("multiply", &cpu, &out, &of(&|_, x| round(x * 0.19611613f32 as f64)), bound, 0.0);

            let factors = [1.0, 1.7, 0.3, 1.05];
            let at: Vec<u32> = [3, 0, 3, 2, 1][..rows].to_vec();
            let mut out = matrix(&cpu, &x, cols);
            cpu.multiply_rows(&mut out, &matrix(&cpu, &factors, 1), &at).unwrap();
            let factor = |i: usize| round(factors[at[i / cols] as usize] as f64);
            check("multiply_rows", &cpu, &out, &of(&|i, x| round(x * factor(i))), bound, 0.0);

            let mut out = matrix(&cpu, &x, cols);
            cpu.softcap(&mut out, 30.0).unwrap();
            check(
                "softcap",
                &cpu,
                &out,
                &of(&|_, x| round(round(round(x / 30.0).tanh()) * 30.0)),
                bound,
                0.0,
            );
        }
    }
}

#[test]
fn columns_are_copied_as_they_are() {
    for (compute, ..) in DTYPES {
        let cpu = Cpu::new(compute, 2).unwrap();
        let x = values(40 * 17, 0.9, 2.0);
        for (first, part) in [(0, 17), (0, 5), (5, 1), (6, 11)] {
            let mut to = matrix(&cpu, &vec![f32::NAN; 40 * part], part);
            cpu.copy_columns(&matrix(&cpu, &x, 17), first, &mut to).unwrap();
            let exact: Vec<f64> =
                x.chunks(17).flat_map(|row| row[first..first + part].iter().map(|&x| x as f64)).collect();
            check("copy_columns", &cpu, &to, &exact, 0.0, 0.0);
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let cpu = Cpu::new(Compute::Bf16, 1).unwrap();
    let some = |rows: usize, cols: usize| matrix(&cpu, &vec![1.0; rows * cols], cols);
    let (x, mut out, llama) = (some(4, 32), some(4, 32), NormKind::llama(1e-5));
    let one = NormKind { gamma: Gamma::One, ..llama };
    assert!(cpu.norm(&x, &llama, Some(&some(1, 16)), None, &mut out).is_err());
    assert!(cpu.norm(&x, &llama, None, None, &mut out).is_err());
    assert!(cpu.norm(&x, &one, Some(&some(1, 32)), None, &mut out).is_err());
    assert!(cpu.norm(&x, &llama, Some(&some(1, 32)), Some(&some(1, 31)), &mut out).is_err());
    assert!(cpu.norm(&x, &one, None, None, &mut some(4, 31)).is_err());
    assert!(cpu.norm_heads(&mut out, 12, &one, None).is_err());
    assert!(cpu.norm_heads(&mut out, 8, &llama, Some(&some(1, 16))).is_err());
    let table = some(3, 8);
    let rope =
        |x: &mut Tensor, dim, rows: Vec<u32>| cpu.rope(x, &Rotation::llama(dim), &table, &table, &rows);
    assert!(rope(&mut out, 16, vec![0, 1, 2, 3]).is_err(), "there is no row 3");
    assert!(rope(&mut out, 16, vec![0, 1, 2]).is_err() && rope(&mut out, 8, vec![0; 4]).is_err());
    assert!(cpu.activate_mul(&mut out, &some(4, 31), Activation::Silu).is_err());
    assert!(cpu.gate_by_sigmoid(&mut out, &some(3, 32)).is_err());
    assert!(cpu.multiply_rows(&mut out, &some(3, 1), &vec![0, 1, 2, 3]).is_err());
    assert!(cpu.multiply_rows(&mut out, &some(3, 2), &vec![0; 4]).is_err());
    assert!(cpu.copy_columns(&x, 17, &mut some(4, 16)).is_err());
    let heads = Heads { heads: 2, kv_heads: 1, dim: 16 };
    let how = AttentionShape { heads, scale: 1.0, window: None, softcap: None };
    let kv = some(4, 16);
    assert!(cpu.attention(&x, &kv, &kv, &vec![0, 5], &how, None, &mut out).is_err());
    assert!(cpu.attention(&x, &kv, &kv, &vec![0, 4], &how, Some(&some(1, 1)), &mut out).is_err());
    assert!(cpu.attention(&x, &kv, &kv, &vec![0, 4], &how, None, &mut out).is_ok());
}
