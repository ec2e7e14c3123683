"""What distq expects of clusters that are not there: 123B and 405B shapes, 1 to 64 ranks, three kinds of links.

    python3 bench/scale.py          prints the tables of bench/results/scale.md

Needs no weights and no MPI: `distq plan --nodes` plans from config.json and calibration documents of token ids
alone (256 of 150 to 1200 tokens), and plays the schedule through with assumed machines.
"""

import json
import random
import subprocess
import tempfile
from pathlib import Path

DISTQ = str(Path(__file__).resolve().parent.parent / "target/release/distq")
SHAPES = {  # family, hidden, intermediate, layers, heads, kv heads, vocabulary
    "123B": ("Mistral", 12288, 28672, 88, 96, 8, 32768),
    "405B": ("Llama", 16384, 53248, 126, 128, 8, 128256),
}
CLUSTERS = [["128GiB:uma"] * ranks for ranks in (1, 3, 8, 64)] + [["128GiB:uma", "128GiB:uma", "24GiB:gpu"]]
LINKS = ["2.5Gbit", "25Gbit", "200Gbit"]


def describe(folder, family, hidden, intermediate, layers, heads, kv_heads, vocab):
    (folder / "config.json").write_text(json.dumps({
        "architectures": [f"{family}ForCausalLM"], "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "sliding_window": None,
    }))
    numbers = random.Random(0)
    documents = [{"input_ids": [1] * numbers.randint(150, 1200)} for _ in range(256)]
    (folder / "calib.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


def plan(folder, machines, links, method):
    command = [DISTQ, "plan", str(folder), "--json", "--method", method, "--calib", str(folder / "calib.jsonl"),
               "--nodes", ",".join(machines), "--link", links]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main():
    for name, shape in SHAPES.items():
        for method in ("max", "best"):
            print(f"\n{name}, `{method}`:\n")
            print("| machines | " + " | ".join(LINKS) + " | peak memory | waiting, slowest link |")
            print("|---|" + "---|" * (len(LINKS) + 2))
            with tempfile.TemporaryDirectory() as folder:
                describe(Path(folder), *shape)
                for machines in CLUSTERS:
                    kinds = " and ".join(f"{machines.count(kind)} × {kind}" for kind in dict.fromkeys(machines))
                    plans = [plan(Path(folder), machines, link, method) for link in LINKS]
                    if None in plans:
                        print(f"| {kinds} | does not fit |")
                        continue
                    peak = max(stage["peak_memory"] for p in plans for stage in p["stages"]) / 2**30
                    wait = sum(s["wait"] for s in plans[0]["stages"]) / len(machines) / plans[0]["seconds"]
                    times = " | ".join(minutes(p["seconds"]) for p in plans)
                    print(f"| {kinds} | {times} | {peak:.0f} GiB | {wait:.0%} |", flush=True)


if __name__ == "__main__":
    main()
