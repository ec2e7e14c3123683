"""A third party's word: stock Transformers loads distq's output, and how good it is beside the peers' own.

    python bench/third_party.py [--windows 40]

SmolLM2 quantized by distq, nvidia-modelopt and llm-compressor with the same 16 x 512 calibration tokens;
perplexity (W4A4, BF16) on text that calibrated none of them. One rounding in one input scale moves a
perplexity by a few tenths of a percent, so there are several calibration sets. Fails where Transformers misses
or does not expect a tensor, or where distq's `max` is more than 1 % worse than the better peer on their mean, or its
`best` worse at all. Writes bench/results/third_party.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, SMOLLM2, VERSIONS, calibration, machine, peer, peers_python, view

SCRIPTS = ROOT / "bench/peers"


def make_all(number: int) -> dict[str, Path]:
    """Every program's output for calibration set `number`."""
    calib, outputs = calibration(number), CACHE / f"peers-output/{number}"
    outputs.mkdir(parents=True, exist_ok=True)
    for method in ("best", "max"):
        command = [DISTQ, "quantize", SMOLLM2, outputs / f"distq-{method}", "--method", method, "--calib", calib]
        subprocess.run([*command, "--calib-min-tokens", "1", "--overwrite", "--quiet"], check=True)
    return {
        "distq, `best` (its default)": outputs / "distq-best",
        "distq, `max`": outputs / "distq-max",
        "nvidia-modelopt 0.47.0": view(peer("modelopt", number)),
        "llm-compressor 0.14.0.1": peer("llmcompressor", number),
    }


def evaluate(python: str, windows: int, checkpoints: list[Path]) -> list[dict]:
    """Perplexities, remembered: evaluating is the slow part. distq's own are always measured."""
    command = [python, SCRIPTS / "evaluate.py", CACHE / "text/wiki_eval.txt", windows, "--complete"]
    results = []
    for path in checkpoints:
        known = CACHE / "evaluations" / f"{path.parent.name}-{path.name}-{windows}.json"
        known.parent.mkdir(exist_ok=True)
        remembered = known.exists() and "distq" not in path.name
        if not remembered:
            printed = subprocess.run([str(p) for p in [*command, path]], check=True, stdout=subprocess.PIPE, text=True)
            known.write_text(next(line for line in printed.stdout.splitlines() if line.startswith("{")))
        results.append(json.loads(known.read_text()))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--sets", type=int, default=2, help="calibration sets; the verdict is on the mean")
    args = parser.parse_args()
    python = peers_python()
    source = evaluate(python, args.windows, [SMOLLM2])[0]
    made_by_set = [make_all(number) for number in range(args.sets)]
    by_set = [evaluate(python, args.windows, list(made.values())) for made in made_by_set]

    names = list(made_by_set[0])
    mean = [statistics.geometric_mean(results[i]["perplexity"] for results in by_set) for i in range(len(names))]
    problems = [next((r[i]["problems"] for r in by_set if r[i]["problems"]), {}) for i in range(len(names))]
    baseline = f"{source['perplexity']:.3f}"
    heads = " | ".join(f"set {number}" for number in range(args.sets))
    lines = [
        "# distq beside its peers in stock Transformers", "",
        "Perplexity of SmolLM2-135M-Instruct (dequantized from Q4_1, see tests/fixtures/smollm2.py) in NVFP4, W4A4,",
        f"on {source['tokens']} held-out tokens in windows of 512, BF16, {machine()}. Each calibration set is 16 x 512",
        f"tokens, the same for every program. nvidia-modelopt's output is read under compressed-tensors names.",
        f"Environment: {', '.join(VERSIONS)}. Made by `make third-party`.", "",
        f"| checkpoint | {heads} | mean | over the source | missing or unexpected tensors |",
        "|---" * (args.sets + 4) + "|",
        f"| BF16 source | {' | '.join([baseline] * (args.sets + 1))} | | none |",
    ]
    for i, name in enumerate(names):
        each = " | ".join(f"{results[i]['perplexity']:.3f}" for results in by_set)
        over = 100 * (mean[i] / source["perplexity"] - 1)
        lines.append(f"| {name} | {each} | {mean[i]:.3f} | {over:+.1f} % | {problems[i] or 'none'} |")
    best, plain = (found / min(mean[2:]) - 1 for found in mean[:2])
    lines += ["", f"Against the better peer, on the mean of {args.sets} sets: `best` {100 * best:+.2f} %, `max` {100 * plain:+.2f} %.", ""]
    lines += [f"distq's checkpoint completes: {by_set[0][0]['completion'].strip()!r}", ""]
    table = "\n".join(lines)
    (ROOT / "bench/results/third_party.md").write_text(table)
    print(table)
    if any(problems[:2]):
        raise SystemExit("Transformers missed or did not expect tensors")
    if best > 0 or plain > 0.01:
        raise SystemExit("distq is worse than the better peer")


if __name__ == "__main__":
    main()
