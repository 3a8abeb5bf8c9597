"""Memory of `nexusgen import` and `nexusgen export` on a generated checkpoint of 8 GB, against their bound.

The checkpoint has the released model's widths and fewer layers: a sharded language model, both decoders' `.bin`,
FLUX.1's text encoders, and FLUX.1 [dev] in its original layout, a file for the transformer and one for the autoencoder.
Each command runs as its own process, whose anonymous memory (RssAnon: what is held, not what is mapped from files) is
sampled every 2 ms. The bound is the largest shard, for a `.bin` or an original file the largest tensor, plus 1 GB.
The other side is the plain way: load the `.bin`, save it again. Linux only.

    python benchmarks/import_export.py [--quick] [--json] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from report import Report
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from nexusgen.geometry import Geometry
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import TRANSFORMER_STEM, ConditionerKind, VisionDecoder, released_decoder_config
from nexusgen.model.decoder_keys import original_name, to_released
from nexusgen.model.flux import AUTOENCODER_FILE, TRANSFORMER_FILE
from nexusgen.model.tensors import iterate_file, iterate_tensors, read_pickled_tensors, write_weights
from nexusgen.model.weights import released_key

GB = 1e9
SHARD_BYTES = 500_000_000
PLAIN = "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"


def random_tensors(shapes: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Small random bf16 numbers for every tensor of a module on meta."""
    return {
        name: torch.randn(tensor.shape, generator=generator).mul_(0.02).bfloat16() for name, tensor in shapes.items()
    }


def make_autoregressive(folder: Path, shrink: int, generator: torch.Generator) -> None:
    """Qwen2.5-VL-7B's widths over `shrink`, 2 layers, 2 vision blocks, a vocabulary of 32,000."""
    hidden = 3584 // shrink
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 18944 // shrink,
            "num_hidden_layers": 2,
            "num_attention_heads": 28 // shrink,
            "num_key_value_heads": 4 // shrink,
            "vocab_size": 32_000,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={"depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": hidden},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoregressiveModel(config, Geometry())
    state = {released_key(name): tensor for name, tensor in model.state_dict().items()}
    write_weights(random_tensors(state, generator), folder, "model", SHARD_BYTES)
    config.save_pretrained(folder)


