"""Whether `distq eval` says what stock Transformers says: the same checkpoints, windows and cores.

    python bench/agreement.py [--windows 40] [--device cuda]

Without input quantizers, both compute the same function and agree to all digits that F32 has. An input quantizer is a
step: the last bit of a sum moves a code here and there, and thirty layers later the two are as far apart as two
roundings of one model. So W4A4 perplexities agree the better the more text there is, and Transformers and
distq are compared with themselves as well. Fails where perplexities without input quantizers differ by more than
0.05 %, W4A4 ones by more than 0.5 % in the mean over checkpoints, or where distq takes more time. Writes
bench/results/agreement.md and keeps the text below its tables.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, SMOLLM2, VERSIONS, calibration, machine, peers_python

SCRIPTS, OUT, TEXT = ROOT / "bench/peers", CACHE / "agreement", CACHE / "text/wiki_eval.txt"
# What Transformers changes when nothing of the model changes.
SPREAD = [("float32", "eager"), ("bfloat16", "sdpa"), ("bfloat16", "eager")]


def run(command: list) -> str:
    print(*(Path(part).name for part in map(str, command)), flush=True)
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def checkpoints() -> list[tuple[str, Path, Path]]:
    """Name, what distq reads, what Transformers reads."""
    OUT.mkdir(parents=True, exist_ok=True)
    calib = calibration(0)

    def quantize(name: str, *options: object) -> Path:
        run([DISTQ, "-q", "quantize", SMOLLM2, OUT / name, "--overwrite", "--calib", calib, "--calib-min-tokens", 1, *options])
        return OUT / name

    best, weights = quantize("best"), quantize("best-a16", "--scheme", "nvfp4a16")
    plain, modelopt = quantize("max", "--method", "max"), quantize("modelopt", "--method", "max", "--layout", "modelopt")
    view, peer, few = OUT / "modelopt-view", OUT / "llmcompressor", OUT / "few.jsonl"
    run([peers_python(), SCRIPTS / "modelopt_view.py", modelopt, view])
    if not (peer / "config.json").exists():
        # How well it is calibrated doesn't matter here, and it takes long.
        documents = [json.loads(line)["input_ids"][:128] for line in open(calib)][:2]
        few.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
        run([peers_python(), SCRIPTS / "run_llmcompressor.py", SMOLLM2, few, peer])
    return [
        ("best", best, best), ("BF16 source", SMOLLM2, SMOLLM2), ("best, weights only", weights, weights),
        ("max", plain, plain), ("max, ModelOpt layout", modelopt, view), ("llm-compressor's own", peer, peer),
    ]


def transformers(path: Path, windows: int, dtype: str, attention: str, device: str) -> dict:
    options = ["--dtype", dtype, "--attention", attention, "--device", device]
    printed = run([peers_python(), SCRIPTS / "evaluate.py", TEXT, windows, path, *options])
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def ours(path: Path, windows: int, compute: str, device: str) -> dict:
    """With `cpu_seconds`: all that the process took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [DISTQ, "eval", path, "--text", TEXT, "--windows", windows, "--compute", compute, "--device", device, "--json"]
    scores = json.loads(run(command))["models"][0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return scores | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", default="cpu", help="where both compute; seconds are the cores' in any case")
    args = parser.parse_args()
    windows, device = args.windows, args.device
    exact = []
    for name, mine, theirs in checkpoints():
        a, b = ours(mine, windows, "f32", device), transformers(theirs, windows, "float32", "sdpa", device)
        exact.append((name, a, b, a["perplexity"] / b["perplexity"] - 1))
    # `best` again, in other ways.
    rounded, best = ours(OUT / "best", windows, "bf16", device), OUT / "best"
    spread = [exact[0][2], *(transformers(best, windows, dtype, attention, device) for dtype, attention in SPREAD)]

    tokens = exact[0][1]["tokens"]
    lines = [
        "# distq eval beside stock Transformers", "",
        f"SmolLM2-135M-Instruct in NVFP4, W4A4 unless said: perplexity on {tokens} held-out tokens in windows of 512, the same",
        f"for both; {machine()}. Environment: {', '.join(VERSIONS)}. Made by `bench/agreement.py`.", "",
        "Computed in F32; compressed-tensors is told to dequantize weights without rounding them to BF16 (bench/peers/evaluate.py).",
        "Seconds are those of all cores together: for distq of the whole process, for Transformers from loading to the last score.", "",
        "| checkpoint | distq eval | Transformers | difference | CPU seconds, distq | CPU seconds, Transformers |",
        "|---|---|---|---|---|---|",
    ]
    for name, a, b, difference in exact:
        scores = f"{a['perplexity']:.4f} | {b['perplexity']:.4f} | {100 * difference:+.4f} %"
        lines.append(f"| {name} | {scores} | {a['cpu_seconds']:.1f} | {b['cpu_seconds']:.1f} |")
    lines += [
        "", "`best` in other ways:", "", "| program | dtype | attention | perplexity | against Transformers in F32 | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    base = spread[0]["perplexity"]
    ways = [("distq eval", "bfloat16", "", rounded)]
    ways += [("Transformers", dtype, attention, b) for (dtype, attention), b in zip(SPREAD, spread[1:])]
    for program, dtype, attention, scores in ways:
        found = scores["perplexity"]
        lines.append(f"| {program} | {dtype} | {attention} | {found:.4f} | {100 * (found / base - 1):+.3f} % | {scores['cpu_seconds']:.1f} |")
    table = "\n".join([*lines, ""])
    path = ROOT / "bench/results/agreement.md"
    _, says, prose = path.read_text().partition("\nWhat it says:") if path.exists() else ("", "", "")
    path.write_text(table + says + prose)
    print(table)
    rigid = ("BF16 source", "best, weights only")
    far = [name for name, *_, difference in exact if name in rigid and abs(difference) > 5e-4]
    mean = statistics.mean(difference for name, *_, difference in exact if name not in rigid)
    if far or abs(mean) > 0.005:
        raise SystemExit(f"too far apart: {', '.join(far)}; W4A4 {100 * mean:+.2f} % in the mean")
    if slower := [name for name, a, b, _ in exact if a["cpu_seconds"] > b["cpu_seconds"]]:
        raise SystemExit(f"distq eval took longer than Transformers: {', '.join(slower)}")


if __name__ == "__main__":
    main()
