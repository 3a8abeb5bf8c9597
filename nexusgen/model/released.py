"""Between the released layout and ours: `import_model` makes a model folder, `export_model` writes the release back.

The released layout: `config.json`, tokenizer files and safetensors of the autoregressive model with `vision_head` and
`image_prefill_embeds`; `generation_decoder.bin` and `edit_decoder.bin`, mappings of names to tensors; FLUX.1 [dev] for
the autoencoder and the text encoders. Source: Nexus-Gen's released checkpoint (DiffSynth-Studio/Nexus-GenV2).

Tensors keep their bytes and stream from file to file: they are mapped into memory, so no part is ever held whole.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from jaxtyping import Shaped
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

from nexusgen import defaults
from nexusgen.errors import InputError, ModelError
from nexusgen.flow_matching import make_scheduler
from nexusgen.geometry import Geometry
from nexusgen.images import image_processor
from nexusgen.model import flux as flux_files
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import (
    RELEASED_TRANSFORMER,
    TRANSFORMER_STEM,
    ConditionerKind,
    DecoderConfig,
    VisionDecoder,
    read_decoder_config,
    write_decoder_config,
)
from nexusgen.model.decoder_keys import RELEASED_CONDITIONERS, from_released, to_released
from nexusgen.model.flux import State
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.model.prompt_constants import compute_prompt_constants, missing_encoders
from nexusgen.model.tensors import (
    check_tensors,
    copy_weights,
    iterate_file,
    iterate_tensors,
    read_pickled_tensors,
    save_tensors,
    write_weights,
)
from nexusgen.model.weights import (
    DECODER_FOLDERS,
    merger_like,
    read_autoregressive_config,
    released_key,
    write_manifest,
)
from nexusgen.positions import TokenPositions

DECODER_FILES = {"generation_decoder": "generation_decoder.bin", "editing_decoder": "edit_decoder.bin"}
IMAGE_SIZE = (512, 512)  # (height, width) in pixels; what both released decoders were trained at

_KINDS: dict[str, ConditionerKind] = {"generation_decoder": "generation", "editing_decoder": "editing"}
_CONDITIONER, _TRANSFORMER = "conditioner.", "transformer."
_QUERIES = "image_prefill_embeds.weight"
_ADDED = ("vision_head.weight", _QUERIES)  # what Nexus-Gen adds to Qwen2.5-VL
_FIX = (
    "The released layout states no sizes of images: `nexusgen import` takes those of the released model; for others "
    "call import_model with the model's geometry"
)
_LM_HEAD = "lm_head.weight"
_IMAGE_PROCESSOR = "preprocessor_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_SMALL_FILES = (*_TOKENIZER_FILES, "generation_config.json", _IMAGE_PROCESSOR)
_SEED = 0  # of weights that a checkpoint doesn't have


def _say_nothing(_: str) -> None:
    pass


@dataclass(frozen=True)
class _Decoder:
    """A decoder found in released files: its sizes (on meta) and its tensors, mapped, under our names.

    Without a conditioner's tensors it is given fresh ones when it is written.
    """

    model: VisionDecoder
    state: State


# ------------------------------------------------------------------------------------------------------------- import


def import_model(
    out: Path,
    *,
    autoregressive: Path | None = None,
    generation_decoder: Path | None = None,
    editing_decoder: Path | None = None,
    flux: Path | None = None,
    geometry: Geometry | None = None,
    axes_dims_rope: tuple[int, int, int] | None = None,
    merger: MergerConfig | None = None,
    token_positions: TokenPositions | None = None,
    progress: Callable[[str], None] = _say_nothing,
) -> Manifest:
    """Make a model folder from released files; any may be absent. The folder appears whole or not at all.

    `autoregressive` is Nexus-Gen's folder or plain Qwen2.5-VL's, which then gets a fresh vision head and query
    embeddings. `flux` gives the autoencoder and the constants of the empty prompt; without a decoder's file also the
    transformer, for both decoders, under fresh conditioners. The manifest's lineage says what was made up or assumed.

    The released layout doesn't state everything. The sizes of images, and with them the decoders' token grids, are
    those of `geometry`, else the released model's. A transformer's rope axes are those of `axes_dims_rope`, else of
    `flux`'s config, else FLUX.1's shares; a merger's heads those of `merger`, else of the language model, else the
    released. `token_positions` are the generation decoder's, else the released zeros. `progress` is told what comes
    next.

    Raises: InputError if nothing is given or `out` isn't empty; ModelError naming tensors that are missing, left over
    or misshapen, or sizes of parts that don't go together, before anything is written.
    """
    sources = {
        "autoregressive": autoregressive,
        "generation_decoder": generation_decoder,
        "editing_decoder": editing_decoder,
        "flux": flux,
    }
    given = {name: path for name, path in sources.items() if path is not None}
    if not given:
        raise InputError("nothing to import: give the autoregressive model, a decoder's file or FLUX.1-dev's folder")
    for path in given.values():
        if not path.exists():
            raise InputError(f"{path} doesn't exist")
    if flux is not None:
        flux_files.check_folder(flux)
    _refuse_occupied(out)
    geometry = geometry if geometry is not None else Geometry()
    lineage: dict[str, Any] = {"made_by": "nexusgen import", **{name: str(path) for name, path in given.items()}}

    config: Qwen2_5_VLConfig | None = None
    added: State = {}
    if autoregressive is not None:
        config, added = _read_autoregressive(autoregressive, geometry)
    axes = axes_dims_rope or (_axes_of(flux) if flux is not None else None)
    files = {"generation_decoder": generation_decoder, "editing_decoder": editing_decoder}
    decoders = {
        part: _read_decoder(path, _KINDS[part], config, axes, merger, geometry, token_positions)
        for part, path in files.items()
        if path is not None
    }
    flux_sizes = flux_files.transformer_config(flux) if flux is not None else None
    for part, decoder in decoders.items():
        _check_blocks(decoder.model, flux_sizes, f"{files[part]}", f"{flux}")
    transformer = flux_files.read_transformer(flux) if flux is not None and not decoders else None
    autoencoder = flux_files.read_autoencoder(flux) if flux is not None else None
    lacking = missing_encoders(flux) if flux is not None else []
    if transformer is not None:
        decoders = {
            part: _untrained_decoder(kind, config, *transformer, merger, geometry, token_positions)
            for part, kind in _KINDS.items()
        }
    constants = None
    if flux is not None and not lacking:
        progress("computing the constants of the empty prompt")
        constants = compute_prompt_constants(flux)
    for decoder in decoders.values():
        _check_sizes(decoder.model, geometry, config, constants, autoencoder[0] if autoencoder is not None else None)

    lineage |= _remarks(
        {
            "initialised": [*added, *(f"{DECODER_FOLDERS[part]}/conditioner" for part in decoders if transformer)],
            "assumed": [
                *(_assumed_sizes(decoders, axes, flux_sizes) if transformer is None else []),
                *_assumed_settings(decoders, geometry, token_positions),
            ],
            "lacks": _lacks(autoregressive, decoders, autoencoder is not None, constants is not None, lacking),
        }
    )
    with _appearing_whole(out) as folder:
        if autoregressive is not None:
            progress("writing autoregressive")
            _write_autoregressive(autoregressive, added, geometry, folder / "autoregressive")
        for part, decoder in decoders.items():
            progress(f"writing {part}")
            _write_decoder(decoder, folder / DECODER_FOLDERS[part], folder if transformer is not None else None)
        if decoders:
            make_scheduler().save_pretrained(folder / "scheduler")
        if autoencoder is not None:
            autoencoder[0].save_config(folder / "vae")
            write_weights(autoencoder[1], folder / "vae", TRANSFORMER_STEM)
        if constants is not None:
            save_tensors(constants, folder / "prompt_constants.safetensors", torch.float32)
        progress("taking fingerprints")
        return write_manifest(
            folder,
            geometry=geometry,
            image_size=IMAGE_SIZE,
            num_inference_steps=defaults.NUM_INFERENCE_STEPS,
            true_cfg_scale=defaults.GENERATION_TRUE_CFG_SCALE,
            lineage=lineage,
        )


def _read_autoregressive(folder: Path, geometry: Geometry) -> tuple[Qwen2_5_VLConfig, State]:
    """Check a checkpoint; gives its config and the tensors that it lacks because it is plain Qwen2.5-VL's."""
    config = read_autoregressive_config(folder)
    patch_size = config.vision_config.patch_size
    if patch_size != geometry.patch_size:
        raise ModelError(
            f"{folder}: patches of {patch_size} pixels; the geometry's patch_size is {geometry.patch_size}. {_FIX}"
        )
    with torch.device("meta"):
        model = AutoregressiveModel(config, geometry)
    expected = {released_key(name): tensor for name, tensor in model.state_dict().items()}
    state = dict(iterate_tensors(folder))
    if config.tie_word_embeddings and _LM_HEAD not in state:
        del expected[_LM_HEAD]
    added: State = {}
    if not any(name in state for name in _ADDED):
        dtype = next((tensor.dtype for tensor in state.values()), torch.float32)
        added = _fresh_additions(model, dtype)
    queries, num_tokens = state.get(_QUERIES), geometry.num_target_tokens
    if queries is not None and len(queries) != num_tokens:
        raise ModelError(
            f"{folder}: {_QUERIES} has {len(queries)} rows, but an image of the geometry {num_tokens} tokens. {_FIX}"
        )
    check_tensors(expected, {**state, **added}, str(folder))
    return config, added


