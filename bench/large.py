"""distq on GPUs, on random checkpoints of large shapes, beside the peers where their packages are importable.

    python3 bench/large.py SCRATCH [--distq PATH] [--shape 123b] [--layers 8] [--runs 3] [--method max]
                           [--ranks 1,2] [--memory-per-rank 15GiB] [--repeat 8] [--peers]

Needs torch and safetensors; no network. Without a network the peers come from a folder of wheels, installed
beforehand: `pip install --no-index --find-links WHEELS nvidia-modelopt llmcompressor`. The checkpoint is made in
SCRATCH and stays in the page cache. Times are whole processes; for the peers also without their imports (loading,
calibrating and exporting, as their runners tell). Idle is the share of the time from the first layer's first
micro-batch to the last layer's last in which the card computes nothing, by its own clock; passing is the time from
the first rank's first micro-batch to the last one's last. `--repeat` walks the 256 documents so many times. Prints a
table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Memory:
    """The largest memory in use on any one card while a program runs, in GiB, as nvidia-smi sees it."""

    def __enter__(self):
        self.peak, self.running = 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while self.running:
            used = subprocess.run(ask, capture_output=True, text=True).stdout.split()
            self.peak = max([self.peak, *(int(mib) / 1024 for mib in used)])
            time.sleep(0.1)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def distq(args, model: Path, out: Path, ranks: int) -> dict:
    report = out.with_suffix(".json")
    calib = out.with_suffix(".jsonl")
    calib.write_text((model / "calib.jsonl").read_text() * args.repeat)
    command = [args.distq, "quantize", model, out, "--method", args.method, "--report", report, "-q"]
    command += ["--calib", calib, "--calib-samples", 256 * args.repeat]
    if args.memory_per_rank:
        command += ["--memory-per-rank", args.memory_per_rank]
    if ranks > 1:
        command = ["mpirun", "-np", str(ranks), *command]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    started = time.monotonic()
    with Memory() as memory:
        subprocess.run([str(part) for part in command], env=environment, check=True)
    wall = time.monotonic() - started
    told = json.loads(report.read_text())
    idle, computed = [], [[bar for bar in rank["timeline"] if bar["work"] == "compute"] for rank in told["ranks"]]
    for bars in computed:
        busy = sum(bar["end"] - bar["start"] for bar in bars)
        idle.append(1 - busy / (bars[-1]["end"] - bars[0]["start"]))
    return {
        "wall": wall, "card": memory.peak, "host": max(rank["peak_resident"] for rank in told["ranks"]) / 2**30,
        "phases": {name: round(seconds, 2) for name, seconds in told["seconds"].items()},
        "passing": max(bars[-1]["end"] for bars in computed) - min(bars[0]["start"] for bars in computed),
        "loading": [round(statistics.median(load(rank)), 3) for rank in told["ranks"]],
        "whole": wall, "idle": [round(share, 3) for share in idle],
        "modes": [(stage["mode"], stage["group"]) for stage in told["plan"]["stages"]],
    }


def load(rank: dict) -> list[float]:
    """Seconds that each loading of a layer took."""
    return [bar["end"] - bar["start"] for bar in rank["timeline"] if bar["work"] == "load"]


def peer(script: str, model: Path, out: Path) -> dict:
    command = [sys.executable, ROOT / "bench/peers" / script, model, model / "calib.jsonl", out]
    started = time.monotonic()
    with Memory() as memory:
        process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    whole = time.monotonic() - started
    lines = [line for line in process.stdout.splitlines() if line.startswith("seconds")]
    if process.returncode or not lines:
        return {"failed": (process.stderr.strip().splitlines() or ["no message"])[-1]}
    phases = [float(part) for part in lines[-1].split()[1:]]
    return {"wall": sum(phases), "whole": whole, "phases": phases, "card": memory.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--distq", default=ROOT / "target/release/distq")
    parser.add_argument("--shape", default="123b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--method", default="max")
    parser.add_argument("--ranks", default="1", type=lambda text: [int(ranks) for ranks in text.split(",")])
    parser.add_argument("--memory-per-rank")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    model = args.scratch / f"{args.shape}-{args.layers}"
    if not model.exists():
        subprocess.run([sys.executable, ROOT / "bench/make_checkpoint.py", args.shape, str(args.layers), model], check=True)
    for file in model.glob("*.safetensors"):  # into the page cache
        with open(file, "rb") as bytes:
            while bytes.read(1 << 26):
                pass
    out = args.scratch / "out"

    def times(run) -> list[dict]:
        results = []
        for _ in range(args.runs):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            results.append(run())
            print("   ", results[-1], flush=True)
        return results

    print(f"{args.shape} shape, {args.layers} layers, {args.method}", flush=True)
    rows = [(f"distq, {ranks} rank{'s' * (ranks > 1)}", times(lambda: distq(args, model, out, ranks))) for ranks in args.ranks]
    if args.peers:
        for name, script in (("nvidia-modelopt", "run_modelopt.py"), ("llm-compressor", "run_llmcompressor.py")):
            shutil.rmtree(out, ignore_errors=True)
            rows.append((name, [peer(script, model, out)]))
            print("   ", rows[-1][1], flush=True)
    print("| program | wall, s | spread | with imports, s | card, GiB | walk, s | passing, s | card idle |\n|---|---|---|---|---|---|---|---|")
    for name, results in rows:
        if "failed" in results[0]:
            print(f"| {name} | failed: {results[0]['failed']} | | | | | | |")
            continue
        walls = [result["wall"] for result in results]
        walks = [result["phases"]["walk"] for result in results if isinstance(result["phases"], dict)]
        walk = f"{statistics.median(walks):.2f}" if walks else ""
        passing = [result["passing"] for result in results if "passing" in result]
        passed = f"{statistics.median(passing):.2f}" if passing else ""
        card = max(result["card"] for result in results)
        whole = statistics.median(result["whole"] for result in results)
        idle = max((share for result in results for share in result.get("idle", [])), default=None)
        print(f"| {name} | {statistics.median(walls):.2f} | {min(walls):.2f} to {max(walls):.2f} | {whole:.2f} "
              f"| {card:.1f} | {walk} | {passed} | {'' if idle is None else f'{idle:.1%}'} |")


if __name__ == "__main__":
    main()
