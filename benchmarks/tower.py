"""Stored embeddings against the vision tower in the loop, at the released widths: what a step of stage ar saves.

Some layers of the released widths run with random weights on this machine's CPU, in the precision that a training
would take here, and their time is multiplied by how many of them the released model has: the whole doesn't fit. The
batch is the released training's micro-batch, 2 edits: a picture of 504x504 that is shown, a target of 252x252, and 50
tokens of text. The tower runs forwards alone, as it is frozen; the language model backwards, too, and its activations
are computed again, as jobs/configs/7b/train_ar.yaml says.

    python benchmarks/tower.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402 (the project's own folders come first)
from torch import Tensor, nn  # noqa: E402
from transformers import Qwen2_5_VLConfig  # noqa: E402

from benchmarks.report import Report  # noqa: E402
from nexusgen.geometry import Geometry  # noqa: E402
from nexusgen.model.autoregressive import AutoregressiveModel  # noqa: E402
from pipelines.flops import work_of  # noqa: E402
from pipelines.parallel import attention_kernel, recompute_activations, resolve_precision  # noqa: E402

NUM_SAMPLES = 2
NUM_TEXT_TOKENS = 50
GRIDS = ((36, 36), (18, 18))  # in patches: shown, target
NUM_LAYERS, NUM_BLOCKS = 28, 32  # of the released model
GROUP = 8  # blocks of the tower of which one attends to the whole picture
CPU = torch.device("cpu")


def make_model(num_layers: int, num_blocks: int) -> AutoregressiveModel:
    """Qwen2.5-VL-7B's widths with so many layers and blocks, and a small vocabulary; random weights."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": num_blocks,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [GROUP - 1],
        },
        vision_start_token_id=1000,
        vision_end_token_id=1001,
        image_token_id=1002,
        video_token_id=1003,
    )
    return AutoregressiveModel(config, Geometry())


def seconds_of(work: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, after one to warm up."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def measure(report: Report, rounds: int) -> None:
    """Time a layer and a block, multiply, tell."""
    precision = resolve_precision("auto", False)
    torch.manual_seed(0)
    grids = torch.tensor([(1, *grid) for _ in range(NUM_SAMPLES) for grid in GRIDS])
    num_patches = int(grids.prod(dim=1).sum())
    length = NUM_TEXT_TOKENS + sum(height * width // 4 for height, width in GRIDS)
    pixels = torch.randn(num_patches, 3 * 2 * 14 * 14)
    positions = torch.arange(length).expand(3, NUM_SAMPLES, -1)

    def layers_s(num_layers: int) -> float:
        model = make_model(num_layers, 1)
        recompute_activations(model, precision, CPU)
        model.train()
        embeddings = torch.randn(NUM_SAMPLES, length, 3584, requires_grad=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), attention_kernel(precision, CPU):
                hidden: Tensor = model.run_layers(embeddings, positions)
            hidden.float().square().mean().backward()

        return seconds_of(step, rounds)

    def blocks_s(num_blocks: int) -> float:
        model = make_model(1, num_blocks)
        tower = model.qwen.model.visual.eval()

        @torch.no_grad()
        def encode() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), attention_kernel(precision, CPU):
                tower(pixels, grid_thw=grids)

        return seconds_of(encode, rounds)

    layer_s = layers_s(2) - layers_s(1)
    group_s = blocks_s(GROUP)  # with what is before and after the blocks: a little too much, 4 times
    language_s, tower_s = layer_s * NUM_LAYERS, group_s * NUM_BLOCKS / GROUP
    report.tell(f"tokens and patches of the batch, {precision}: {NUM_SAMPLES * length} and", num_patches)
    report.tell("a layer of the language model, forwards twice and backwards, s", layer_s)
    report.tell(f"{GROUP} blocks of the tower, forwards, s", group_s)
    report.tell("the language model of 28 layers, s a step", language_s)
    report.tell("the tower of 32 blocks, s a step", tower_s)
    report.tell("stored embeddings: time saved, share of a step with the tower", tower_s / (language_s + tower_s))
    with torch.device("meta"):
        whole = make_model(NUM_LAYERS, NUM_BLOCKS)
    weights = sum(parameter.numel() for parameter in whole.qwen.model.visual.parameters())
    report.tell("stored embeddings: memory saved, the tower's weights in bf16, GB", 2 * weights / 1e9)
    whole.qwen.model.visual = nn.Identity()
    of_layers = work_of(whole).flops(NUM_SAMPLES * length, NUM_SAMPLES, recomputes=True)
    of_tower = 2 * weights * num_patches
    report.tell("the same by operations: the tower's share of a step with it", of_tower / (of_layers + of_tower))


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    report = Report()
    measure(report, 1 if arguments.quick else 3)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