def _fresh_additions(model: AutoregressiveModel, dtype: torch.dtype) -> State:
    """Vision head and query embeddings as `AutoregressiveModel` starts them, from a fixed seed."""
    generator = torch.Generator().manual_seed(_SEED)
    hidden = model.hidden_size
    head = torch.empty(hidden, hidden).uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)
    queries = torch.empty(model.geometry.num_target_tokens, hidden)
    queries.normal_(std=model.text_config.initializer_range, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in zip(_ADDED, (head, queries), strict=True)}


def _read_decoder(
    path: Path,
    kind: ConditionerKind,
    language_model: Qwen2_5_VLConfig | None,
    axes: tuple[int, int, int] | None,
    merger: MergerConfig | None,
    geometry: Geometry,
    token_positions: TokenPositions | None,
) -> _Decoder:
    """Check a released decoder's file; sizes are read off its tensors."""
    where = str(path)
    released = dict(iterate_file(path)) if path.suffix == ".safetensors" else read_pickled_tensors(path)
    sizes = flux_files.transformer_sizes(released, where, axes)
    first = RELEASED_CONDITIONERS[kind] + ("0.weight" if kind == "generation" else "projector.1.weight")
    wide, embedding_dim = flux_files.tensor_shape(released, first, where)
    if kind == "editing":
        up_projection = f"{RELEASED_CONDITIONERS[kind]}layers.0.mlp.up_proj.weight"
        merger = _merger_config(merger, language_model, embedding_dim, where, geometry).model_copy(
            update={
                "intermediate_size": flux_files.tensor_shape(released, up_projection, where)[0],
                "expand_ratio": wide // sizes["joint_attention_dim"],
            }
        )
    config = _decoder_config(kind, embedding_dim, sizes["joint_attention_dim"], merger, geometry, token_positions)
    with torch.device("meta"):
        decoder = VisionDecoder.from_config(config, sizes)
    check_tensors(to_released(decoder.state_dict(), kind), released, where)
    return _Decoder(decoder, from_released(released))


