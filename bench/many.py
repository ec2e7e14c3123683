"""Many ranks on few cores: a Llama of 512 layers (hidden size 64), `max`, one thread a rank.

    python3 bench/many.py [RANKS...]        (default 16 64 128 512)

Ranks are started with `nice`: while hundreds of them start MPI and look for each other all the time, Open MPI's mpirun,
which has to introduce them, would get a hundredth of a core. Prints a table: what the report says of each run, the time
of the whole `mpirun`, and whether the output has the same bytes as the first one's.
"""

import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import DISTQ, ENVIRONMENT, digests

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 512, 64, 128, 128


def matrix(rows, cols):
    noise = random.Random(rows * cols)
    # The upper half of an F32 is a BF16.
    return [rows, cols], b"".join(struct.pack("<f", noise.gauss(0, cols**-0.5))[2:] for _ in range(rows * cols))


def checkpoint(folder):
    norm = [HIDDEN], b"\x80\x3f" * HIDDEN
    square, wide, narrow = matrix(HIDDEN, HIDDEN), matrix(INTERMEDIATE, HIDDEN), matrix(HIDDEN, INTERMEDIATE)
    layer = {
        "input_layernorm": norm, "post_attention_layernorm": norm, "self_attn.q_proj": square, "self_attn.k_proj": square,
        "self_attn.v_proj": square, "self_attn.o_proj": square, "mlp.gate_proj": wide, "mlp.up_proj": wide,
        "mlp.down_proj": narrow,
    }
    tensors = {f"layers.{i}.{name}": tensor for i in range(LAYERS) for name, tensor in layer.items()}
    tensors |= {"embed_tokens": matrix(VOCABULARY, HIDDEN), "norm": norm}
    header, at = {}, 0
    for name, (shape, data) in tensors.items():
        header[f"model.{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = json.dumps(header).encode()
    data = b"".join(data for _, data in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }))


def documents(path, count):
    ids = random.Random(0)
    lines = [json.dumps({"input_ids": [ids.randrange(VOCABULARY) for _ in range(72)]}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")


def main(all_ranks):
    print("| ranks | tokens | preparing, s | walking, s | expected, s | proving, s | whole command, s | room for a rank, MiB |"
          " peak of a rank, MiB | same bytes |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch, expected = Path(scratch), {}
        model = scratch / "model"
        model.mkdir()
        checkpoint(model)
        for ranks in all_ranks:
            # An equal share of what is left is less than a rank is taken to need by itself; most of that they share.
            memory = ["--memory-per-rank", "128MiB"] if ranks > 256 else []
            for count in (9, 200):
                out, report, data = scratch / "out", scratch / "report.json", scratch / "calib.jsonl"
                documents(data, count)
                started = time.monotonic()
                subprocess.run(
                    ["mpirun", "--oversubscribe", "-np", str(ranks), "nice", "-n", "19", DISTQ, "-q", "quantize", str(model),
                     str(out), "--overwrite", "--method", "max", "--calib", str(data), "--calib-min-tokens", "1", "--report",
                     str(report), *memory], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
                whole, said = time.monotonic() - started, json.loads(report.read_text())
                seconds, made = said["seconds"], digests(out)
                same = "yes" if expected.setdefault(count, made) == made else "NO"
                room = min(rank["machine"]["memory"] for rank in said["ranks"]) / 2**20
                peak = max(rank["peak_resident"] for rank in said["ranks"]) / 2**20
                print(f"| {ranks} | {72 * count:,} | {seconds['prepare']:.1f} | {seconds['walk']:.1f} | "
                      f"{seconds['walk_expected']:.1f} | {seconds['prove']:.1f} | {whole:.1f} | {room:.0f} | {peak:.0f} | "
                      f"{same} |", flush=True)


if __name__ == "__main__":
    main([int(ranks) for ranks in sys.argv[1:]] or [16, 64, 128, 512])
