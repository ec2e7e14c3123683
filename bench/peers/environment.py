"""The Python environment in which peers run: its own, with pinned versions."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
DISTQ = ROOT / "target/release/distq"
SMOLLM2 = CACHE / "smollm2"
VERSIONS = [
    "torch==2.14.0", "transformers==5.17.0", "compressed-tensors==0.19.0", "llmcompressor==0.14.0.1",
    "nvidia-modelopt==0.47.0",
]


def peers_python() -> str:
    """The interpreter of the environment, which is made where it is missing. PEERS_PYTHON names another."""
    if chosen := os.environ.get("PEERS_PYTHON"):
        return chosen
    python = CACHE / "peers/bin/python"
    if not python.exists():
        print("installing the peers' environment (about 6 GB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(CACHE / "peers")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *VERSIONS], check=True)
    return str(python)


def calibration(number: int = 0) -> Path:
    """16 documents cut at 512 tokens, as token ids: the same input for every program. Set `number` takes the
    documents from 16 * number on."""
    path = CACHE / f"calib16-{number}.jsonl"
    if not path.exists():
        program = (
            "import json,sys; from tokenizers import Tokenizer\n"
            "t=Tokenizer.from_file(sys.argv[1]); lines=open(sys.argv[2],encoding='utf-8').readlines()\n"
            "first=16*int(sys.argv[4]); lines=lines[first:first+16]; assert len(lines)==16\n"
            "out=open(sys.argv[3],'w')\n"
            "for line in lines: out.write(json.dumps({'input_ids':t.encode(json.loads(line)['text']).ids[:512]})+'\\n')\n"
        )
        texts = CACHE / "text/calib_wiki.jsonl"
        subprocess.run([peers_python(), "-c", program, str(SMOLLM2 / "tokenizer.json"), str(texts), str(path), str(number)], check=True)
    return path


def machine() -> str:
    """The processor's name and the number of cores that this process may use."""
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"
