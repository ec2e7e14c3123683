"""How good each method is, beside the peers: W4A4 unless said, 16 documents of at most 512 tokens.

    python bench/accuracy.py                                                  (SmolLM2, on this machine's cores)
    python bench/accuracy.py --model gemma3 --judge transformers --device cuda --peers all

Measured on text that calibrated nothing, by `distq eval` or by stock Transformers (bench/peers/evaluate.py);
bench/third_party.py holds what Transformers says of SmolLM2, bench/agreement.py that the two agree. The model and the
text are made by `make fixtures`, `make fixtures-gemma3` and tests/fixtures/text.py; peers run where their output of an
earlier run is not there. Writes the table in bench/results/accuracy.md (accuracy_gemma3.md) and keeps the text below it.
"""

import argparse
import json
import subprocess
import sys
from math import log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, GEMMA3, PEERS, ROOT, SMOLLM2, calibration, machine, peer, peers_python, view

METHODS = ["max", "sweep", "wsweep", "smooth+max", "smooth+wsweep", "gptq", "smooth+gptq", "best"]
# What runs where nothing else is said: AutoRound takes hours without a GPU, the expanded search nearly as long.
USUAL = ["llmcompressor", "llmcompressor-gptq", "modelopt"]
MODELS = {
    "smollm2": (SMOLLM2, "SmolLM2-135M-Instruct", "accuracy.md"),
    "gemma3": (GEMMA3, "Gemma-3-270M (dequantized, see tests/fixtures/gemma3.py)", "accuracy_gemma3.md"),
}
TEXT, WINDOWS = CACHE / "text/wiki_eval.txt", 40


def quantize(model: Path, name: str, *arguments: str) -> Path:
    out = CACHE / "accuracy" / (name if model == SMOLLM2 else f"{model.name}-{name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [DISTQ, "--quiet", "quantize", model, out, "--overwrite", "--calib-min-tokens", "1", *arguments]
    subprocess.run([str(part) for part in command], check=True)
    return out


def ours(model: Path, number: int) -> list[tuple[str, Path]]:
    """distq's methods on calibration set `number`."""
    calib = ["--calib", str(calibration(number, model))]
    return [(f"{m}, set {number}", quantize(model, f"{number}-{m}", *calib, "--method", m)) for m in METHODS]


def other_documents(model: Path) -> list[tuple[str, Path]]:
    """The default method on other documents than the sets', and weights alone."""
    wiki = ["--calib", str(CACHE / "text/calib_wiki.jsonl"), "--calib-max-tokens", "512"]
    rows: list[tuple[str, Path]] = []
    for seed in ("1", "2", "3"):
        few = [*wiki, "--calib-samples", "16", "--seed", seed, "--method", "best"]
        rows.append((f"best, 16 other documents (seed {seed})", quantize(model, f"seed-{seed}", *few)))
    rows.append(("best, 256 documents", quantize(model, "256", *wiki, "--calib-samples", "256", "--method", "best")))
    for method in ("max", "best"):
        arguments = ["--calib", str(calibration(0, model)), "--scheme", "nvfp4a16", "--method", method]
        rows.append((f"W4A16 {method}, set 0", quantize(model, f"a16-{method}", *arguments)))
    return rows


def distq_eval(model: Path, checkpoints: list[Path], device: str) -> tuple[list[dict], str]:
    """Scores of the source and of every checkpoint, and who says so."""
    command = [DISTQ, "eval", *checkpoints, "--reference", model, "--windows", WINDOWS, "--json", "--device", device]
    printed = subprocess.run([str(p) for p in [*command, "--text", TEXT]], check=True, stdout=subprocess.PIPE).stdout
    told = json.loads(printed)
    return told["models"], f"`distq eval`, computed in {told['compute']}; {machine()}"


def transformers(model: Path, checkpoints: list[Path], device: str) -> tuple[list[dict], str]:
    """As [`distq_eval`]. ModelOpt's layout is read under the names that Transformers knows."""
    readable = [view(path) if path.name == "modelopt" else path for path in checkpoints]
    script = ROOT / "bench/peers/evaluate.py"
    command = [peers_python(), script, TEXT, WINDOWS, model, *readable, "--reference", model, "--device", device]
    printed = subprocess.run([str(p) for p in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    scores = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if problems := [score["path"] for score in scores if score["problems"]]:
        raise SystemExit(f"Transformers misses or does not expect tensors of {', '.join(problems)}")
    return scores, f"stock Transformers, computed in bfloat16; {scores[0]['device']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--judge", choices=["distq", "transformers"], default="distq")
    parser.add_argument("--device", default="cpu", help="where the judge computes")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, "all"], default=USUAL)
    parser.add_argument("--sets", type=int, default=2, help="calibration sets")
    parser.add_argument("--peers-only", action="store_true", help="leave distq out")
    args = parser.parse_args()
    model, title, file = MODELS[args.model]
    peers = list(PEERS) if "all" in args.peers else args.peers
    rows: list[tuple[str, Path]] = []
    for number in range(args.sets):
        rows += [] if args.peers_only else ours(model, number)
        rows += [(f"{PEERS[name][0]}, set {number}", peer(name, number, model)) for name in peers]
    rows += [] if args.peers_only else other_documents(model)
    judge = distq_eval if args.judge == "distq" else transformers
    scores, by = judge(model, [path for _, path in rows], args.device)
    write(ROOT / "bench/results" / file, title, by, scores, [name for name, _ in rows])


def write(path: Path, title: str, by: str, scores: list[dict], names: list[str]) -> None:
    source, *models = scores
    lines = [
        "# Methods side by side", "",
        f"{title} in NVFP4, scored on {source['tokens']} held-out tokens in windows of 512",
        f"by {by}. KL to the BF16 source in nats a token. Each set is 16 documents of",
        "512 tokens, the same for every program.",
        "Made by `bench/accuracy.py`.", "",
        "| method | perplexity | log gap to the source | mean KL | p99 KL | top-1 |", "|---|---|---|---|---|---|",
        f"| BF16 source | {source['perplexity']:.3f} | | | | |",
    ]
    for name, m in zip(names, models):
        gap = log(m["perplexity"] / source["perplexity"])
        result = f"{m['perplexity']:.3f} | {gap:.4f} | {m['mean_kl']:.4f} | {m['p99_kl']:.3f} | {m['top1']:.4f}"
        lines.append(f"| {name} | {result} |")
    _, says, prose = path.read_text().partition("\nWhat it says:") if path.exists() else ("", "", "")
    path.write_text("\n".join(lines) + "\n" + says + prose)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