def transformer_sizes(shrink: int) -> dict[str, Any]:
    """FLUX.1's widths over `shrink`, 1 double and 3 single blocks."""
    _, sizes = released_decoder_config()
    sizes |= {"num_attention_heads": 24 // shrink, "joint_attention_dim": 4096 // shrink}
    return sizes | {"num_layers": 1, "num_single_layers": 3}


def make_decoder(path: Path, kind: ConditionerKind, shrink: int, generator: torch.Generator) -> None:
    """A decoder's `.bin` with the released widths over `shrink`."""
    config, _ = released_decoder_config(kind)
    changes: dict[str, Any] = {"embedding_dim": 3584 // shrink, "context_dim": 4096 // shrink}
    if kind == "editing":
        changes["merger"] = MergerConfig(
            intermediate_size=18944 // shrink, num_attention_heads=28 // shrink, num_key_value_heads=4 // shrink
        )
    with torch.device("meta"):
        decoder = VisionDecoder.from_config(config.model_copy(update=changes), transformer_sizes(shrink))
    torch.save(random_tensors(to_released(decoder.state_dict(), kind), generator), path)


def make_original(
    folder: Path, flux: Path, shrink: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FLUX.1 [dev] in Black Forest Labs' layout, with the text encoders of `flux`.

    Gives the tensors of its transformer and of its autoencoder with diffusers' names.
    """
    folder.mkdir()
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (folder / name).symlink_to(flux / name)
    with torch.device("meta"):
        shapes = FluxTransformer2DModel(**transformer_sizes(shrink)).state_dict()
        of_autoencoder = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).state_dict()
    transformer, autoencoder = random_tensors(shapes, generator), random_tensors(of_autoencoder, generator)
    released = to_released({f"transformer.{name}": tensor for name, tensor in transformer.items()})
    original = {original_name(name): tensor for name, tensor in released.items()}
    for name in original:
        if name.startswith("final_layer.adaLN_modulation"):  # shift and scale, in the other order
            original[name] = original[name].roll(len(original[name]) // 2, 0)
    save_file(original, folder / TRANSFORMER_FILE)
    save_file(dict(map(original_of_autoencoder, autoencoder.items())), folder / AUTOENCODER_FILE)
    return transformer, autoencoder


def original_of_autoencoder(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """A tensor of a 4-level autoencoder with the name and shape that FLUX.1's own file has for it."""
    name, tensor = item
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{3 - int(found[1])}", name)
    if "attentions.0" in name:
        tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = name.replace("group_norm", "norm").replace("to_out.0", "proj_out").replace("attentions.0", "attn_1")
        name = re.sub(r"to_([qkv])", r"\1", name)
    for ours, theirs in (
        ("down_blocks", "down"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block", "mid"),
        ("resnets", "block"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        name = name.replace(ours, theirs)
    return name, tensor


def make_flux(folder: Path, shrink: int, generator: torch.Generator) -> None:
    """FLUX.1's small parts and its transformer's config; its text encoders with 2 layers, T5's widths over `shrink`."""
    with torch.device("meta"):  # the weights come from the decoders' files
        FluxTransformer2DModel(**transformer_sizes(shrink)).save_config(folder / "transformer")
    AutoencoderKL(latent_channels=16, shift_factor=0.1).save_pretrained(folder / "vae")
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, eos_token_id=3
    )
    t5 = T5Config(
        d_model=4096 // shrink,
        d_kv=64,
        num_heads=64 // shrink,
        d_ff=10240 // shrink,
        num_layers=2,
        vocab_size=32_128,
        feed_forward_proj="gated-gelu",
    )
    for cls, config, name in ((CLIPTextModel, clip, "text_encoder"), (T5EncoderModel, t5, "text_encoder_2")):
        with torch.device("meta"):
            shapes = dict(cls(config).named_parameters())
        shapes.pop("encoder.embed_tokens.weight", None)
        write_weights(random_tensors(shapes, generator), folder / name, "model", SHARD_BYTES)
        config.save_pretrained(folder / name)
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_2")


def run_measured(command: Sequence[str | Path]) -> tuple[float, float]:
    """Run a process; gives its peak anonymous memory in GB and its seconds. Raises: RuntimeError if it fails."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([str(part) for part in command], env=environment, stdout=sys.stderr) as process:
        status = Path(f"/proc/{process.pid}/status")
        peak = 0
        while process.poll() is None:
            lines = status.read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return peak * 1024 / GB, time.monotonic() - started


def num_differing(got: Iterable[tuple[str, Tensor]], want: Mapping[str, Tensor]) -> int:
    """Tensors that aren't there, are too many, or differ in a byte."""
    found = dict(got)
    same = [
        name in found
        and found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        for name, tensor in want.items()
    ]
    return same.count(False) + len(set(found) - set(want))


def largest_tensor(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Bytes of the largest of some tensors."""
    return max(tensor.nbytes for _, tensor in tensors)


def measure(scratch: Path, shrink: int, report: Report) -> None:
    """Generate, import, export, compare."""
    generator = torch.Generator().manual_seed(0)
    source, flux, original = scratch / "autoregressive", scratch / "flux", scratch / "original"
    file, edit_file = scratch / "generation_decoder.bin", scratch / "edit_decoder.bin"
    make_autoregressive(source, shrink, generator)
    make_decoder(file, "generation", shrink, generator)
    make_decoder(edit_file, "editing", shrink, generator)
    make_flux(flux, shrink, generator)
    transformer, autoencoder = make_original(original, flux, shrink, generator)
    of_source = [path.stat().st_size for path in source.glob("*.safetensors")]
    of_flux = [path.stat().st_size for path in flux.rglob("*.safetensors")]
    of_files = {path: largest_tensor(read_pickled_tensors(path).items()) for path in (file, edit_file)}
    of_original = largest_tensor(iterate_file(original / TRANSFORMER_FILE))
    loose = [file, edit_file, original / TRANSFORMER_FILE, original / AUTOENCODER_FILE]
    total = sum(of_source) + sum(of_flux) + sum(path.stat().st_size for path in loose)
    report.at_least("size of the checkpoint, GB", total / GB, 8.0 if shrink == 1 else 0.6)

    from_files: list[str | Path] = ["--generation-decoder", file, "--editing-decoder", edit_file]
    parts: dict[str, tuple[list[str | Path], int]] = {
        "language model": (["--autoregressive", source], max(of_source)),
        "generation decoder's .bin": (["--generation-decoder", file], of_files[file]),
        "with the editing decoder's .bin": (
            ["--autoregressive", source, "--editing-decoder", edit_file],
            max(*of_source, of_files[edit_file]),
        ),
        "all with FLUX.1": (
            ["--autoregressive", source, *from_files, "--flux", flux],
            max(*of_source, *of_flux, *of_files.values()),
        ),
        "FLUX.1's original layout": (
            ["--autoregressive", source, "--flux", original],
            max(*of_source, *of_flux, of_original),
        ),
    }
    of_bin = 0.0
    for number, (name, (arguments, largest)) in enumerate(parts.items()):
        model, out, bound = scratch / f"model{number}", scratch / f"out{number}", largest / GB + 1
        peak, seconds = run_measured([sys.executable, "-m", "jobs.import_model", *arguments, "--out", model])
        report.at_most(f"import, {name}: peak anonymous memory, GB ({seconds:.0f} s)", peak, bound)
        of_bin = peak if name == "generation decoder's .bin" else of_bin
        differing = 0
        if original in arguments:  # which can't be exported: its conditioners are fresh
            place = model / "decoders" / "generation" / "transformer"
            differing += num_differing(iterate_tensors(place, TRANSFORMER_STEM), transformer)
            differing += num_differing(iterate_tensors(model / "vae", TRANSFORMER_STEM), autoencoder)
            report.at_most(f"{name}: tensors that differ after import", differing, 0)
            continue
        peak, seconds = run_measured([sys.executable, "-m", "jobs.export", model, "--out", out])
        report.at_most(f"export, {name}: peak anonymous memory, GB ({seconds:.0f} s)", peak, bound)
        if source in arguments:
            differing += num_differing(iterate_tensors(out), dict(iterate_tensors(source)))
        for path in (path for path in (file, edit_file) if path in arguments):
            exported = read_pickled_tensors(out / path.name)
            differing += num_differing(exported.items(), read_pickled_tensors(path))
        report.at_most(f"{name}: tensors that differ after import and export", differing, 0)
        shutil.rmtree(model)
        shutil.rmtree(out)
    peak, seconds = run_measured([sys.executable, "-c", PLAIN, file, scratch / "plain.bin"])
    name = f"plain torch.load and save of the .bin: peak anonymous memory, GB ({seconds:.0f} s)"
    if shrink == 1:
        report.at_least(name, peak, of_bin)
    else:
        report.tell(name, peak)  # a small file weighs less than the libraries that import it


def main() -> int:
    """Print the measures; 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a quarter of the widths: 0.9 GB instead of 8")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--scratch", type=Path, help="where 16 GB of files may lie for a while (default: the system's)")
    arguments = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        measure(Path(scratch), 4 if arguments.quick else 1, report)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
