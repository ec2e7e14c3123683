"""`distq verify --source` on fresh outputs of nvidia-modelopt and llm-compressor.

    python bench/verify_peers.py

Tiny models of both families, in every configuration of NVFP4 that the programs offer on a CPU. Writes
bench/results/verify_peers.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import CACHE, DISTQ, ROOT, VERSIONS, peers_python

PROGRAMS = {"modelopt": "nvidia-modelopt", "llmcompressor": "llm-compressor"}


def main() -> None:
    root = CACHE / "verify-peers"
    rows = []
    for program, name in PROGRAMS.items():
        command = [peers_python(), ROOT / "bench/peers/tiny_outputs.py", program, root]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, env=environment)
        for out in sorted(path.parent for path in (root / program).glob("*/*/config.json")):
            model = out.parent.name
            command = [DISTQ, "verify", out, "--source", root / "source" / model, "--json"]
            ended = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
            report = json.loads(ended.stdout)
            summary = report["summary"]
            # Every model here is too small to be split over eight GPUs, which A5 warns of.
            said = [
                f"{rule['id']}: {rule['findings'][0]}" for rule in report["rules"]
                if rule["level"] in ("warning", "error") and not (rule["id"] == "A5" and rule["level"] == "warning")
            ]
            verdict = "passes" if ended.returncode == 0 else "**fails**"
            error = summary["mean_relative_error"]
            error = "" if error is None else f"{error:.3f}"
            rows.append((name, model, out.name, verdict, summary["judged"], error, "; ".join(said)))
    text = [
        "# distq verify on its peers' outputs", "",
        "Fresh outputs for tiny random models, each verified against its source, whose config.json is spelled as",
        "Transformers 4 did. Environment: " + ", ".join(VERSIONS) + ". Made by `python bench/verify_peers.py`.", "",
        "| program | model | configuration | | rules judged | relative error | findings |", "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows), "",
        "Blocks of 32 are not NVFP4: engines read blocks of 16.", "",
    ]
    (ROOT / "bench/results/verify_peers.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
