"""Kills ranks at random moments, resumes, and compares every byte: SmolLM2 over three ranks.

    python3 bench/faults.py [KILLS]        (default 50)

Each time a random rank gets SIGKILL at a random moment of a run's usual length; OUT must not exist then, and
`--resume` (with one, two or three ranks in turn) must end with the files of an undisturbed run. Phases that chance hit
less than five times are then aimed at. Prints a table of the phase that was hit, times tried, and outcome.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTQ = str(ROOT / "target/release/distq")
ENVIRONMENT = {
    **os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
}
LAYERS = 30

AFTER = "after publishing"
PHASES = [
    "survey, before anything was placed", "walking, no layer finished", "walking, some layers finished",
    "all parts written, proving",
]


def command(out, ranks, *more):
    mpirun = ["mpirun", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    data = ["--method", METHOD, "--calib-samples", "12", "--calib-max-tokens", "256", "--calib-min-tokens", "1"]
    return [*mpirun, DISTQ, "-q", "quantize", str(ROOT / ".cache/smollm2"), str(out), *data, *more]


def digests(out):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}


def ranks_of(launcher):
    """Rank processes under a launcher."""
    children = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True).stdout.split()
    found = []
    for child in map(int, children):
        try:
            name = Path(f"/proc/{child}/comm").read_text().strip()
        except OSError:
            continue
        found += [child] if name == "distq" else ranks_of(child)
    return found


def layers_finished(out):
    """Decoder layers that the journal of an unfinished run calls finished."""
    journal = Path(f"{out}.partial/distq-journal.jsonl")
    return journal.read_text().count('{"part":{"layer"') if journal.exists() else 0


def phase(out):
    """What the run was doing, by what it left."""
    if out.exists() and not (out / "distq-journal.jsonl").exists():
        return AFTER
    if out.exists():
        return PHASES[3]
    if not Path(f"{out}.partial").exists():
        return PHASES[0]
    layers = layers_finished(out)
    if layers == 0:
        return PHASES[1]
    if layers < LAYERS:
        return PHASES[2]
    return PHASES[3]


def quiet(arguments, **options):
    return subprocess.run(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def main(kills):
    scratch = Path(tempfile.mkdtemp())
    expected = scratch / "expected"
    started = time.monotonic()
    quiet(command(expected, 3), check=True)
    usual, wanted = time.monotonic() - started, digests(expected)
    tried, equal = Counter(), Counter()
    dice = random.Random(7)

    def kill(number, moment):
        """One run that is killed when `moment(out, launcher)` returns."""
        out = scratch / "out"
        launcher = subprocess.Popen(
            command(out, 3), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment(out, launcher)
        victims = ranks_of(launcher.pid)
        if victims:
            os.kill(dice.choice(victims), signal.SIGKILL)
        launcher.wait(timeout=120)
        hit = phase(out)
        tried[hit] += 1
        if hit == AFTER:
            equal[hit] += digests(out) == wanted
        else:
            journals = [Path(f"{out}.partial/distq-journal.jsonl"), out / "distq-journal.jsonl"]
            resume = ["--resume"] if any(journal.exists() for journal in journals) else ["--overwrite"]
            done = quiet(command(out, 1 + number % 3, *resume))
            equal[hit] += done.returncode == 0 and digests(out) == wanted
        print(f"kill {sum(tried.values())}: {hit}; {sum(equal.values())} to the same bytes", file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}.partial", ignore_errors=True)

    for number in range(kills):
        # Evenly over the run.
        kill(number, lambda *_: time.sleep(usual * (number + dice.random()) / kills))
    for wished in PHASES:
        def reached(out, launcher):
            while phase(out) != wished and launcher.poll() is None:
                time.sleep(0.001)
            time.sleep(dice.random() * 0.02)
        for number in range(20):
            if tried[wished] < 5:
                kill(number, reached)
    shutil.rmtree(scratch)
    print(f"method {METHOD}, usual run {usual:.1f} s\n")
    print("| killed while | times | went on to the same bytes |\n|---|---|---|")
    for name, times in sorted(tried.items()):
        print(f"| {name} | {times} | {equal[name]} |")
    print(f"| all | {sum(tried.values())} | {sum(equal.values())} |")
    sys.exit(sum(tried.values()) != sum(equal.values()))


METHOD = os.environ.get("METHOD", "max")

if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
