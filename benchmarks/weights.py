"""What selecting by weights alone costs for an adapter and a dictionary of the size people have.

    python benchmarks/weights.py [--case 7b|small] [--latents N] [--layer L] [--rank R] [--write results/weights.md]

Synthetic, since only shapes count: a LoRA on every linear map of a model of Llama 7B's shape (d = 4096, 32 layers), and
a SAELens dictionary. The whole is the command, `autointerp select --selector weights`, in a process of its own, its
imports included; the floor is a process that reads every byte of adapter and dictionary once. Both are run in turn on
the same threads. Memory is the peak of the resident set, as the kernel counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Threads that spin while they wait make any measurement on a shared machine one of the others' load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MAX_SECONDS, MAX_GIB = 60, 3


@dataclass(frozen=True)
class Shape:
    """Of a Llama-like model."""

    d: int
    layers: int
    mlp: int


SHAPES = {"7b": Shape(4096, 32, 11008), "small": Shape(512, 8, 1376)}
_ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_FLOOR = """
import sys
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
"""


def write_adapter(folder: Path, shape: Shape, rank: int) -> Path:
    """A LoRA of this rank on all linear maps, in bfloat16, its base nowhere."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    draw, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(shape.layers):
        for module in _ADAPTED:
            name = f"base_model.model.model.layers.{layer}.{module}"
            wide, narrow = ("gate", "up"), ("down",)
            out = shape.mlp if any(part in module for part in wide) else shape.d
            into = shape.mlp if any(part in module for part in narrow) else shape.d
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=draw).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (0.01 * torch.randn(out, rank, generator=draw)).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "synthetic/7b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_dictionary(folder: Path, d: int, m: int, layer: int) -> Path:
    """A JumpReLU SAE as SAELens saves it, float32."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    tensors = {"W_enc": torch.randn(d, m, generator=draw), "W_dec": torch.randn(m, d, generator=draw)}
    tensors |= {"b_enc": torch.zeros(m), "b_dec": torch.zeros(d), "threshold": torch.full((m,), 0.1)}
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "prepend_bos": True}
    config = {"architecture": "jumprelu", "d_in": d, "d_sae": m, "dtype": "float32", "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Cost:
    """Of one process and its children."""

    seconds: float
    cpu: float
    peak: float
    """GiB resident."""


def cost(words: list[str]) -> Cost:
    """Runs a process to its end. Measured from a fork of this one, so that each counts its own children only."""
    reader, writer = os.pipe()
    if not os.fork():
        os.close(reader)
        begin = time.perf_counter()
        status = subprocess.run(words, stdout=subprocess.DEVNULL).returncode
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = [time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20]
        os.write(writer, json.dumps(found if not status else None).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = json.loads(pipe.read())
    os.wait()
    if found is None:
        raise SystemExit(f"{' '.join(words)} failed")
    return Cost(*found)


def measure(args: argparse.Namespace, folder: Path) -> str:
    """The table, as Markdown."""
    shape = SHAPES[args.case]
    layer = shape.layers // 2 - 1 if args.layer is None else args.layer
    adapter = write_adapter(folder / "adapter", shape, args.rank)
    sae = write_dictionary(folder / "sae", shape.d, args.latents, layer)
    files = [adapter / "adapter_model.safetensors", sae / "sae_weights.safetensors"]
    command = [sys.executable, "-m", "autointerp", "select", "--selector", "weights", "--run", str(adapter)]
    command += ["--sae", str(sae), "--db", str(folder / "store.duckdb"), "--quiet"]
    lines = ["| run | seconds | CPU seconds | peak GiB | × floor |", "|---|---|---|---|---|"]
    worst, before = Cost(0, 0, 0), os.getloadavg()[0]
    for repeat in range(args.repeats):
        floor = cost([sys.executable, "-c", _FLOOR, *map(str, files)])
        (folder / "store.duckdb").unlink(missing_ok=True)  # else it would find the run done
        whole = cost(command)
        worst = Cost(max(worst.seconds, whole.seconds), max(worst.cpu, whole.cpu), max(worst.peak, whole.peak))
        for name, found in (("floor", floor), ("whole", whole)):
            figures = f"{found.seconds:.1f} | {found.cpu:.1f} | {found.peak:.2f} | {found.seconds / floor.seconds:.0f}"
            lines.append(f"| {name} {repeat + 1} | {figures} |")
            print(lines[-1], file=sys.stderr)
    size = sum(file.stat().st_size for file in files) / 2**30
    within = "within" if worst.seconds < MAX_SECONDS and worst.peak < MAX_GIB else "NOT within"
    load = f"load average {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    return f"""# Selection by weights alone

`python benchmarks/weights.py --case {args.case} --latents {args.latents} --rank {args.rank}`: a LoRA of rank \
{args.rank} on the {len(_ADAPTED) * shape.layers} linear maps of {shape.layers} layers, d = {shape.d}; \
{args.latents:,} latents after layer {layer}; {size:.2f} GiB of files; {os.cpu_count()} cores, {load}. The floor reads \
the files once, from the page cache.

{chr(10).join(lines)}

The worst run is {within} {MAX_SECONDS} s and {MAX_GIB} GiB.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=SHAPES, default="7b")
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--layer", type=int, help="of the dictionary (default: the middle)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = measure(args, Path(folder))
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text)


if __name__ == "__main__":
    main()
