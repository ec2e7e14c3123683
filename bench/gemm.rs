//! Matrix products of SmolLM2's shapes on all cores, in BF16 and in F32, in FLOP/s.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use distq::backend::cpu::Cpu;
use distq::backend::{Backend, Compute};

const TOKENS: usize = 1024;

fn products(c: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut group = c.benchmark_group("x·wᵀ");
    group.sample_size(20);
    for (n, k) in [(576, 576), (1536, 576), (576, 1536), (2048, 2048)] {
        group.throughput(Throughput::Elements((2 * TOKENS * n * k) as u64));
        for compute in [Compute::Bf16, Compute::F32] {
            let cpu = Cpu::new(compute, threads).unwrap();
            let values = |n: usize| (0..n).map(|i| (i % 13) as f32 / 7.0 - 0.9).collect::<Vec<f32>>();
            let (x, w) =
                (cpu.constant(&values(TOKENS * k), k).unwrap(), cpu.constant(&values(n * k), k).unwrap());
            let mut out = cpu.activation(TOKENS, n).unwrap();
            let id =
                BenchmarkId::new(format!("{compute:?} by {}", cpu.kernel()), format!("{TOKENS}x{n}x{k}"));
            group.bench_function(id, |b| b.iter(|| cpu.linear(&x, &w, None, &mut out).unwrap()));
        }
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
