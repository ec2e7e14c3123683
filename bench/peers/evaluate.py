"""Perplexity of checkpoints in stock Transformers, and their KL divergence from a reference.

    evaluate.py TEXT WINDOWS CHECKPOINT... [--reference SOURCE] [--dtype float32] [--attention eager] [--device cuda]
                [--complete]

prints one JSON object a line. TEXT is tokenized as one string without special tokens and cut into windows of 512
tokens that do not overlap; before each come the tokens that the tokenizer puts before every text (Gemma's <bos>, without
which its predictions are worthless; nothing for SmolLM2). All tokens but the first of a window are scored, with F32
logits. Four windows go through the model together, which takes less time than one by one. With --reference also the KL
divergence from it in nats a token (mean and 99th percentile) and how often both prefer the same token. Also reports
what Transformers said about missing or unexpected tensors, the seconds from loading to the last score, by the clock and
of all cores together, and with --complete a greedy completion.

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
parser.add_argument("--reference")
parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
parser.add_argument("--device", default="cpu")
parser.add_argument("--complete", action="store_true")
args = parser.parse_args()
dtype = getattr(torch, args.dtype)
nvfp4.unpack_fp4_from_uint8 = functools.partial(nvfp4.unpack_fp4_from_uint8, dtype=dtype)


def load(path: str):
    """The model and what Transformers says of its tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=args.attention, output_loading_info=True
    )
    return model.to(args.device).eval(), info


def compare(logits: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of a window: the KL divergence of a model from the reference, and whether both prefer the same token."""
    mine, p = logits.float().log_softmax(-1), theirs.float().log_softmax(-1)
    return (p.exp() * (p - mine)).sum(-1), mine.argmax(-1) == p.argmax(-1)


device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
reference = load(args.reference)[0] if args.reference else None
for path in args.checkpoints:
    started, cpu_started = time.time(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = load(path)
    ids = tokenizer(open(args.text, encoding="utf-8").read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    first = torch.tensor(tokenizer("").input_ids, dtype=ids.dtype)
    text = torch.stack([torch.cat([first, window]) for window in ids[: args.windows * 512].view(-1, 512)]).to(args.device)
    nll, count, kl, same = 0.0, 0, [], []
    with torch.no_grad():
        for windows in text.split(4):
            logits = model(windows).logits[:, :-1]
            theirs = reference(windows).logits[:, :-1] if reference else None
            for i, window in enumerate(windows):
                nll += torch.nn.functional.cross_entropy(logits[i].float(), window[1:], reduction="sum").item()
                count += len(window) - 1
                if reference:
                    divergence, agreed = compare(logits[i], theirs[i])
                    kl.append(divergence)
                    same.append(agreed)
        seconds, cpu_seconds = time.time() - started, time.process_time() - cpu_started
        completion = None
        if args.complete:
            prompt = tokenizer("The capital of France is", return_tensors="pt").to(args.device)
            generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
            completion = tokenizer.decode(generated[0], skip_special_tokens=True)
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
    against = {}
    if reference:
        kl, same = torch.cat(kl).double().sort().values, torch.cat(same).double()
        p99 = kl[-(-len(kl) * 99 // 100) - 1]
        against = {"mean_kl": kl.mean().item(), "p99_kl": p99.item(), "top1": same.mean().item()}
    print(json.dumps({
        "path": path, "perplexity": torch.tensor(nll / count).exp().item(), "tokens": count, "problems": problems,
        "completion": completion, "seconds": seconds,
        "cpu_seconds": cpu_seconds, "device": device, **against,
    }), flush=True)
