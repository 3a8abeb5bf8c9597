"""Memory of drawing one picture, whole, offloaded and quantised, and what quantisation does to pictures.

A model folder of random weights is generated, whose decoder is most of it. Its files are in fp32 and it is loaded in
bf16, so that weights are held in anonymous memory, as a GPU would hold them, instead of being mapped from files. Each
way of holding it runs as its own process, whose anonymous memory (RssAnon) is sampled every 2 ms; what a process takes
that draws with the demo's tiny base is subtracted. Wanted are at most the memory plan's figures plus a
quarter, and the same picture with and without offload. Pictures are compared by their peak
signal-to-noise ratio with those in bf16, from the same embeddings and seeds: on random weights, on the demo's base and,
with --model, on a trained model. Linux only.

    python benchmarks/memory.py [--quick] [--json] [--model FOLDER] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from import_export import GB, run_measured
from report import Report
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from nexusgen.base_training import GEOMETRY, TRANSFORMER_SIZES, tiny_decoder_config
from nexusgen.geometry import Geometry
from nexusgen.memory import plan_memory
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.decoder import (
    TRANSFORMER_STEM,
    VisionDecoder,
    released_decoder_config,
    save_decoder,
    write_decoder_config,
)
from nexusgen.model.manifest import demo_base
from nexusgen.model.weights import (
    DRAWING_PARTS,
    load_model,
    load_tokenizer,
    read_autoregressive_config,
    released_key,
    save_autoregressive,
    write_manifest,
)
from nexusgen.sampling import decode_embeddings, predict_embeddings

WIDTH = 1024
WAYS = {"whole": (False, None), "offload": (True, None), "fp8": (False, "fp8"), "offload and fp8": (True, "fp8")}
PROMPTS = ("a red circle", "two blue squares", "a green star and a yellow cross", "three triangles", "a large ring")
SLACK = 1.25  # what may be added to the plan
DRAW = """
import sys, torch
from pathlib import Path
from nexusgen.model.weights import DRAWING_PARTS, load_model
from nexusgen.sampling import generate_images
torch.set_num_threads(1)
folder, out, offload, quantise = sys.argv[1:]
options = {"offload": offload == "True", "quantise": None if quantise == "None" else quantise}
model = load_model(Path(folder), DRAWING_PARTS, torch.bfloat16, **options)
Path(out).write_bytes(generate_images(model, ["a red circle"], [0], steps=2, size=(96, 96))[0].tobytes())
"""


def make_model(folder: Path, num_layers: tuple[int, int, int]) -> Path:
    """The demo's base with networks of random weights, 1,024 wide: layers of the language model, and both of blocks."""
    of_language, double, single = num_layers
    torch.manual_seed(0)
    shutil.copytree(demo_base(), folder)
    tokenizer = load_tokenizer(folder / "autoregressive")
    config = read_autoregressive_config(folder / "autoregressive")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = WIDTH, 4 * WIDTH, of_language
    text.num_attention_heads = text.num_key_value_heads = WIDTH // 128
    text.layer_types = ["full_attention"] * of_language
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    config.vision_config.out_hidden_size = WIDTH
    shutil.rmtree(folder / "autoregressive")
    save_autoregressive(AutoregressiveModel(config, GEOMETRY), folder / "autoregressive", tokenizer, torch.float32)
    shutil.rmtree(folder / "decoders")
    of_decoder = tiny_decoder_config().model_copy(update={"embedding_dim": WIDTH, "context_dim": WIDTH})
    sizes = TRANSFORMER_SIZES | {"num_layers": double, "num_single_layers": single, "attention_head_dim": 128}
    sizes |= {"num_attention_heads": WIDTH // 128, "joint_attention_dim": WIDTH, "axes_dims_rope": (16, 56, 56)}
    save_decoder(VisionDecoder.from_config(of_decoder, sizes), folder / "decoders" / "generation", torch.float32)
    pooled = TRANSFORMER_SIZES["pooled_projection_dim"]
    constants = {"pooled_prompt": torch.randn(1, pooled), "negative_context": torch.randn(1, 8, WIDTH)}
    save_file(constants, folder / "prompt_constants.safetensors")
    write_manifest(folder, geometry=GEOMETRY, image_size=(96, 96), num_inference_steps=8, true_cfg_scale=1.0)
    return folder


def measure_memory(scratch: Path, folder: Path, report: Report) -> None:
    """Peaks of drawing one picture in each way, against the plan; and whether the pictures are the same."""
    empty, _ = run_measured([sys.executable, "-c", DRAW, demo_base(), scratch / "empty", "False", "None"])
    report.tell("libraries and the demo's base, subtracted from what follows: peak anonymous memory, GB", empty)
    pictures = {}
    for name, (offload, quantise) in WAYS.items():
        plan = plan_memory(folder, DRAWING_PARTS, torch.bfloat16, offload=offload, quantise=quantise, size=(96, 96))
        out = scratch / name
        peak, seconds = run_measured([sys.executable, "-c", DRAW, folder, out, str(offload), str(quantise)])
        report.tell(f"{name}: planned, GB", plan.peak / GB)
        report.at_most(f"{name}: peak anonymous memory, GB ({seconds:.0f} s)", peak - empty, SLACK * plan.peak / GB)
        pictures[name] = out.read_bytes()
    for whole, offloaded in (("whole", "offload"), ("fp8", "offload and fp8")):
        differing = sum(a != b for a, b in zip(pictures[whole], pictures[offloaded], strict=True))
        report.at_most(f"{whole}: numbers of its picture that differ under offload", differing, 0)


def draw(folder: Path, dtype: torch.dtype, quantise: str | None, embeddings: Tensor) -> np.ndarray:
    """Pictures of embeddings, as numbers."""
    model = load_model(folder, ["generation_decoder", "vae"], dtype, quantise=quantise)
    pictures = decode_embeddings(model, embeddings.to(dtype), list(range(len(embeddings))))
    return np.stack(pictures).astype(float)


def measure_pictures(name: str, folder: Path, report: Report) -> None:
    """How far pictures of a quantised decoder are from those in bf16; beside it, how far those are from fp32."""
    embeddings = predict_embeddings(load_model(folder, ["autoregressive"], torch.bfloat16), PROMPTS)
    wanted = draw(folder, torch.bfloat16, None, embeddings)
    report.at_least(
        f"{name}: PSNR of fp8 against bf16, dB", psnr(draw(folder, torch.bfloat16, "fp8", embeddings), wanted), 30
    )
    report.tell(f"{name}: PSNR of fp32 against bf16, dB", psnr(draw(folder, torch.float32, None, embeddings), wanted))


def psnr(got: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures of 0..255 together, in dB."""
    error = float(np.square(got - wanted).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def write_hollow(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A safetensors file of bf16 tensors whose numbers are a hole, which takes no room on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def tell_released_plan(folder: Path, report: Report) -> None:
    """The plan for the released sizes: Qwen2.5-VL-7B and FLUX.1 [dev], one picture of 1024x1024 in bf16."""
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        tie_word_embeddings=False,
    )
    of_decoder, sizes = released_decoder_config()
    with torch.device("meta"):
        autoregressive = AutoregressiveModel(config, Geometry()).state_dict()
        decoder = VisionDecoder.from_config(of_decoder, sizes)
        autoencoder = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    shapes = {released_key(name): tensor.shape for name, tensor in autoregressive.items()}
    write_hollow(folder / "autoregressive" / "model.safetensors", shapes)
    config.save_pretrained(folder / "autoregressive")
    place = folder / "decoders" / "generation"
    parts = {"conditioner": decoder.conditioner, f"transformer/{TRANSFORMER_STEM}": decoder.transformer}
    for name, module in parts.items():
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
        write_hollow(place / f"{name}.safetensors", shapes)
    write_decoder_config(of_decoder, place)
    decoder.transformer.to_json_file(place / "transformer" / "config.json")
    shapes = {key: tensor.shape for key, tensor in autoencoder.state_dict().items()}
    write_hollow(folder / "vae" / f"{TRANSFORMER_STEM}.safetensors", shapes)
    autoencoder.save_config(folder / "vae")
    manifest = {
        "parts": DRAWING_PARTS,
        "fingerprints": {},
        "fingerprint": "",
        "geometry": Geometry().model_dump(),
        "image_size": (1024, 1024),
        "num_inference_steps": 50,
        "true_cfg_scale": 3.0,
    }
    (folder / "nexusgen.json").write_text(json.dumps(manifest), encoding="utf-8")
    for name, (offload, quantise) in WAYS.items():
        plan = plan_memory(folder, DRAWING_PARTS, torch.bfloat16, offload=offload, quantise=quantise)
        report.tell(f"plan of the released sizes, {name}, GB", plan.peak / GB)


def main() -> int:
    """Print the measures; 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a third of the blocks: 0.3 GB in bf16 instead of 0.7")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--model", type=Path, help="a trained model's folder, whose pictures are compared too")
    parser.add_argument(
        "--scratch", type=Path, help="where 1.4 GB of files may lie for a while (default: the system's)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = make_model(Path(scratch) / "model", (3, 1, 4) if arguments.quick else (6, 2, 10))
        measure_memory(Path(scratch), folder, report)
        measure_pictures("random weights", folder, report)
        measure_pictures("the demo's base", demo_base(), report)
        if arguments.model is not None:
            measure_pictures("the trained model", arguments.model, report)
        tell_released_plan(Path(scratch) / "released", report)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
