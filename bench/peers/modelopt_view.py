"""A ModelOpt checkpoint under compressed-tensors names, so that Transformers can load it.

    modelopt_view.py SOURCE OUT

Codes and block scales keep their bytes, global scales are inverted.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

source, out = map(Path, sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
tensors = {}
for name, value in load_file(source / "model.safetensors").items():
    module, _, kind = name.rpartition(".")
    if kind == "weight_scale_2":
        tensors[f"{module}.weight_global_scale"] = (1 / value.float()).reshape(1)
    elif kind == "input_scale":
        tensors[f"{module}.input_global_scale"] = (1 / value.float()).reshape(1)
    elif kind == "weight" and value.dtype.is_floating_point is False:
        tensors[f"{module}.weight_packed"] = value
    else:
        tensors[name] = value
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
config = json.loads((source / "config.json").read_text())
args = dict(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
config["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "kv_cache_scheme": None,
    "config_groups": {"group_0": {
        "targets": ["Linear"], "format": "nvfp4-pack-quantized", "output_activations": None,
        "weights": args | {"dynamic": False}, "input_activations": args | {"dynamic": "local"},
    }},
}
(out / "config.json").write_text(json.dumps(config, indent=1))
for file in source.glob("*token*"):
    shutil.copy(file, out)
