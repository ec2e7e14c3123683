"""nvidia-modelopt's NVFP4 (max calibration) of a checkpoint:   run_modelopt.py SOURCE CALIB.jsonl OUT"""

import json
import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

source, calib, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
documents = [json.loads(line)["input_ids"] for line in open(calib)]


def forward(model):
    with torch.no_grad():
        for ids in documents:
            model(torch.tensor([ids]))


mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward)
export_hf_checkpoint(model, export_dir=out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
