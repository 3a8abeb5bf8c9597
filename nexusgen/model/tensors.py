"""Named tensors in files: reading whole folders of safetensors, writing, and loading them strictly into a module."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nexusgen.errors import ModelError

_NUM_SHOWN = 12


def load_strictly(module: torch.nn.Module, state: Mapping[str, Shaped[Tensor, ...]], where: str) -> None:
    """Assign a state dict that must fit exactly. Raises: ModelError naming missing, unexpected or misshapen tensors."""
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:_NUM_SHOWN])
        more = f"; and {len(problems) - _NUM_SHOWN} more" if len(problems) > _NUM_SHOWN else ""
        raise ModelError(f"{where}: the weights don't fit the model: {shown}{more}")
    module.load_state_dict(dict(state), assign=True)


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: those of its index, or its single file. Raises: ModelError without any.

    `stem` is `model` in transformers' folders and `diffusion_pytorch_model` in diffusers'.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {index.name} names {', '.join(missing)}, which the folder lacks")
        return [folder / name for name in names]
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    raise ModelError(f"{folder}: neither {single.name} nor {index.name}")


def iterate_tensors(folder: Path, stem: str = "model") -> Iterator[tuple[str, Shaped[Tensor, ...]]]:
    """Names and tensors of a folder's safetensors files, one at a time. Raises: ModelError if a file is damaged."""
    for path in weight_files(folder, stem):
        yield from iterate_file(path)


def iterate_file(path: Path) -> Iterator[tuple[str, Shaped[Tensor, ...]]]:
    """Names and tensors of one safetensors file, one at a time. Raises: ModelError if it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from None


def save_tensors(state: Mapping[str, Shaped[Tensor, ...]], path: Path, dtype: torch.dtype) -> None:
    """One safetensors file, floating tensors in `dtype`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous().clone()
        for name, tensor in state.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
