"""llm-compressor's NVFP4 (W4A4) of a checkpoint:   run_llmcompressor.py SOURCE CALIB.jsonl OUT [gptq|imatrix]

Without a word for the method, scales by the maximum; imatrix is its expanded search weighted by mean squared inputs.

On a GPU where there is one. Ends with a line of seconds: loading, calibrating, exporting."""

import json
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

source, calib, out, *method = sys.argv[1:]
times = [time.monotonic()]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
times.append(time.monotonic())
rows = [json.loads(line) for line in open(calib)]
rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
scheme = preset_name_to_scheme("NVFP4", ["Linear"])
if method == ["imatrix"]:
    scheme.weights.observer = "nvfp4_expanded_imatrix"
Modifier = GPTQModifier if method == ["gptq"] else QuantizationModifier
recipe = Modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
if (Path(source) / "tokenizer.json").exists():
    tokenizer = AutoTokenizer.from_pretrained(source)
else:
    # A checkpoint of random weights has none, and token ids need none; oneshot insists.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")
oneshot(
    model=model, dataset=Dataset.from_list(rows), recipe=recipe, tokenizer=tokenizer,
    max_seq_length=max(len(row["input_ids"]) for row in rows), num_calibration_samples=len(rows),
    shuffle_calibration_samples=False,
)
times.append(time.monotonic())
model.save_pretrained(out, save_compressed=True)
times.append(time.monotonic())
tokenizer.save_pretrained(out)
print("seconds", *(round(b - a, 2) for a, b in zip(times, times[1:])))
