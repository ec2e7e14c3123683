"""AutoRound's NVFP4 (W4A4, 200 iterations) of a checkpoint:   run_autoround.py SOURCE CALIB.jsonl OUT [ITERATIONS]

On a GPU where there is one. AutoRound leaves out documents that are shorter than its sequence length, which is that of
the shortest one here. Ends with a line of seconds: loading, tuning and exporting."""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

source, calib, out, *iterations = sys.argv[1:]
times = [time.monotonic()]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
times.append(time.monotonic())
documents = [torch.tensor([json.loads(line)["input_ids"]]) for line in open(calib)]
rounding = AutoRound(
    model, AutoTokenizer.from_pretrained(source), scheme="NVFP4", iters=int(*iterations or [200]), dataset=documents,
    nsamples=len(documents), seqlen=min(ids.shape[1] for ids in documents),
)
# It writes into a folder of its own naming inside the one that it is given.
inside = Path(f"{out}.tuned")
rounding.quantize_and_save(str(inside), format="llm_compressor")
(folder,) = inside.iterdir()
folder.rename(out)
inside.rmdir()
times.append(time.monotonic())
print("seconds", *(round(b - a, 2) for a, b in zip(times, times[1:])))
