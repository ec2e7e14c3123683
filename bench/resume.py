"""What a killed run costs, with and without --work-dir: SmolLM2, 64 documents, one and two ranks of one thread.

    python3 bench/resume.py        (needs two idle cores)

For each method and number of ranks: an undisturbed run without and with the directory (time of the walk, passes of
micro-batches through layers, most bytes in the directory at once), then runs whose every rank gets SIGKILL when a
share of the layers is finished, and that go on with --resume. Repeated are the passes of the second run beyond those of
layers that were not finished, in percent of an undisturbed run's; every resumed output is compared by SHA-256.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from faults import DISTQ, ENVIRONMENT, LAYERS, ROOT, digests, layers_finished, ranks_of

SAMPLES = os.environ.get("SAMPLES", "64")


class Bench:
    def __init__(self, scratch, method, ranks, kept):
        self.out, self.report, self.work = scratch / "out", scratch / "report.json", scratch / "work"
        self.arguments = ["--method", method, "--calib-samples", SAMPLES, "--report", str(self.report)]
        if kept:
            self.work.mkdir(exist_ok=True)
            self.arguments += ["--work-dir", str(self.work)]
        self.mpirun = ["mpirun", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []

    def command(self, *more):
        return [*self.mpirun, DISTQ, "-q", "quantize", str(ROOT / ".cache/smollm2"), str(self.out), *self.arguments, *more]

    def start(self, *more):
        return subprocess.Popen(
            self.command(*more), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run(self, *more):
        """Runs to the end: seconds of the walk, passes, most bytes kept at once."""
        process, most = self.start(*more), [0]

        def watch():
            while process.poll() is None:
                try:
                    most[0] = max(most[0], sum(f.stat().st_size for f in self.work.iterdir()))
                except OSError:
                    pass  # a file that went away between the two calls, or no directory
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert process.wait() == 0, self.command(*more)
        watcher.join()
        report = json.loads(self.report.read_text())
        passes = sum(rank["phases"]["passes"] for rank in report["ranks"])
        return report["seconds"]["walk"], passes, most[0]

    def digests(self):
        found = digests(self.out)
        shutil.rmtree(self.out)
        return found

    def kill(self, layers):
        """A run that is killed when so many layers are finished; returns how many are."""
        process = self.start()
        while layers_finished(self.out) < layers and process.poll() is None:
            time.sleep(0.005)
        for rank in ranks_of(process.pid) or [process.pid]:
            os.kill(rank, signal.SIGKILL)
        process.wait()
        return layers_finished(self.out)


def main():
    print("| method | ranks | --work-dir | undisturbed, s | most kept at once, MB | killed after layers | "
          "left of the passes, % | repeated, % | same bytes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method in ("max", "best"):
        for ranks in (1, 2):
            expected = None
            for kept in (False, True):
                scratch = Path(tempfile.mkdtemp())
                bench = Bench(scratch, method, ranks, kept)
                seconds, passes, most = bench.run()
                expected = expected or bench.digests()
                shutil.rmtree(bench.out, ignore_errors=True)
                for share in (0.5, 0.9):
                    finished = bench.kill(max(1, round(share * LAYERS)))
                    _, again, _ = bench.run("--resume")
                    left = 100 * (LAYERS - finished) / LAYERS
                    repeated = 100 * again / passes - left
                    print(
                        f"| {method} | {ranks} | {'yes' if kept else 'no'} | {seconds:.1f} | {most / 1e6:.0f} | {finished} "
                        f"of {LAYERS} | {left:.0f} | {repeated:.1f} | {'yes' if bench.digests() == expected else 'NO'} |",
                        flush=True)
                shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
