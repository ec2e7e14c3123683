"""Does a second rank help? SmolLM2's calibration on one thread, against two ranks of one thread each.

    python3 bench/ranks.py [RUNS] [METHODS...]        (default 3, max and best; needs two idle cores)

Runs alternate; the figure is the median of the walk's seconds (every phase between the plan and the proof).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTQ = str(ROOT / "target/release/distq")
ENVIRONMENT = {
    **os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
}


def walk(scratch, ranks, method):
    report = f"{scratch}/report.json"
    mpirun = ["mpirun", "-np", str(ranks), "--bind-to", "core"] if ranks > 1 else ["taskset", "-c", "0"]
    subprocess.run(
        [*mpirun, DISTQ, "-q", "quantize", str(ROOT / ".cache/smollm2"), f"{scratch}/out", "--overwrite", "--method",
         method, "--calib-samples", "64", "--report", report],
        env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    report = json.loads(Path(report).read_text())
    busy = [
        sum(bar["end"] - bar["start"] for bar in rank["timeline"] if bar["work"] == "compute")
        for rank in report["ranks"]
    ]
    return report["seconds"]["walk"], [round(b, 2) for b in busy], [round(r["phases"]["wait"], 2) for r in report["ranks"]]


def main(runs=3, *methods):
    print("| method | one rank, s | two ranks, s | ratio | computing by rank, s | waiting by rank, s |")
    print("|---|---|---|---|---|---|")
    for method in methods or ("max", "best"):
        times = {1: [], 2: []}
        with tempfile.TemporaryDirectory() as scratch:
            for _ in range(int(runs)):
                for ranks in times:
                    seconds, busy, waits = walk(scratch, ranks, method)
                    times[ranks].append(seconds)
        one, two = (statistics.median(times[ranks]) for ranks in times)
        print(f"| {method} | {one:.2f} | {two:.2f} | {one / two:.2f} | {busy} | {waits} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
