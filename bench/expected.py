"""Does a run take as long as its plan expects? SmolLM2 on one thread, on two ranks of one thread, on two threads.

    python3 bench/expected.py [DOCUMENTS] [RUNS]        (default 16 and 3; needs two idle cores)

Prints every run, with the CPU time of all its processes and the machine's load before it: where others compute,
the measured time grows and the expected one doesn't.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTQ = str(ROOT / "target/release/distq")
WAYS = [
    ("1 rank × 1 thread", ["taskset", "-c", "0"], "1"),
    ("2 ranks × 1 thread", ["mpirun", "-np", "2", "--bind-to", "core"], "1"),
    ("1 rank × 2 threads", [], "2"),
]


def run(start, threads, method, documents, scratch):
    environment = {
        **os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": threads,
    }
    report, before = f"{scratch}/report.json", os.times().children_user
    subprocess.run(
        [*start, DISTQ, "-q", "quantize", str(ROOT / ".cache/smollm2"), f"{scratch}/out", "--overwrite", "--method",
         method, "--calib-samples", documents, "--report", report],
        env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = json.loads(Path(report).read_text())["seconds"]
    return seconds["walk_expected"], seconds["walk"], os.times().children_user - before


def main(documents="16", runs="3"):
    print("| method | ranks | expected, s | measured, s | ratio | CPU time, s | load before |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for method in ("max", "best"):
            for _ in range(int(runs)):
                for name, start, threads in WAYS:
                    load = os.getloadavg()[0]
                    expected, measured, cpu = run(start, threads, method, documents, scratch)
                    ratio = expected / measured
                    print(f"| {method} | {name} | {expected:.1f} | {measured:.1f} | {ratio:.2f} | {cpu:.1f} | {load:.1f} |",
                          flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
