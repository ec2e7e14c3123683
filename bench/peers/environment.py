"""The Python environment in which peers run: its own, with pinned versions."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
DISTQ = ROOT / "target/release/distq"
SMOLLM2 = CACHE / "smollm2"
GEMMA3 = CACHE / "gemma3"
VERSIONS = [
    "torch==2.14.0", "transformers==5.17.0", "compressed-tensors==0.19.0", "llmcompressor==0.14.0.1",
    "nvidia-modelopt==0.47.0",
]
# llm-compressor asks for an older one, which only its own modifier of that name needs.
AUTOROUND = "auto-round==0.16.1"
# Peers: folder of the output, name, script with what it takes after OUT.
PEERS = {
    "llmcompressor": ("llm-compressor 0.14 max", ["run_llmcompressor.py"]),
    "llmcompressor-gptq": ("llm-compressor 0.14 GPTQ", ["run_llmcompressor.py", "gptq"]),
    "modelopt": ("modelopt 0.47 max", ["run_modelopt.py"]),
    "llmcompressor-imatrix": ("llm-compressor 0.14 expanded imatrix", ["run_llmcompressor.py", "imatrix"]),
    "autoround": ("AutoRound 0.16.1, 200 iterations", ["run_autoround.py"]),
}


def peers_python() -> str:
    """The interpreter of the environment, which is made where it is missing. PEERS_PYTHON names another."""
    if chosen := os.environ.get("PEERS_PYTHON"):
        return chosen
    python = CACHE / "peers/bin/python"
    if not python.exists():
        print("installing the peers' environment (about 6 GB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(CACHE / "peers")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *VERSIONS], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", AUTOROUND], check=True)
    return str(python)


def named(model: Path, number: int) -> str:
    """What files of a model and a calibration set are called after."""
    return str(number) if model == SMOLLM2 else f"{model.name}-{number}"


def calibration(number: int = 0, model: Path = SMOLLM2) -> Path:
    """16 documents cut at 512 tokens, as `model`'s token ids: the same input for every program. Set `number` takes the
    documents from 16 * number on."""
    path = CACHE / f"calib16-{named(model, number)}.jsonl"
    if not path.exists():
        program = (
            "import json,sys; from tokenizers import Tokenizer\n"
            "t=Tokenizer.from_file(sys.argv[1]); lines=open(sys.argv[2],encoding='utf-8').readlines()\n"
            "first=16*int(sys.argv[4]); lines=lines[first:first+16]; assert len(lines)==16\n"
            "out=open(sys.argv[3],'w')\n"
            "for line in lines: out.write(json.dumps({'input_ids':t.encode(json.loads(line)['text']).ids[:512]})+'\\n')\n"
        )
        texts = CACHE / "text/calib_wiki.jsonl"
        subprocess.run([peers_python(), "-c", program, str(model / "tokenizer.json"), str(texts), str(path), str(number)], check=True)
    return path


def made(out: Path, script: str, *arguments: object) -> Path:
    """What a script of this folder writes, from an earlier run where there was one."""
    if not (out / "config.json").exists():
        print("running", script, *(a for a in arguments if not isinstance(a, Path)), flush=True)
        command = [peers_python(), ROOT / "bench/peers" / script, *arguments]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return out


def peer(name: str, number: int, model: Path = SMOLLM2) -> Path:
    """The output of the peer that PEERS calls `name`, for calibration set `number`."""
    out = CACHE / f"peers-output/{named(model, number)}/{name}"
    script, *method = PEERS[name][1]
    return made(out, script, model, calibration(number, model), out, *method)


def view(modelopt: Path) -> Path:
    """A checkpoint in ModelOpt's layout under the names that Transformers knows."""
    out = modelopt.with_name(f"{modelopt.name}-view")
    return made(out, "modelopt_view.py", modelopt, out)


def machine() -> str:
    """The processor's name and the number of cores that this process may use."""
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"