def _untrained_decoder(
    kind: ConditionerKind,
    language_model: Qwen2_5_VLConfig | None,
    sizes: Mapping[str, Any],
    transformer: State,
    merger: MergerConfig | None,
    geometry: Geometry,
    token_positions: TokenPositions | None,
) -> _Decoder:
    """FLUX.1's transformer under a conditioner that is still to be trained, in the transformer's dtype."""
    embedding_dim = int(language_model.text_config.hidden_size) if language_model is not None else defaults.HIDDEN_SIZE
    if kind == "editing":
        merger = _merger_config(merger, language_model, embedding_dim, "the editing conditioner", geometry)
    config = _decoder_config(kind, embedding_dim, sizes["joint_attention_dim"], merger, geometry, token_positions)
    with torch.device("meta"):
        decoder = VisionDecoder(config, FluxTransformer2DModel.from_config(sizes))
    return _Decoder(decoder, {_TRANSFORMER + name: tensor for name, tensor in transformer.items()})


def _decoder_config(
    kind: ConditionerKind,
    embedding_dim: int,
    context_dim: int,
    merger: MergerConfig | None,
    geometry: Geometry,
    token_positions: TokenPositions | None,
) -> DecoderConfig:
    return DecoderConfig(
        conditioner=kind,
        embedding_dim=embedding_dim,
        context_dim=context_dim,
        token_grid=geometry.target_grid,
        token_positions=(token_positions or "zeros") if kind == "generation" else "grid",
        merger=merger if kind == "editing" else None,
    )


