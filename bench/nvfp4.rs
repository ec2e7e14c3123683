//! Throughput of the number format on one core, in weights a second.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use distq::nvfp4::{self, Distance, GlobalScale};
use half::bf16;

fn weights(n: usize) -> Vec<bf16> {
    (0..n as u32)
        .map(|i| bf16::from_f32((i.wrapping_mul(2654435761) as f32 / u32::MAX as f32 - 0.5) * 0.1))
        .collect()
}

fn format(c: &mut Criterion) {
    let n = 1 << 20;
    let w = weights(n);
    let global = GlobalScale::from_amax(nvfp4::amax(&w));
    let (mut codes, mut scales, mut back) = (vec![0; n / 2], vec![0; n / 16], vec![0.0; n]);
    nvfp4::quantize(&w, global, &mut codes, &mut scales);
    let wide: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();

    let mut group = c.benchmark_group("nvfp4");
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function("amax bf16", |b| b.iter(|| nvfp4::amax(&w)));
    group.bench_function("quantize bf16", |b| {
        let (mut codes, mut scales) = (codes.clone(), scales.clone());
        b.iter(|| nvfp4::quantize(&w, global, &mut codes, &mut scales))
    });
    group.bench_function("quantize f32", |b| {
        let (mut codes, mut scales) = (codes.clone(), scales.clone());
        b.iter(|| nvfp4::quantize(&wide, global, &mut codes, &mut scales))
    });
    group.bench_function("quantize searched", |b| {
        let (mut codes, mut scales, importance) = (codes.clone(), scales.clone(), vec![1.0; 1 << 10]);
        b.iter(|| nvfp4::quantize_searched(&wide, &importance, global, &mut codes, &mut scales))
    });
    group.bench_function("dequantize", |b| b.iter(|| nvfp4::dequantize(&codes, &scales, global, &mut back)));
    group.bench_function("distance", |b| b.iter(|| Distance::between(&wide, &codes, &scales, global)));
    group.finish();
}

criterion_group!(benches, format);
criterion_main!(benches);
