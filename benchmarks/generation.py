"""An image's embeddings in one pass, against token by token over the KV cache and against transformers' own `generate`.

All run the same random weights on one thread (or one GPU) and read the same short prompt; the sides take turns, and the
median of several rounds counts. Cost is CPU time on a CPU, wall time on a GPU. A step of the sequential mode may cost
at most 1.2 times a step of stock `generate`, so that one pass isn't compared with a slow loop of our own.

    python benchmarks/generation.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from report import Report
from torch import nn
from transformers import Qwen2_5_VLConfig

from nexusgen.geometry import Geometry
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.positions import conversation_positions
from nexusgen.prompts import IGNORED_LABEL, Conversation
from nexusgen.replies import ImageMode, Prompt, generate_replies

PROMPT_TOKENS = 24
# name -> hidden size, layers, heads, key-value heads, width of the MLP, vocabulary
SHAPES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "hidden 256, 4 layers": (256, 4, 4, 2, 688, 1024),
    "hidden 1024, 12 layers": (1024, 12, 16, 4, 2752, 8192),
    "Qwen2.5-VL-7B": (3584, 28, 28, 4, 18944, 152064),
}


def make_model(shape: str, device: str, dtype: torch.dtype) -> AutoregressiveModel:
    """Random weights; the vision tower, which nothing here uses, has one small block."""
    hidden, layers, heads, kv_heads, width, vocabulary = SHAPES[shape]
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [hidden // heads // 8, hidden // heads * 3 // 16, hidden // heads * 3 // 16],
            },
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 1,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
        },
        vision_start_token_id=vocabulary - 2,
        vision_end_token_id=vocabulary - 3,
        image_token_id=vocabulary - 4,
        video_token_id=vocabulary - 5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoregressiveModel(config, Geometry())
    torch.set_default_dtype(torch.float32)
    return model.eval()


def make_prompt(model: AutoregressiveModel) -> Prompt:
    """Random words, then vision_start: the reply is an image at once."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 500, PROMPT_TOKENS)
    ids[-1] = model.config.vision_start_token_id
    positions, following = conversation_positions(ids, [], model.image_token_id)
    conversation = Conversation(ids, np.full_like(ids, IGNORED_LABEL), positions, following)
    return Prompt(conversation, torch.zeros(0, model.hidden_size))


def cost_of(work: Callable[[], object], on_gpu: bool) -> float:
    """CPU seconds of one call, or wall seconds on a GPU."""
    if on_gpu:
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    before = time.process_time()
    work()
    return time.process_time() - before


def medians(sides: Mapping[str, Callable[[], object]], rounds: int, on_gpu: bool) -> dict[str, float]:
    """The median cost of each side, after a round to warm up; the sides take turns."""
    costs: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            cost = cost_of(work, on_gpu)
            if number:
                costs[name].append(cost)
    return {name: statistics.median(values) for name, values in costs.items()}


def measure(model: AutoregressiveModel, batch: int, rounds: int, on_gpu: bool) -> dict[str, float]:
    """Seconds of reading the prompt alone, and with an image in one pass, token by token, and by stock `generate`.

    `products` are those of the layers' weights with as many vectors as an image has, and nothing else: no pass over all
    positions at once can be cheaper.
    """
    prompts = [make_prompt(model)] * batch
    num_tokens = model.geometry.num_target_tokens + 1  # with vision_end
    device = model.vision_head.weight.device
    ids = torch.from_numpy(np.stack([prompt.conversation.input_ids for prompt in prompts])).to(device)
    steps = model.geometry.num_target_tokens + 2  # what the sequential mode feeds after the prompt

    @torch.no_grad()
    def read() -> None:
        model.run_layers(
            model.embed_tokens(ids[:, :-1]), torch.arange(PROMPT_TOKENS - 1).expand(3, batch, -1).to(device)
        )

    def image(mode: ImageMode) -> Callable[[], object]:
        return lambda: generate_replies(model, prompts, max_new_tokens=num_tokens, image_mode=mode)

    @torch.no_grad()
    def stock() -> None:
        # The prompt, then one step for each token that the sequential mode feeds.
        model.qwen.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=steps,
            max_new_tokens=steps,
        )

    weights = [module.weight for module in model.qwen.model.language_model.modules() if isinstance(module, nn.Linear)]
    rows = {size: torch.ones(batch * num_tokens, size).to(weights[0]) for size in {w.shape[1] for w in weights}}

    @torch.no_grad()
    def products() -> None:
        for weight in weights:
            nn.functional.linear(rows[weight.shape[1]], weight)

    sides = {
        "read": read,
        "products": products,
        "one pass": image(ImageMode.ONE_PASS),
        "sequential": image(ImageMode.SEQUENTIAL),
        "stock": stock,
    }
    return medians(sides, rounds, on_gpu)


def main() -> int:
    """Print the measures; 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available() and not arguments.quick
    shape = "hidden 256, 4 layers" if arguments.quick else "Qwen2.5-VL-7B" if on_gpu else "hidden 1024, 12 layers"
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    wanted = {1: 30.0, 8: None} if on_gpu else {1: None, 8: None} if arguments.quick else {1: 7.0, 8: 12.0}
    report = Report()
    model = make_model(shape, device, dtype)
    steps = model.geometry.num_target_tokens + 2
    alone = 0.0  # what the released code takes for an image: it draws one at a time, token by token
    for batch, ratio in wanted.items():
        cost = measure(model, batch, 1 if arguments.quick else 5, on_gpu)
        name = f"{shape}, batch {batch}"
        # What is compared is the image: the prompt, which all sides read alike, is taken off.
        one_pass, sequential = cost["one pass"] - cost["read"], cost["sequential"] - cost["read"]
        alone = alone or sequential
        report.tell(f"{name}: one pass, ms per image", 1000 * one_pass / batch)
        report.tell(f"{name}: one pass, images/s", batch / one_pass)
        report.tell(f"{name}: matrix products of one pass alone, ms per image", 1000 * cost["products"] / batch)
        report.tell(f"{name}: sequential, ms per image", 1000 * sequential / batch)
        report.tell(f"{name}: sequential, image tokens/s", batch * model.geometry.num_target_tokens / sequential)
        report.tell(f"{name}: sequential in the same batch over one pass, per image", sequential / one_pass)
        report.tell(f"{name}: the same with reading the prompt", cost["sequential"] / cost["one pass"])
        per_image = batch * alone / one_pass
        if ratio is None:
            report.tell(f"{name}: sequential one by one over one pass, per image", per_image)
        else:
            report.at_least(f"{name}: sequential one by one over one pass, per image", per_image, ratio)
        report.tell(f"{name}: sequential one by one over those products, per image", batch * alone / cost["products"])
        # stock generate feeds the whole prompt and then steps - 1 tokens.
        per_step, stock_step = sequential / steps, (cost["stock"] - cost["read"]) / (steps - 1)
        if arguments.quick:
            report.tell(f"{name}: a sequential step over stock generate's", per_step / stock_step)
        else:
            report.at_most(f"{name}: a sequential step over stock generate's", per_step / stock_step, 1.2)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