def _merger_config(
    merger: MergerConfig | None,
    language_model: Qwen2_5_VLConfig | None,
    embedding_dim: int,
    where: str,
    geometry: Geometry,
) -> MergerConfig:
    """The merger is a layer like the language model's: its heads and positions are the same."""
    if merger is not None:
        return merger
    if language_model is not None:
        text = language_model.text_config
        assert isinstance(text, Qwen2_5_VLTextConfig)
        return merger_like(text).model_copy(update={"reference_grid": geometry.reference_grid})
    if embedding_dim != defaults.HIDDEN_SIZE:
        raise ModelError(
            f"{where}: embeddings of {embedding_dim} numbers, not the released {defaults.HIDDEN_SIZE}, and the number "
            "of attention heads can't be read off the weights; import the autoregressive model with it, or give merger"
        )
    return MergerConfig(reference_grid=geometry.reference_grid)


def _axes_of(flux: Path) -> tuple[int, int, int] | None:
    config = flux_files.transformer_config(flux)
    if config is None or "axes_dims_rope" not in config:
        return None
    first, rows, columns = config["axes_dims_rope"]
    return first, rows, columns


def _check_blocks(decoder: VisionDecoder, flux_sizes: Mapping[str, Any] | None, where: str, flux: str) -> None:
    """A file that lacks its last blocks looks like a smaller model's. Raises: ModelError if FLUX.1's config differs."""
    if flux_sizes is None:
        return
    found, wanted = _num_blocks(decoder.transformer.config), _num_blocks({**RELEASED_TRANSFORMER, **flux_sizes})
    if found != wanted:
        raise ModelError(
            f"{where}: {found[0]} double and {found[1]} single blocks, but the transformer of {flux} has {wanted[0]} "
            f"and {wanted[1]}: the file is incomplete, or belongs to another model"
        )


def _num_blocks(sizes: Mapping[str, Any]) -> tuple[int, int]:
    return int(sizes["num_layers"]), int(sizes["num_single_layers"])


def _check_sizes(
    decoder: VisionDecoder,
    geometry: Geometry,
    language_model: Qwen2_5_VLConfig | None,
    constants: Mapping[str, Tensor] | None,
    autoencoder: AutoencoderKL | None,
) -> None:
    """Parts of one model must take what the others give. Raises: ModelError."""
    config, sizes = decoder.config, decoder.transformer.config
    if config.merger is not None and config.merger.reference_grid != geometry.reference_grid:
        raise ModelError(
            f"merger's reference_grid is {config.merger.reference_grid}, but a reference of the geometry has "
            f"{geometry.reference_grid} tokens: give the two alike"
        )
    pairs = []
    if autoencoder is not None:
        packed = 4 * autoencoder.config.latent_channels
        pairs.append(("the autoencoder's latents, 2x2 packed into a token", packed, "transformer", sizes.in_channels))
    if language_model is not None:
        hidden = language_model.text_config.hidden_size
        pairs.append(("the language model's embeddings", hidden, "conditioner", config.embedding_dim))
    if constants is not None:
        pooled, context = constants["pooled_prompt"].shape[-1], constants["negative_context"].shape[-1]
        pairs.append(("CLIP's pooled prompt", pooled, "transformer", sizes.pooled_projection_dim))
        pairs.append(("T5's context", context, "transformer", sizes.joint_attention_dim))
    for thing, found, taker, wanted in pairs:
        if found != wanted:
            raise ModelError(
                f"{thing}: {found} numbers, but the {config.conditioner} decoder's {taker} takes {wanted}; the "
                "files belong to different models"
            )


