"""Whether `distq eval` says what stock Transformers says: the same checkpoints, windows and cores.

    python bench/agreement.py [--windows 20]

In BF16 each rounding before an input quantizer can move a code, so Transformers is first compared with itself: two
attention implementations, one thread and all. In F32 there is nothing to hide behind. Fails where a perplexity in F32
differs by more than 0.5 %, or where distq takes longer. Writes bench/results/agreement.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, SMOLLM2, VERSIONS, calibration, machine, peers_python

SCRIPTS, OUT, TEXT = ROOT / "bench/peers", CACHE / "agreement", CACHE / "text/wiki_eval.txt"
# What Transformers changes when nothing of the model changes: attention, threads.
SPREAD = [("sdpa", None), ("eager", None), ("sdpa", 1)]


def run(command: list) -> str:
    print(*(Path(part).name for part in map(str, command)), flush=True)
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def checkpoints() -> list[tuple[str, Path, Path]]:
    """Name, what distq reads, what Transformers reads."""
    OUT.mkdir(parents=True, exist_ok=True)
    calib, peers = calibration(0), CACHE / "peers-output/0"
    made = []
    for name, options in {
        "max": ["--method", "max"],
        "best": [],
        "best, weights only": ["--scheme", "nvfp4a16"],
        "best, ModelOpt layout": ["--layout", "modelopt"],
    }.items():
        out = OUT / name.replace(", ", "-").replace(" ", "-")
        run([DISTQ, "-q", "quantize", SMOLLM2, out, "--overwrite", "--calib", calib, "--calib-min-tokens", 1, *options])
        made.append((name, out, out))
    name, modelopt, _ = made.pop()
    view = OUT / "modelopt-view"
    run([peers_python(), SCRIPTS / "modelopt_view.py", modelopt, view])
    gptq = peers / "llmcompressor-gptq"
    if not (gptq / "config.json").exists():
        run([peers_python(), SCRIPTS / "run_llmcompressor.py", SMOLLM2, calib, gptq, "gptq"])
    return [("BF16 source", SMOLLM2, SMOLLM2), *made, (name, modelopt, view), ("llm-compressor's GPTQ", gptq, gptq)]


def transformers(path: Path, windows: int, *options: object) -> dict:
    printed = run([peers_python(), SCRIPTS / "evaluate.py", TEXT, windows, path, *options])
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def ours(path: Path, windows: int, compute: str) -> dict:
    command = [DISTQ, "eval", path, "--text", TEXT, "--windows", windows, "--compute", compute, "--json"]
    return json.loads(run(command))["models"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=20)
    windows = parser.parse_args().windows
    all_checkpoints = checkpoints()
    exact, rounded = [], []
    for name, mine, theirs in all_checkpoints:
        a, b = ours(mine, windows, "f32"), transformers(theirs, windows, "--dtype", "float32")
        exact.append((name, a, b, a["perplexity"] / b["perplexity"] - 1))
    for name, path, _ in all_checkpoints[1:3]:
        runs = [ours(path, windows, "bf16")]
        for attention, threads in SPREAD:
            options = ["--attention", attention, *(["--threads", threads] if threads else [])]
            runs.append(transformers(path, windows, *options))
        rounded.append((name, runs))

    lines = [
        "# distq eval beside stock Transformers", "",
        f"SmolLM2-135M-Instruct in NVFP4, W4A4 unless said, perplexity on {exact[0][1]['tokens']} held-out tokens in windows of",
        f"512, the same for both; {machine()}. Environment: {', '.join(VERSIONS)}. Made by `bench/agreement.py`.", "",
        "Computed in F32, compressed-tensors told to dequantize weights without rounding them to BF16 (bench/peers/evaluate.py).",
        "Seconds are from loading to the last score.", "",
        "| checkpoint | distq eval | Transformers | difference | seconds, distq | seconds, Transformers |",
        "|---|---|---|---|---|---|",
    ]
    for name, a, b, difference in exact:
        scores = f"{a['perplexity']:.4f} | {b['perplexity']:.4f} | {100 * difference:+.3f} %"
        lines.append(f"| {name} | {scores} | {a['seconds']:.1f} | {b['seconds']:.1f} |")
    heads = " | ".join(f"Transformers, {attention}{', one thread' if threads else ''}" for attention, threads in SPREAD)
    lines += [
        "", "Computed in BF16, as engines do. Transformers differs from itself by as much as distq from it:", "",
        f"| checkpoint | distq eval | {heads} | its own spread |", "|---" * (len(SPREAD) + 3) + "|",
    ]
    for name, (a, *theirs) in rounded:
        found = [b["perplexity"] for b in theirs]
        scores = " | ".join(f"{score:.3f}" for score in [a["perplexity"], *found])
        lines.append(f"| {name} | {scores} | {100 * (max(found) / min(found) - 1):.2f} % |")
    seconds = [f"{a['seconds']:.1f} s against {theirs[0]['seconds']:.1f} s for {name}" for name, (a, *theirs) in rounded]
    lines += ["", f"Time in BF16, distq against Transformers with sdpa: {'; '.join(seconds)}.", ""]
    table = "\n".join(lines)
    (ROOT / "bench/results/agreement.md").write_text(table)
    print(table)
    if worst := [name for name, _, _, difference in exact if abs(difference) > 0.005]:
        raise SystemExit(f"more than 0.5 % apart in F32: {', '.join(worst)}")
    if slower := [name for name, a, b, _ in exact if a["seconds"] > b["seconds"]]:
        raise SystemExit(f"distq eval took longer than Transformers: {', '.join(slower)}")


if __name__ == "__main__":
    main()
