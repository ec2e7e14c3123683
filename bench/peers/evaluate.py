"""Perplexity of checkpoints in stock Transformers, on the CPU.

    evaluate.py TEXT WINDOWS CHECKPOINT... [--dtype float32] [--attention eager] [--threads N]

prints one JSON object a line. TEXT is tokenized as one string without special tokens and cut into windows of 512
tokens that do not overlap; tokens 1 to 511 of each are scored, with F32 logits. Also reports what Transformers
said about missing or unexpected tensors, a greedy completion, and the seconds from loading to the last score.

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
parser.add_argument("--threads", type=int)
args = parser.parse_args()
dtype = getattr(torch, args.dtype)
nvfp4.unpack_fp4_from_uint8 = functools.partial(nvfp4.unpack_fp4_from_uint8, dtype=dtype)
if args.threads:
    torch.set_num_threads(args.threads)
for path in args.checkpoints:
    started = time.time()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=args.attention, output_loading_info=True
    )
    model.eval()
    ids = tokenizer(open(args.text, encoding="utf-8").read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    nll, count = 0.0, 0
    with torch.no_grad():
        for i in range(args.windows):
            window = ids[None, i * 512 : (i + 1) * 512]
            logits = model(window).logits[0, :-1].float()
            nll += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += 511
        seconds = time.time() - started
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
    print(json.dumps({
        "path": path, "perplexity": torch.tensor(nll / count).exp().item(), "tokens": count, "problems": problems,
        "completion": tokenizer.decode(generated[0], skip_special_tokens=True), "seconds": seconds,
    }), flush=True)