def _assumed_sizes(
    decoders: Mapping[str, _Decoder], axes: tuple[int, int, int] | None, flux_sizes: Mapping[str, Any] | None
) -> list[str]:
    """Sizes of transformers that no file states, where they aren't the released ones."""
    assumed = []
    for part, decoder in decoders.items():
        sizes = decoder.model.transformer.config
        if axes is None and sizes.attention_head_dim != RELEASED_TRANSFORMER["attention_head_dim"]:
            assumed.append(f"{part}: rope axes {tuple(sizes.axes_dims_rope)}")
        blocks = _num_blocks(sizes)
        if flux_sizes is None and blocks != _num_blocks(RELEASED_TRANSFORMER):
            assumed.append(f"{part}: {blocks[0]} double and {blocks[1]} single blocks are all")
    return assumed


def _assumed_settings(
    decoders: Mapping[str, _Decoder], geometry: Geometry, token_positions: TokenPositions | None
) -> list[str]:
    """Settings that the released layout has no place for, where the model isn't of the released geometry."""
    if geometry == Geometry() or not decoders:
        return []
    assumed = [
        f"{part}: token positions {decoder.model.config.token_positions}"
        for part, decoder in decoders.items()
        if part == "generation_decoder" and token_positions is None
    ]
    height, width = IMAGE_SIZE
    sampling = f"scheduler shift {defaults.SCHEDULER_SHIFT}, {defaults.NUM_INFERENCE_STEPS} steps"
    return [*assumed, f"{sampling}, pictures of {height}x{width} pixels"]


def _lacks(
    autoregressive: Path | None,
    decoders: Mapping[str, _Decoder],
    has_autoencoder: bool,
    has_constants: bool,
    missing: Sequence[str],
) -> list[str]:
    """What the folder can't do yet, and why."""
    lacks = []
    if autoregressive is not None and not (autoregressive / "tokenizer_config.json").is_file():
        lacks.append(f"tokenizer ({autoregressive} has none): needed to describe, generate and edit")
    if decoders and not has_autoencoder:
        lacks.append("vae (from --flux): needed to generate and edit")
    if decoders and not has_constants:
        why = f"FLUX.1-dev's folder has no {', '.join(missing)}" if missing else "from --flux"
        lacks.append(f"prompt constants ({why}): needed to generate and edit")
    return lacks


