"""How good each method is, beside the peers: SmolLM2, W4A4 unless said, 16 documents of at most 512 tokens.

    python bench/accuracy.py        (make third-party first: it makes the peers' checkpoints)

Everything is measured by `distq eval` on text that calibrated nothing; bench/third_party.py holds what Transformers
says, bench/agreement.py that the two agree. Writes the table in bench/results/accuracy.md and keeps the text below it.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, SMOLLM2, calibration, machine, peers_python

METHODS = ["max", "sweep", "wsweep", "smooth+max", "smooth+wsweep", "gptq", "smooth+gptq", "best"]
OUT = CACHE / "accuracy"


def quantize(name: str, *arguments: str) -> Path:
    out = OUT / name
    command = [DISTQ, "--quiet", "quantize", SMOLLM2, out, "--overwrite", "--calib-min-tokens", "1", *arguments]
    subprocess.run([str(part) for part in command], check=True)
    return out


def peer_gptq(number: int) -> Path:
    out = CACHE / f"peers-output/{number}/llmcompressor-gptq"
    if not (out / "config.json").exists():
        script = ROOT / "bench/peers/run_llmcompressor.py"
        subprocess.run([peers_python(), script, SMOLLM2, calibration(number), out, "gptq"], check=True)
    return out


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    wiki = ["--calib", str(CACHE / "text/calib_wiki.jsonl"), "--calib-max-tokens", "512"]
    rows: list[tuple[str, Path]] = []
    for number in (0, 1):
        calib = ["--calib", str(calibration(number))]
        rows += [(f"{m}, set {number}", quantize(f"{number}-{m}", *calib, "--method", m)) for m in METHODS]
        peers = CACHE / f"peers-output/{number}"
        rows.append((f"llm-compressor 0.14 max, set {number}", peers / "llmcompressor"))
        rows.append((f"llm-compressor 0.14 GPTQ, set {number}", peer_gptq(number)))
        rows.append((f"modelopt 0.47 max, set {number}", peers / "modelopt"))
    for seed in ("1", "2", "3"):
        few = [*wiki, "--calib-samples", "16", "--seed", seed, "--method", "best"]
        rows.append((f"best, 16 other documents (seed {seed})", quantize(f"seed-{seed}", *few)))
    rows.append(("best, 256 documents", quantize("256", *wiki, "--calib-samples", "256", "--method", "best")))
    for method in ("max", "best"):
        arguments = ["--calib", str(calibration(0)), "--scheme", "nvfp4a16", "--method", method]
        rows.append((f"W4A16 {method}, set 0", quantize(f"a16-{method}", *arguments)))

    command = [DISTQ, "eval", *(path for _, path in rows), "--reference", SMOLLM2, "--windows", "40", "--json"]
    command += ["--text", CACHE / "text/wiki_eval.txt"]
    printed = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE).stdout
    write(json.loads(printed), [name for name, _ in rows])


def write(evaluation: dict, names: list[str]) -> None:
    source, *models = evaluation["models"]
    lines = [
        "# Methods side by side", "",
        f"SmolLM2-135M-Instruct in NVFP4, scored by `distq eval` on {source['tokens']} held-out tokens in windows of",
        f"{evaluation['window_tokens']}, computed in {evaluation['compute']}; KL to the BF16 source in nats a token. {machine()}. Each set is 16 documents of",
        "512 tokens, the same for every program. Made by `bench/accuracy.py`.", "",
        "| method | perplexity | log gap to the source | mean KL | p99 KL | top-1 |", "|---|---|---|---|---|---|",
        f"| BF16 source | {source['perplexity']:.3f} | | | | |",
    ]
    from math import log

    for name, m in zip(names, models):
        gap = log(m["perplexity"] / source["perplexity"])
        scores = f"{m['perplexity']:.3f} | {gap:.4f} | {m['mean_kl']:.4f} | {m['p99_kl']:.3f} | {m['top1']:.4f}"
        lines.append(f"| {name} | {scores} |")
    path = ROOT / "bench/results/accuracy.md"
    _, says, prose = path.read_text().partition("\nWhat it says:")
    path.write_text("\n".join(lines) + "\n" + says + prose)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
