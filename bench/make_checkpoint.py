"""A checkpoint with random weights of a well-known shape and any number of layers, to time quantization with.

    python make_checkpoint.py SHAPE LAYERS OUT       SHAPE: 123b, 70b or 8b        (needs torch and safetensors)

Also writes OUT/calib.jsonl: 256 documents of 150 to 1200 random token ids (about 166,000 tokens).
"""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {  # family, hidden, intermediate, heads, kv heads, vocabulary
    "123b": ("Mistral", 12288, 28672, 96, 8, 32768),
    "70b": ("Llama", 8192, 28672, 64, 8, 128256),
    "8b": ("Llama", 4096, 14336, 32, 8, 128256),
}


def main() -> None:
    shape, layers, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    family, hidden, intermediate, heads, kv_heads, vocab = SHAPES[shape]
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        noise = torch.randn(rows, cols, generator=generator, device=device, dtype=torch.bfloat16)
        return (noise / cols**0.5).cpu()

    dim = hidden // heads
    index, total = {}, 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * 2 for t in tensors.values())

    files = layers + 1
    file = lambda i: f"model-{i:05}-of-{files:05}.safetensors"
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    save(file(1), {
        "model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": ones, "lm_head.weight": matrix(vocab, hidden),
    })
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        save(file(layer + 2), {
            prefix + "input_layernorm.weight": ones.clone(),
            prefix + "post_attention_layernorm.weight": ones.clone(),
            prefix + "self_attn.q_proj.weight": matrix(heads * dim, hidden),
            prefix + "self_attn.k_proj.weight": matrix(kv_heads * dim, hidden),
            prefix + "self_attn.v_proj.weight": matrix(kv_heads * dim, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, heads * dim),
            prefix + "mlp.gate_proj.weight": matrix(intermediate, hidden),
            prefix + "mlp.up_proj.weight": matrix(intermediate, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, intermediate),
        })
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    config = {
        "architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": dim, "num_hidden_layers": layers, "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }
    if family == "Mistral":
        config["sliding_window"] = None
    (out / "config.json").write_text(json.dumps(config, indent=1))
    numbers = random.Random(0)
    with open(out / "calib.jsonl", "w") as lines:
        for _ in range(256):
            length = numbers.randint(150, 1200)
            lines.write(json.dumps({"input_ids": [numbers.randrange(vocab) for _ in range(length)]}) + "\n")


if __name__ == "__main__":
    main()
