"""Outputs of nvidia-modelopt or llm-compressor for tiny random models:   tiny_outputs.py modelopt|llmcompressor DIR

The sources' config.json is spelled as Transformers 4 did; the programs run with Transformers 5 and spell it anew.
Writes DIR/source/MODEL and DIR/PROGRAM/MODEL/CONFIGURATION. What is there already is kept."""

import copy
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

SIZES = dict(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    vocab_size=128, max_position_embeddings=256, tie_word_embeddings=False,
)
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
# Configuration class, sizes, and fields as Transformers 4 wrote them.
SOURCES = {
    "llama": (LlamaConfig, {}, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "tied": (
        LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"rope_theta": 10000.0, "rope_scaling": None, "attention_dropout": 0.0, "pretraining_tp": 1},
    ),
    "bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}, {}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 32}, {"rope_theta": 1000000.0}),
}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")
IDS = [[(7 * i + 13 * j) % 128 for i in range(40)] for j in range(4)]


def source(root: Path, name: str) -> Path:
    path = root / "source" / name
    if path.exists():
        return path
    torch.manual_seed(0)
    kind, sizes, older = SOURCES[name]
    model = AutoModelForCausalLM.from_config(kind(**(SIZES | sizes))).to(torch.bfloat16)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for field in ("rope_parameters", "dtype"):
        config.pop(field, None)
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.45.0"} | older
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def modelopt():
    """By configuration: what calibrates a model and writes it to a directory."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    def with_cache(cache):
        config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
        return mtq.utils.update_quant_cfg_with_kv_cache_quant(config, cache["quant_cfg"])

    def mixed():
        config = copy.deepcopy(mtq.NVFP4_MLP_ONLY_CFG)
        for quantizer in ("weight", "input"):
            entry = {"quantizer_name": f"*self_attn*{quantizer}_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
            config["quant_cfg"].append(entry)
        return config

    configurations = {
        "NVFP4_DEFAULT_CFG": mtq.NVFP4_DEFAULT_CFG,
        "W4A16_NVFP4_CFG": mtq.W4A16_NVFP4_CFG,
        "NVFP4_MLP_ONLY_CFG": mtq.NVFP4_MLP_ONLY_CFG,
        "NVFP4_MLP_WEIGHT_ONLY_CFG (blocks of 32)": mtq.NVFP4_MLP_WEIGHT_ONLY_CFG,
        "NVFP4 and an FP8 cache": with_cache(mtq.FP8_KV_CFG),
        "NVFP4 and an NVFP4 cache": with_cache(mtq.NVFP4_KV_CFG),
        "NVFP4 MLP, FP8 attention": mixed(),
    }

    def make(config, path, out):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            mtq.quantize(model, config, lambda model: [model(torch.tensor([ids])) for ids in IDS])
        export_hf_checkpoint(model, export_dir=out)
        TOKENIZER.save_pretrained(out)

    return {name: lambda path, out, config=config: make(config, path, out) for name, config in configurations.items()}


def llmcompressor():
    """As [`modelopt`]."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in IDS])
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    linears = lambda kind=QuantizationModifier, scheme="NVFP4", ignore=(), **more: lambda: kind(
        targets="Linear", scheme=scheme, ignore=["lm_head", *ignore], **more
    )

    def mixed(fp8):
        return lambda: QuantizationModifier(
            config_groups={
                "a": preset_name_to_scheme(fp8, ["re:.*self_attn.*_proj$"]),
                "b": preset_name_to_scheme("NVFP4", ["re:.*mlp.*_proj$"]),
            },
            ignore=["lm_head"],
        )

    recipes = {
        "NVFP4": linears(),
        "NVFP4A16": linears(scheme="NVFP4A16"),
        "NVFP4, GPTQ": linears(kind=GPTQModifier),
        "NVFP4 and an FP8 cache": linears(kv_cache_scheme=cache),
        "NVFP4, expressions in ignore": linears(ignore=["re:.*self_attn.*", r"re:.*layers\.1\..*"]),
        "NVFP4 MLP, dynamic FP8 attention": mixed("FP8_DYNAMIC"),
        "NVFP4 MLP, static FP8 attention": mixed("FP8"),
    }

    def make(recipe, path, out):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        oneshot(
            model=model, dataset=rows, recipe=recipe(), tokenizer=TOKENIZER, max_seq_length=40,
            num_calibration_samples=len(IDS), shuffle_calibration_samples=False,
        )
        model.save_pretrained(out, save_compressed=True)
        TOKENIZER.save_pretrained(out)

    return {name: lambda path, out, recipe=recipe: make(recipe, path, out) for name, recipe in recipes.items()}


def main() -> None:
    program, root = sys.argv[1], Path(sys.argv[2])
    makers = {"modelopt": modelopt, "llmcompressor": llmcompressor}[program]()
    for model in SOURCES:
        # Every configuration of one model, the first two of the others.
        for configuration, make in list(makers.items())[: None if model == "llama" else 2]:
            out = root / program / model / configuration
            if not (out / "config.json").exists():
                make(source(root, model), out)


if __name__ == "__main__":
    main()
