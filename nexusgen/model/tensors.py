"""Named tensors in files: reading whole folders of safetensors, writing, and loading them strictly into a module.

What is read here is mapped into memory, not copied: a tensor's bytes stay in its file's pages, which the system may
drop again, until something computes with them. So a dictionary of all tensors of a 50 GB checkpoint costs no memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nexusgen.errors import ModelError

_NUM_SHOWN = 12


def load_strictly(module: torch.nn.Module, state: Mapping[str, Shaped[Tensor, ...]], where: str) -> None:
    """Assign a state dict that must fit exactly. Raises: ModelError naming missing, unexpected or misshapen tensors."""
    check_tensors(module.state_dict(), state, where)
    module.load_state_dict(dict(state), assign=True)


def check_tensors(
    expected: Mapping[str, Shaped[Tensor, ...]], state: Mapping[str, Shaped[Tensor, ...]], where: str
) -> None:
    """Compare names and shapes; either side may be on meta. Raises: ModelError naming every kind of difference."""
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


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: those of its index, or its single file. Raises: ModelError without any.

    `stem` is `model` in transformers' folders and `diffusion_pytorch_model` in diffusers'.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a readable index of tensors: {error!r}") from None
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{index} names {', '.join(outside)}: wanted names of files in its own folder")
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
    _save(tensors, path)


def read_pickled_tensors(path: Path) -> dict[str, Shaped[Tensor, ...]]:
    """A file that `torch.save` made of a flat mapping of names to tensors.

    Raises: ModelError if it can't be read, or holds anything but tensors: such a file is refused, its code never runs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises almost anything
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ModelError(f"{path} can't be read as a checkpoint of plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{path}: expected a flat mapping of names to tensors")
    return state


def write_weights(
    state: Mapping[str, Shaped[Tensor, ...]], folder: Path, stem: str, max_file_bytes: int = 5_000_000_000
) -> None:
    """Write tensors as they are, mapped from files or not, into one file, or into several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_file_bytes
    )
    for file, names in split.filename_to_tensors.items():
        _save({name: state[name].contiguous() for name in names}, folder / file)
    if split.is_sharded:
        _write_index(folder, stem, split.tensor_to_filename, int(split.metadata["total_size"]))


def copy_weights(source: Path, target: Path, stem: str, extra: Mapping[str, Shaped[Tensor, ...]] | None = None) -> None:
    """Copy a folder's safetensors files, and its index, byte for byte; `extra` tensors become one more file.

    Raises: ModelError if the folder has no such files or one is damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = weight_files(source, stem)
    count = len(files) + bool(extra)
    numbered = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    copies = numbered if count > 1 else [f"{stem}.safetensors"]
    for file, copy in zip(files, copies, strict=False):
        shutil.copyfile(file, target / copy)
    if extra:
        _save(extra, target / copies[-1])
    if count > 1:
        tensors = [(name, copy, tensor) for copy in copies for name, tensor in iterate_file(target / copy)]
        _write_index(target, stem, {name: copy for name, copy, _ in tensors}, sum(t.nbytes for _, _, t in tensors))


def _save(tensors: Mapping[str, Shaped[Tensor, ...]], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone; model folders are shared


def _write_index(folder: Path, stem: str, weight_map: Mapping[str, str], num_bytes: int) -> None:
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
