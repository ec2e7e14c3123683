"""A third party's word: stock Transformers loads distq's output, and how good it is beside the peers' own.

    python bench/third_party.py [--windows 40]

SmolLM2 quantized by distq, nvidia-modelopt and llm-compressor with the same 16 x 512 calibration tokens;
perplexity (W4A4, BF16) on text that calibrated none of them. Fails where Transformers misses or does not
expect a tensor, or where distq is more than 1 % worse than the better peer. Writes
bench/results/third_party.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, SMOLLM2, VERSIONS, calibration, machine, peers_python

SCRIPTS = ROOT / "bench/peers"


def made(out: Path, command: list) -> Path:
    """Runs a peer where its output is not there yet."""
    if not (out / "config.json").exists():
        print("running", Path(command[1]).name, flush=True)
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    python, calib, outputs = peers_python(), calibration(), CACHE / "peers-output"
    outputs.mkdir(exist_ok=True)

    quantize = [DISTQ, "quantize", SMOLLM2, "--calib", calib, "--calib-min-tokens", "1", "--overwrite", "--quiet"]
    for layout in ("compressed-tensors", "modelopt"):
        subprocess.run([*quantize, "--layout", layout, outputs / f"distq-{layout}"], check=True)
    run = lambda script, *arguments: [python, SCRIPTS / script, *arguments]
    modelopt = made(outputs / "modelopt", run("run_modelopt.py", SMOLLM2, calib, outputs / "modelopt"))
    llmcompressor = made(outputs / "llmcompressor", run("run_llmcompressor.py", SMOLLM2, calib, outputs / "llmcompressor"))
    view = made(outputs / "modelopt-view", run("modelopt_view.py", modelopt, outputs / "modelopt-view"))
    ours_view = outputs / "distq-modelopt-view"
    subprocess.run([str(part) for part in run("modelopt_view.py", outputs / "distq-modelopt", ours_view)], check=True)

    rows = {
        "BF16 source": SMOLLM2,
        "distq, compressed-tensors layout": outputs / "distq-compressed-tensors",
        "distq, ModelOpt layout (read through compressed-tensors names)": ours_view,
        "nvidia-modelopt 0.47.0 NVFP4 (the same view)": view,
        "llm-compressor 0.14.0.1 NVFP4": llmcompressor,
    }
    command = [python, SCRIPTS / "evaluate.py", CACHE / "text/wiki_eval.txt", args.windows, *rows.values()]
    printed = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]

    source, distq, distq_view, *peers = (result["perplexity"] for result in results)
    lines = [
        "# distq beside its peers in stock Transformers", "",
        f"SmolLM2-135M-Instruct (dequantized from Q4_1, see tests/fixtures/smollm2.py), 16 x 512 calibration tokens,",
        f"W4A4, {results[0]['tokens']} held-out tokens in windows of 512, BF16 on {machine()}.",
        f"Environment: {', '.join(VERSIONS)}. Made by `make third-party`.", "",
        "| checkpoint | perplexity | over the source | missing or unexpected tensors |", "|---|---|---|---|",
    ]
    for name, result in zip(rows, results):
        ratio = 100 * (result["perplexity"] / source - 1)
        lines.append(f"| {name} | {result['perplexity']:.3f} | {ratio:+.1f} % | {result['problems'] or 'none'} |")
    lines += ["", f"distq's checkpoint completes: \"{results[1]['completion'].strip()}\"", ""]
    table = "\n".join(lines)
    (ROOT / "bench/results/third_party.md").write_text(table)
    print(table)
    if any(result["problems"] for result in results[1:3]):
        raise SystemExit("Transformers missed or did not expect tensors")
    if max(distq, distq_view) > 1.01 * min(peers):
        raise SystemExit(f"distq is more than 1 % worse than the better peer: {distq:.3f} against {min(peers):.3f}")


if __name__ == "__main__":
    main()
