"""llm-compressor's NVFP4 (W4A4) of a checkpoint:   run_llmcompressor.py SOURCE CALIB.jsonl OUT [gptq]"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

source, calib, out, *method = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
rows = [json.loads(line) for line in open(calib)]
rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
Modifier = GPTQModifier if method == ["gptq"] else QuantizationModifier
recipe = Modifier(targets="Linear", scheme="NVFP4", ignore=["lm_head"])
tokenizer = AutoTokenizer.from_pretrained(source)
oneshot(
    model=model, dataset=Dataset.from_list(rows), recipe=recipe, tokenizer=tokenizer, max_seq_length=512,
    num_calibration_samples=len(rows), shuffle_calibration_samples=False,
)
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
