"""Memory of a rank that gets its part of a sharded model: read from the files, against loaded whole and then sharded.

A model folder of random weights in bf16 is generated, whose language model is all but a few MB of it. Four processes
(gloo) are the ranks of a training with `parallelism=fsdp`. Each samples its resident memory every 2 ms, from the moment
when all libraries are imported until it has its weights: anonymous memory, which is its own alone, and all of it. The
latter has the mapped pages of files, of which a machine holds one copy for all ranks and which the system may take
back; it maps some neighbours of each page that is read. The rival is what was done before: the module is loaded whole,
in fp32, and then cut. Wanted are a rank's part and a quarter in anonymous memory, and two thirds of the model in all,
both in fp32. Linux only.

    python benchmarks/streamed_weights.py [--quick] [--json] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from memory import make_model
from report import Report

from nexusgen.memory import tensor_sizes
from nexusgen.model.tensors import iterate_tensors, save_tensors

GB = 1e9
NUM_RANKS = 4
FP32_BYTES = 4
WAYS = ("streamed", "streamed, LoRA", "loaded whole")
SLACK = 1.25  # of a rank's part, in anonymous memory
LARGEST_SHARE = 0.5  # of the whole model in fp32, resident
# Prints the growth of RssAnon and of VmRSS, in bytes: rank, way, folder.
RANK = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from nexusgen.model.weights import load_model
from pipelines.lora import LoraConfig
from pipelines.parallel import shard_module
from pipelines.stages import hollow_stage

rank, way, folder, num_ranks = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
cpu = torch.device("cpu")
shard_module(torch.nn.Linear(8, 8), num_ranks, cpu, torch.bfloat16)  # what the first sharding imports

def now():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line.count(":") == 1)
    return [1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS")]

before = peak = now()
is_over = threading.Event()

def watch():
    global peak
    while not is_over.wait(0.002):
        peak = [max(pair) for pair in zip(peak, now())]

thread = threading.Thread(target=watch)
thread.start()
started = time.monotonic()
if way == "loaded whole":
    module = load_model(folder, ["autoregressive"]).autoregressive
    module.qwen.model.visual = torch.nn.Identity()
    shard_module(module, num_ranks, cpu, torch.bfloat16)
else:
    lora = LoraConfig() if way == "streamed, LoRA" else None
    stage = hollow_stage("ar", folder, "uniform", 0.0, lora, torch.bfloat16)
    shard_module(stage.module, num_ranks, cpu, torch.bfloat16)
    stage.fill(cpu)
seconds = time.monotonic() - started
is_over.set()
thread.join()
print(json.dumps([b - a for a, b in zip(before, peak)] + [seconds]), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo that still holds a tensor would abort the interpreter's own end
"""


def measure(way: str, folder: Path) -> tuple[float, float, float]:
    """The largest growth of a rank, anonymous and resident, in bytes; and the longest time, in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen(
            [*command, str(rank), way, str(folder), str(NUM_RANKS)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(NUM_RANKS)
    ]
    told = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{way}: a rank failed, see above")
    anonymous, resident, seconds = zip(*(json.loads(text) for text in told), strict=True)
    return max(anonymous), max(resident), max(seconds)


def main() -> int:
    """Print the measures; 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a third of the layers: 0.3 GB in fp32 instead of 0.8")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument(
        "--scratch", type=Path, help="where 1.5 GB of files may lie for a while (default: the system's)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = make_model(Path(scratch) / "model", (4 if arguments.quick else 12, 1, 1))
        place = folder / "autoregressive"
        save_tensors(dict(iterate_tensors(place)), place / "bf16.safetensors", torch.bfloat16)
        (place / "bf16.safetensors").replace(place / "model.safetensors")
        sizes = tensor_sizes(folder, "autoregressive")
        whole = FP32_BYTES * sum(count for name, count in sizes if not name.startswith("visual."))
        report.tell("the model in fp32, GB", whole / GB)
        report.tell(f"a rank's part of it, one of {NUM_RANKS}, as a share", 1 / NUM_RANKS)
        for way in WAYS:
            anonymous, resident, seconds = measure(way, folder)
            own = f"{way}: growth of a rank's anonymous memory, as a share"
            in_all = f"{way}: growth of a rank's resident memory, as a share ({seconds:.1f} s)"
            if way == "loaded whole":
                report.tell(own, anonymous / whole)
                report.tell(in_all, resident / whole)
            else:
                report.at_most(own, anonymous / whole, SLACK / NUM_RANKS)
                report.at_most(in_all, resident / whole, LARGEST_SHARE)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
