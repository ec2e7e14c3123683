"""A checkpoint with random weights of a well-known shape and any number of layers, to time quantization with.

    python make_checkpoint.py SHAPE LAYERS OUT       SHAPE: a name of SHAPES below        (needs torch and safetensors)

Also writes OUT/calib.jsonl: 256 documents of 150 to 1200 random token ids (about 166,000 tokens).
"""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {  # family, hidden, intermediate, heads, kv heads, features of a head, vocabulary
    "123b": ("Mistral", 12288, 28672, 96, 8, 128, 32768),
    "70b": ("Llama", 8192, 28672, 64, 8, 128, 128256),
    "8b": ("Llama", 4096, 14336, 32, 8, 128, 128256),
    "qwen3-32b": ("Qwen3", 5120, 25600, 64, 8, 128, 151936),
    "gemma3-27b": ("Gemma3", 5376, 21504, 32, 16, 128, 262208),
}


def main() -> None:
    shape, layers, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    family, hidden, intermediate, heads, kv_heads, dim, vocab = SHAPES[shape]
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        noise = torch.randn(rows, cols, generator=generator, device=device, dtype=torch.bfloat16)
        return (noise / cols**0.5).cpu()

    index, total = {}, 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(t.numel() * 2 for t in tensors.values())

    files = layers + 1
    file = lambda i: f"model-{i:05}-of-{files:05}.safetensors"
    # Gemma multiplies by one plus the weight.
    gamma = 0.0 if family == "Gemma3" else 1.0
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "Gemma3":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    head_norms = ["self_attn.q_norm", "self_attn.k_norm"] if family in ("Qwen3", "Gemma3") else []

    def norm(features: int) -> torch.Tensor:
        return torch.full((features,), gamma, dtype=torch.bfloat16)

    ends = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": norm(hidden)}
    if family != "Gemma3":
        ends["lm_head.weight"] = matrix(vocab, hidden)
    save(file(1), ends)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        save(file(layer + 2), {
            **{f"{prefix}{name}.weight": norm(hidden) for name in norms},
            **{f"{prefix}{name}.weight": norm(dim) for name in head_norms},
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
    if family == "Gemma3":
        config |= {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 168,
                   "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                   "tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    numbers = random.Random(0)
    with open(out / "calib.jsonl", "w") as lines:
        for _ in range(256):
            length = numbers.randint(150, 1200)
            lines.write(json.dumps({"input_ids": [numbers.randrange(vocab) for _ in range(length)]}) + "\n")


if __name__ == "__main__":
    main()
