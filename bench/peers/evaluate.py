"""Perplexity of checkpoints in stock Transformers, on the CPU in BF16.

    evaluate.py TEXT WINDOWS CHECKPOINT...      prints one JSON object a line

TEXT is tokenized as one string without special tokens and cut into windows of 512 tokens that do not
overlap; tokens 1 to 511 of each are scored, with F32 logits. Also reports what Transformers said about
missing or unexpected tensors, and a greedy completion.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, windows, *checkpoints = sys.argv[1:]
for path in checkpoints:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    model.eval()
    ids = tokenizer(open(text, encoding="utf-8").read(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    nll, count = 0.0, 0
    with torch.no_grad():
        for i in range(int(windows)):
            window = ids[None, i * 512 : (i + 1) * 512]
            logits = model(window).logits[0, :-1].float()
            nll += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += 511
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
    print(json.dumps({
        "path": path, "perplexity": torch.tensor(nll / count).exp().item(), "tokens": count, "problems": problems,
        "completion": tokenizer.decode(generated[0], skip_special_tokens=True),
    }), flush=True)
