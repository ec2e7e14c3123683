"""nvidia-modelopt's NVFP4 (max calibration) of a checkpoint:   run_modelopt.py SOURCE CALIB.jsonl OUT

On a GPU where there is one. Ends with a line of seconds: loading, calibrating, exporting."""

import json
import sys
import time
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

source, calib, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
times = [time.monotonic()]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map=device).eval()
times.append(time.monotonic())
documents = [json.loads(line)["input_ids"] for line in open(calib)]


def forward(model):
    with torch.no_grad():
        for ids in documents:
            model(torch.tensor([ids], device=device))


mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward)
times.append(time.monotonic())
export_hf_checkpoint(model, export_dir=out)
times.append(time.monotonic())
if (Path(source) / "tokenizer.json").exists():
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
print("seconds", *(round(b - a, 2) for a, b in zip(times, times[1:])))
