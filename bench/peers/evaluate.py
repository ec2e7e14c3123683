"""Perplexity of checkpoints in stock Transformers.

    evaluate.py TEXT WINDOWS CHECKPOINT... [--dtype float32] [--attention eager] [--device cuda] [--complete]

prints one JSON object a line. TEXT is tokenized as one string without special tokens and cut into windows of 512
tokens that do not overlap; tokens 1 to 511 of each are scored, with F32 logits. Four windows go through the model
together, which takes less time than one by one. Also reports what Transformers said about missing or unexpected tensors, the seconds from loading to the last score, by the clock and of all cores together, and
with --complete a greedy completion.

compressed-tensors dequantizes weights to BF16 whatever the model's dtype, which rounds them; with float32 it is
told to dequantize them exactly, as an engine's FP4 product does.
"""

import argparse
import functools
import json
import time

import torch
from compressed_tensors.compressors.nvfp4 import base as nvfp4
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("text")
parser.add_argument("windows", type=int)
parser.add_argument("checkpoints", nargs="+")
parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
parser.add_argument("--device", default="cpu")
parser.add_argument("--complete", action="store_true")
args = parser.parse_args()
dtype = getattr(torch, args.dtype)
nvfp4.unpack_fp4_from_uint8 = functools.partial(nvfp4.unpack_fp4_from_uint8, dtype=dtype)
for path in args.checkpoints:
    started, cpu_started = time.time(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=args.attention, output_loading_info=True
    )
    model.to(args.device).eval()
    ids = tokenizer(open(args.text, encoding="utf-8").read(), add_special_tokens=False, return_tensors="pt").input_ids[0].to(args.device)
    nll, count = 0.0, 0
    with torch.no_grad():
        for windows in ids[: args.windows * 512].view(-1, 512).split(4):
            logits = model(windows).logits[:, :-1].float()
            nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()
            count += windows[:, 1:].numel()
        seconds, cpu_seconds = time.time() - started, time.process_time() - cpu_started
        completion = None
        if args.complete:
            prompt = tokenizer("The capital of France is", return_tensors="pt").to(args.device)
            generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
            completion = tokenizer.decode(generated[0], skip_special_tokens=True)
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
    print(json.dumps({
        "path": path, "perplexity": torch.tensor(nll / count).exp().item(), "tokens": count, "problems": problems,
        "completion": completion, "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }), flush=True)
