"""distq and nvidia-modelopt side by side on the CPU: whole processes, wall time and peak memory.

    python bench/speed.py [--runs 3]

SmolLM2, the same 16 x 512 calibration tokens, the same cores, alternating runs, medians. modelopt's figure
is its process from start to exported files, imports included, and, beside it, without them. Writes
bench/results/cpu_speed.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, SMOLLM2, calibration, machine, peers_python


def measure(command: list) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of one process."""
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{command[0]} failed")
    return time.monotonic() - started, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    python, calib = peers_python(), calibration()
    script = ROOT / "bench/peers/run_modelopt.py"
    imports = "import torch, modelopt.torch.quantization, modelopt.torch.export; from transformers import AutoModelForCausalLM"
    results: dict[str, list[tuple[float, float]]] = {"distq": [], "modelopt": [], "imports": []}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        for run in range(args.runs + 1):
            ours = [DISTQ, "quantize", SMOLLM2, f"{scratch}/distq", "--method", "max", "--calib", calib, "--calib-min-tokens", "1"]
            commands = {
                "distq": [*ours, "--layout", "modelopt", "--overwrite", "--quiet"],
                "modelopt": [python, script, SMOLLM2, calib, f"{scratch}/modelopt{run}"],
                "imports": [python, "-c", imports],
            }
            for name, command in commands.items():
                figures = measure(command)
                if run > 0:  # the first of each warms the page cache
                    results[name].append(figures)
    median = lambda name, i: statistics.median(figures[i] for figures in results[name])
    spread = lambda name: f"{min(f[0] for f in results[name]):.1f} to {max(f[0] for f in results[name]):.1f}"
    working = median("modelopt", 0) - median("imports", 0)
    table = "\n".join([
        "# distq and nvidia-modelopt on the same CPU", "",
        f"SmolLM2-135M-Instruct, 16 x 512 calibration tokens, max calibration, ModelOpt layout; {machine()};",
        f"medians of {args.runs} alternating runs, page cache warm. Made by `make bench`.", "",
        "| program | wall time | spread | peak memory |", "|---|---|---|---|",
        f"| distq, start to published and verified output | {median('distq', 0):.1f} s | {spread('distq')} s | {median('distq', 1):.2f} GiB |",
        f"| modelopt 0.47.0, whole process | {median('modelopt', 0):.1f} s | {spread('modelopt')} s | {median('modelopt', 1):.2f} GiB |",
        f"| modelopt 0.47.0, load + quantize + export (without {median('imports', 0):.1f} s of imports) | {working:.1f} s | | |",
        "", f"distq takes {median('distq', 0) / working:.2f} of modelopt's time without imports, and "
        f"{median('distq', 1) / median('modelopt', 1):.2f} of its memory.", "",
    ])
    (ROOT / "bench/results/cpu_speed.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