def _remarks(remarks: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {name: texts for name, texts in remarks.items() if texts}


def _write_autoregressive(source: Path, added: State, geometry: Geometry, target: Path) -> None:
    copy_weights(source, target, "model", added)
    for name in ("config.json", *_SMALL_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / _IMAGE_PROCESSOR).is_file():
        image_processor(geometry).save_pretrained(target)


def _write_decoder(decoder: _Decoder, folder: Path, shares_in: Path | None) -> None:
    """Write a decoder's folder. Decoders that start from one transformer share its files inside `shares_in`."""
    folder.mkdir(parents=True)
    write_decoder_config(decoder.model.config, folder)
    conditioner = _under(decoder.state, _CONDITIONER)
    with tempfile.TemporaryDirectory(prefix=".fresh-", dir=folder.parent) as scratch:
        if not conditioner:
            dtype = decoder.state[_TRANSFORMER + "x_embedder.weight"].dtype
            conditioner = _fresh_conditioner(decoder.model.conditioner, dtype, Path(scratch))
        write_weights(conditioner, folder, "conditioner")
    transformer = folder / "transformer"
    first = shares_in / DECODER_FOLDERS["generation_decoder"] / "transformer" if shares_in is not None else transformer
    if first.is_dir():
        shutil.copytree(first, transformer, copy_function=_link_or_copy)
        return
    write_weights(_under(decoder.state, _TRANSFORMER), transformer, TRANSFORMER_STEM)
    decoder.model.transformer.to_json_file(transformer / "config.json")


def _fresh_conditioner(conditioner: torch.nn.Module, dtype: torch.dtype, scratch: Path) -> State:
    """torch's own random weights, from a fixed seed, of a conditioner on meta; they lie in files inside `scratch`.

    A module at a time: whole and in fp32, the released editing conditioner takes 1.5 GB.
    """
    state: State = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for prefix, module in conditioner.named_modules():
            empty = {name: torch.empty(p.shape) for name, p in module.named_parameters(recurse=False)}
            for name, tensor in empty.items():
                setattr(module, name, torch.nn.Parameter(tensor))
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            for name, tensor in empty.items():
                if not hasattr(module, "reset_parameters"):
                    torch.nn.init.ones_(tensor)  # Qwen's norms, the only such modules
                setattr(module, name, torch.nn.Parameter(tensor.to("meta")))
                key = f"{prefix}.{name}"
                state[key] = _in_file(scratch / key, tensor.shape, dtype).copy_(tensor)
    return state


def _in_file(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
    """An empty tensor whose memory is a file's."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).reshape(tuple(shape))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every filesystem has hard links
        shutil.copyfile(source, target)


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------- export


def export_model(model: Path, out: Path, progress: Callable[[str], None] = _say_nothing) -> list[str]:
    """Write a model folder's parts in the released layout, tensors byte for byte; gives the names of the files.

    FLUX.1's own parts (autoencoder, prompt constants) aren't in that layout and stay behind. Room is needed for the
    joined matrices of one decoder beside the result, about half its size; it is freed at the end.
    Raises: InputError if `out` isn't empty; ModelError if `model` is no model folder or has nothing to export.
    """
    manifest = read_manifest(model)
    _refuse_occupied(out)
    parts = [part for part in ("autoregressive", *DECODER_FILES) if part in manifest.parts]
    if not parts:
        raise ModelError(
            f"{model} has nothing of the released layout; it holds {', '.join(manifest.parts) or 'nothing'}"
        )
    with _appearing_whole(out) as folder:
        for part in parts:
            progress(f"writing {part}")
            if part == "autoregressive":
                _export_autoregressive(model / part, folder)
            else:
                _export_decoder(model / DECODER_FOLDERS[part], folder / DECODER_FILES[part])
        return sorted(path.name for path in folder.iterdir())


def _export_autoregressive(source: Path, target: Path) -> None:
    copy_weights(source, target, "model")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(flat_config(config), indent=2) + "\n", encoding="utf-8")
    for name in _SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Qwen2.5-VL config as transformers 4.49 reads it: the language model's fields on top, rope in two fields.

    transformers 5 writes them in `text_config` and `rope_parameters`. A config that is flat already stays as it is.
    """
    if "text_config" not in config:
        return dict(config)
    flat = {**config["text_config"], **{name: value for name, value in config.items() if name != "text_config"}}
    rope = flat.pop("rope_parameters", None)  # late versions of transformers 4 nest, but keep the two fields of rope
    if rope is not None:
        flat["rope_theta"] = rope["rope_theta"]
        flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    dtype = flat.pop("dtype", None)
    flat["torch_dtype"] = dtype if dtype is not None else flat.get("torch_dtype")
    flat["vision_config"] = {name: v for name, v in flat["vision_config"].items() if name != "rope_parameters"}
    return flat


def _export_decoder(folder: Path, file: Path) -> None:
    kind = read_decoder_config(folder).conditioner
    state = {_CONDITIONER + name: tensor for name, tensor in iterate_file(folder / "conditioner.safetensors")}
    state |= {_TRANSFORMER + n: tensor for n, tensor in iterate_tensors(folder / "transformer", TRANSFORMER_STEM)}
    with tempfile.TemporaryDirectory(prefix=".joined-", dir=file.parent) as scratch:
        numbers = itertools.count()

        def join(parts: list[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
            """`torch.cat` into a file: torch.save needs all tensors at once, and memory can't hold these."""
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            return torch.cat(parts, out=_in_file(Path(scratch) / str(next(numbers)), shape, parts[0].dtype))

        torch.save(to_released(state, kind, join), file)


# ------------------------------------------------------------------------------------------------------------- folders


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not an empty folder: choose another, or remove it first")


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`, which becomes `out` at the end, or vanishes with the error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.rename(out)  # replaces an empty folder
    finally:
        shutil.rmtree(staging, ignore_errors=True)
