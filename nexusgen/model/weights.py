"""Model folders: names of weights, reading, writing and fingerprints. safetensors only, never pickle.

Layout (what `register` publishes, `serve` loads, and plain transformers and diffusers open) stands in the README of
this folder; `nexusgen.json` (the `Manifest`) says which parts are present, their fingerprints and the image sizes.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from jaxtyping import Shaped
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

from nexusgen.errors import ModelError
from nexusgen.geometry import Geometry
from nexusgen.images import image_processor
from nexusgen.model.autoencoder import ImageAutoencoder, load_autoencoder
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.conditioners import MergerConfig
from nexusgen.model.decoder import (
    DecoderConfig,
    Quantisation,
    VisionDecoder,
    decoder_tensors,
    hollow_decoder,
    load_decoder,
    make_conditioner,
    read_decoder_config,
    save_decoder,
)
from nexusgen.model.manifest import Manifest, Numerics, read_manifest
from nexusgen.model.tensors import check_tensors, iterate_file, iterate_tensors, load_strictly, save_tensors
from nexusgen.prompts import load_tokenizer
from nexusgen.schema import MANIFEST_NAME

PARTS = ("autoregressive", "generation_decoder", "editing_decoder", "vae")
DRAWING_PARTS = ("autoregressive", "generation_decoder", "vae")  # what a picture of a text needs
DECODER_FOLDERS = {"generation_decoder": "decoders/generation", "editing_decoder": "decoders/editing"}
State = dict[str, Shaped[Tensor, "..."]]
Half = Literal["autoregressive", "drawing"]
HALVES: Mapping[Half, tuple[str, ...]] = {"autoregressive": ("autoregressive",), "drawing": (*DECODER_FOLDERS, "vae")}
# Files beside the weights that change an answer.
_SMALL_FILES = (
    "autoregressive/config.json",
    "autoregressive/tokenizer.json",
    "autoregressive/tokenizer_config.json",
    "autoregressive/added_tokens.json",
    "autoregressive/special_tokens_map.json",
    "autoregressive/vocab.json",
    "autoregressive/merges.txt",
    "decoders/generation/conditioner.json",
    "decoders/generation/transformer/config.json",
    "decoders/editing/conditioner.json",
    "decoders/editing/transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "prompt_constants.safetensors",
)
VISION_TOWER = "qwen.model.visual."  # its tensors in `AutoregressiveModel`
_FIRST_LAYER = "model.layers.0."  # of the language model, in its folder
_SEED = 0  # of weights that training makes from nothing
_C_LIBRARY = ctypes.CDLL(None)
_WRITTEN_BY = ("transformers_version", "_diffusers_version", "_name_or_path")  # in a config, of no consequence
_RELEASED_TO_MODULE = (
    (re.compile(r"^visual\."), "qwen.model.visual."),
    (re.compile(r"^model\."), "qwen.model.language_model."),
    (re.compile(r"^lm_head\."), "qwen.lm_head."),
)
_MODULE_TO_RELEASED = (
    (re.compile(r"^qwen\.model\.visual\."), "visual."),
    (re.compile(r"^qwen\.model\.language_model\."), "model."),
    (re.compile(r"^qwen\.lm_head\."), "lm_head."),
)


@dataclass
class Model:
    """A loaded model folder; parts that are absent, or weren't asked for, are None.

    An offloaded model holds one half at a time, the language model or what draws: `use` names the one that is needed,
    and the parts of the other are None until it is used.
    """

    folder: Path
    manifest: Manifest
    parts: tuple[str, ...] = ()  # that were asked for
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    numerics: Numerics = "reference"
    quantise: Quantisation | None = None
    is_offloaded: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    autoregressive: AutoregressiveModel | None = None
    generation_decoder: VisionDecoder | None = None
    editing_decoder: VisionDecoder | None = None
    autoencoder: ImageAutoencoder | None = None
    scheduler: FlowMatchEulerDiscreteScheduler | None = None
    pooled_prompt: Shaped[Tensor, "1 pooled"] | None = None  # CLIP of the empty prompt, a constant of the model
    negative_context: Shaped[Tensor, "1 tokens context"] | None = None  # T5 of the empty prompt, for two-pass guidance
    _half: Half | None = None  # that an offloaded model holds

    def use(self, half: Half) -> None:
        """Have a half in the device's memory. Of an offloaded model the other one leaves it first.

        What leaves rests in its files, which the system keeps in main memory while there is room; it is loaded anew,
        so the caller mustn't keep references to the other half's parts. Raises: ModelError as `load_model`.
        """
        if not self.is_offloaded or self._half == half:
            return
        self.autoregressive = self.generation_decoder = self.editing_decoder = self.autoencoder = None
        self._half = None
        gc.collect()  # modules refer to each other in circles
        give_back_memory(self.device)
        self._load(HALVES[half])
        self._half = half

    def _load(self, parts: Iterable[str]) -> None:
        """Load those of some parts that were asked for."""
        for part in (part for part in parts if part in self.parts):
            if part == "autoregressive":
                folder = self.folder / "autoregressive"
                self.autoregressive = load_autoregressive(folder, self.manifest.geometry, self.dtype, self.device)
            elif part == "vae":
                self.autoencoder = load_autoencoder(self.folder / "vae", self.dtype, self.device)
            else:
                folder = self.folder / DECODER_FOLDERS[part]
                setattr(self, part, load_decoder(folder, self.dtype, self.device, self.numerics, self.quantise))


def give_back_memory(device: torch.device | str) -> None:
    """What was freed goes back to the system: torch keeps a GPU's memory, glibc keeps small pieces of main memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(_C_LIBRARY, "malloc_trim"):
        _C_LIBRARY.malloc_trim(0)


def module_key(released: str) -> str:
    """A released checkpoint's key as a name in `AutoregressiveModel`."""
    return _rename(released, _RELEASED_TO_MODULE)


def released_key(module: str) -> str:
    """A name in `AutoregressiveModel` as the released checkpoint's key."""
    return _rename(module, _MODULE_TO_RELEASED)


def _rename(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def load_model(
    folder: Path,
    parts: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    offload: bool = False,
    quantise: Quantisation | None = None,
    numerics: Numerics | None = None,
) -> Model:
    """Load a model folder, or some of its parts, for inference.

    With `offload` nothing large is loaded yet: `Model.use` does it, one half at a time. `quantise` makes the decoders'
    transformers small; `numerics` replaces the manifest's.
    Raises: ModelError if the folder isn't a model, lacks a part asked for, a file of it can't be read, or tensors are
    missing or left over.
    """
    manifest = read_manifest(folder)
    wanted = tuple(parts) if parts is not None else manifest.parts
    check_parts(folder, manifest, wanted)
    model = Model(
        folder,
        manifest,
        wanted,
        dtype,
        device,
        numerics if numerics is not None else manifest.numerics,
        quantise,
        offload,
    )
    if "autoregressive" in wanted:
        model.tokenizer = load_tokenizer(folder / "autoregressive")
    if set(wanted) & set(DECODER_FOLDERS):
        path = folder / "prompt_constants.safetensors"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no prompt_constants.safetensors, which its decoders need; import the model again with "
                "--flux and a FLUX.1-dev folder that holds the text encoders and tokenizers"
            )
        constants = {name: tensor.to(device, dtype) for name, tensor in iterate_file(path)}
        if "pooled_prompt" not in constants:
            raise ModelError(f"{path} lacks pooled_prompt, which the decoders need: import the model again with --flux")
        model.pooled_prompt = constants["pooled_prompt"]
        model.negative_context = constants.get("negative_context")
        model.scheduler = _load_scheduler(folder / "scheduler")
    if not offload:
        model._load(wanted)
    return model


def _load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    path = folder / "scheduler_config.json"
    try:
        config = FlowMatchEulerDiscreteScheduler.load_config(folder, local_files_only=True)
        if not isinstance(config, dict):
            raise ModelError(f"{path} is not a scheduler's config: expected an object")
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is not a scheduler's config: {error}") from None


def check_parts(folder: Path, manifest: Manifest, wanted: Iterable[str]) -> None:
    """Raises: ModelError naming the parts that a model folder lacks."""
    absent = [part for part in wanted if part not in manifest.parts]
    if absent:
        raise ModelError(f"{folder} has no part {', '.join(absent)}; it holds {', '.join(manifest.parts) or 'nothing'}")


def load_hollow(folder: Path, part: str, others: Sequence[str] = ()) -> tuple[Model, State]:
    """A model folder whose `part` is to be trained: that part on meta, and the tensors that it starts from.

    A training lays the part over its devices first and fills it then, so that no process ever holds all of it. The
    tensors have the part's own names and the dtypes of their files, which they are mapped from; `others` are loaded, in
    fp32. An editing decoder may be absent from the folder: see `start_editing_decoder`.
    Raises: ModelError if the folder lacks a part, or tensors are missing, left over or misshapen.
    """
    manifest = read_manifest(folder)
    is_new = _starts_anew(manifest, part)
    check_parts(folder, manifest, (*DRAWING_PARTS, *others) if is_new else (part, *others))
    model = load_model(folder, ("generation_decoder" if is_new else part, *others), offload=True)
    model.parts, model.is_offloaded = (part, *others), False
    model._load(others)
    module = hollow_part(folder, manifest, part)
    setattr(model, part, module)
    if part == "autoregressive":
        state, where = autoregressive_tensors(folder / part), folder / part
    elif is_new:
        assert isinstance(module, VisionDecoder)
        state, where = _editing_start(folder, module.config), folder
    else:
        where = folder / DECODER_FOLDERS[part]
        state = decoder_tensors(where)
    check_tensors(module.state_dict(), state, str(where))
    return model, state


def hollow_part(folder: Path, manifest: Manifest, part: str) -> AutoregressiveModel | VisionDecoder:
    """A part that can be trained, on meta: its sizes without its weights. Raises: ModelError as `load_hollow`."""
    if part == "autoregressive":
        return hollow_autoregressive(folder / part, manifest.geometry)
    if not _starts_anew(manifest, part):
        return hollow_decoder(folder / DECODER_FOLDERS[part], manifest.numerics)
    generation = hollow_decoder(folder / DECODER_FOLDERS["generation_decoder"], manifest.numerics)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(generation.transformer.config)
        return VisionDecoder(editing_decoder_config(folder, manifest), transformer, manifest.numerics).eval()


def _starts_anew(manifest: Manifest, part: str) -> bool:
    return part == "editing_decoder" and part not in manifest.parts


def start_editing_decoder(folder: Path) -> Model:
    """What a training of the editing decoder starts from, with autoencoder, scheduler and constants, in fp32.

    It is the folder's own editing decoder; a folder without one lends its generation decoder's transformer, trained or
    not, to a new conditioner. That conditioner's layer begins as the language model's first layer and its projector at
    random, the same every time. Source: Nexus-Gen, `train/decoder/editing_trainer.py`, which takes the transformer of
    FLUX.1 [dev] and the layer of Qwen2.5-VL.
    Raises: ModelError if the folder has neither decoder, lacks another part, or the layer doesn't fit.
    """
    model, state = load_hollow(folder, "editing_decoder", ("vae",))
    assert model.editing_decoder is not None
    load_strictly(model.editing_decoder, {name: tensor.float() for name, tensor in state.items()}, str(folder))
    return model


def _editing_start(folder: Path, config: DecoderConfig) -> State:
    """The tensors of a new editing decoder. Those of its conditioner's projector alone are in memory, not mapped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        conditioner = make_conditioner(config)
    state = {f"conditioner.{name}": tensor for name, tensor in conditioner.state_dict().items()}
    for name, tensor in iterate_tensors(folder / "autoregressive"):
        if name.startswith(_FIRST_LAYER):
            state[f"conditioner.layers.0.{name.removeprefix(_FIRST_LAYER)}"] = tensor
    generation = decoder_tensors(folder / DECODER_FOLDERS["generation_decoder"])
    return state | {name: tensor for name, tensor in generation.items() if name.startswith("transformer.")}


def editing_decoder_config(folder: Path, manifest: Manifest) -> DecoderConfig:
    """The config of the editing decoder that starts from a folder's generation decoder. Raises: ModelError."""
    text_config = read_autoregressive_config(folder / "autoregressive").text_config
    assert isinstance(text_config, Qwen2_5_VLTextConfig)
    merger = merger_like(text_config).model_copy(update={"reference_grid": manifest.geometry.reference_grid})
    generation = read_decoder_config(folder / DECODER_FOLDERS["generation_decoder"])
    return generation.model_copy(update={"conditioner": "editing", "token_positions": "grid", "merger": merger})


def merger_like(text_config: Qwen2_5_VLTextConfig) -> MergerConfig:
    """An editing conditioner whose layer is one of this language model: the same heads and rotary positions."""
    rope: dict[str, Any] = text_config.rope_parameters
    return MergerConfig(
        intermediate_size=text_config.intermediate_size,
        num_attention_heads=text_config.num_attention_heads,
        num_key_value_heads=text_config.num_key_value_heads,
        rms_norm_eps=text_config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        mrope_section=tuple(rope["mrope_section"]),
    )


def load_autoregressive(
    folder: Path, geometry: Geometry, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoregressiveModel:
    """Load the released layout: `config.json` beside one or several safetensors files with the released key names.

    Raises: ModelError naming every missing and unexpected tensor.
    """
    model = hollow_autoregressive(folder, geometry)
    state = {name: tensor.to(device, dtype) for name, tensor in autoregressive_tensors(folder).items()}
    load_strictly(model, state, str(folder))
    if model.config.tie_word_embeddings:
        model.qwen.tie_weights()
    return model.to(device)  # the rotary tables


def hollow_autoregressive(folder: Path, geometry: Geometry) -> AutoregressiveModel:
    """The autoregressive model of a folder without its weights, on meta; rotary tables are there, on the CPU.

    Raises: ModelError if the folder has no config of a Qwen2.5-VL model.
    """
    config = read_autoregressive_config(folder)
    with torch.device("meta"):
        model = AutoregressiveModel(config, geometry)
    if config.tie_word_embeddings:
        model.qwen.tie_weights()
    _rebuild_rotary_tables(model)
    return model.eval()


def autoregressive_tensors(folder: Path) -> State:
    """The tensors of a folder in the released layout, mapped from their files, under `AutoregressiveModel`'s names.

    Raises: ModelError if a file is absent or damaged.
    """
    state = {module_key(name): tensor for name, tensor in iterate_tensors(folder)}
    embed_tokens = state.get("qwen.model.language_model.embed_tokens.weight")
    if embed_tokens is not None and read_autoregressive_config(folder).tie_word_embeddings:
        state.setdefault("qwen.lm_head.weight", embed_tokens)  # the smaller Qwen2.5-VL store one matrix for both
    return state


def _rebuild_rotary_tables(model: torch.nn.Module) -> None:
    """Rotary tables are derived from the config, not stored: fill those that the meta device left empty."""
    for module in model.modules():
        table = getattr(module, "inv_freq", None)
        if isinstance(table, Tensor) and table.is_meta:
            fresh: Any = type(module)(module.config)  # transformers' rotary modules
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.inv_freq.clone()


def read_autoregressive_config(folder: Path) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL config in the flat style of transformers 4.49 or the style of Qwen's hub files."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json of a Qwen2.5-VL model")
    try:
        return Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a config of Qwen2.5-VL: {error!r}") from None


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of tensors, whatever their order."""

    def digest_of(named: tuple[str, Tensor]) -> str:
        name, tensor = named
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python to others
        digests = list(pool.map(digest_of, tensors))
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def save_autoregressive(
    model: AutoregressiveModel, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    """Write `autoregressive/`: released key names, config, tokenizer and image processor files.

    Weights that the folder has already, in one file or several, are replaced: an index left over would win over them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    state = {released_key(name): tensor for name, tensor in model.state_dict().items()}
    save_tensors(state, folder / "model.safetensors", dtype)
    model.config.dtype = dtype
    model.config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(model.geometry).save_pretrained(folder)


def write_manifest(folder: Path, **values: Any) -> Manifest:
    """Fingerprint the parts found in a model folder and write its `nexusgen.json`."""
    fingerprints = _part_fingerprints(folder)
    parts = tuple(part for part in PARTS if part in fingerprints)
    manifest = Manifest(parts=parts, fingerprints=fingerprints, fingerprint="", **values)
    # Whatever changes an answer: weights, small files beside them, sizes and defaults; not the lineage.
    settings = manifest.model_dump(mode="json", exclude={"lineage", "version", "fingerprint", "token_counts"})
    settings["files"] = {name: _file_digest(folder / name) for name in _SMALL_FILES if (folder / name).is_file()}
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    grids = {"target": manifest.geometry.target_grid, "reference": manifest.geometry.reference_grid}
    token_counts = {role: height * width for role, (height, width) in grids.items()}
    manifest = manifest.model_copy(update={"fingerprint": whole[:16], "token_counts": token_counts})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _file_digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name.endswith("config.json"):
        config = {name: value for name, value in json.loads(content).items() if name not in _WRITTEN_BY}
        content = json.dumps(config, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def check_fingerprints(folder: Path, *, may_lack_parts: bool = False) -> None:
    """Compare a model folder's weights with what its manifest says. Raises: ModelError."""
    wanted = {part: digest for part, digest in read_manifest(folder).fingerprints.items() if part != "vision"}
    found = _part_fingerprints(folder, has_language_model=not may_lack_parts)
    for part, digest in wanted.items():
        if found.get(part) != digest and not (may_lack_parts and part not in found):
            raise ModelError(
                f"the weights of {part} in {folder} aren't those of its {MANIFEST_NAME}: their fingerprint is "
                f"{found.get(part)}, wanted {digest}; copy or register the model again"
            )


def _part_fingerprints(folder: Path, *, has_language_model: bool = True) -> dict[str, str]:
    fingerprints = {}
    if has_language_model and (folder / "autoregressive").is_dir():
        tensors = dict(iterate_tensors(folder / "autoregressive"))
        fingerprints["autoregressive"] = tensors_fingerprint(tensors.items())
        fingerprints["vision"] = tensors_fingerprint((n, t) for n, t in tensors.items() if n.startswith("visual."))
    for part, place in (*DECODER_FOLDERS.items(), ("vae", "vae")):
        if (folder / place).is_dir():
            files = sorted((folder / place).rglob("*.safetensors"))
            fingerprints[part] = tensors_fingerprint((f"{f.stem}/{n}", t) for f in files for n, t in iterate_file(f))
    return fingerprints


def part_identity(folder: Path, part: str) -> str:
    """What two model folders have in common if a part of theirs gives the same answers, 16 digits: sha256 over the
    part's fingerprint (and that of the autoencoder, of a decoder), the small files beside it, sizes and defaults.
    Raises: ModelError.
    """
    manifest = read_manifest(folder)
    parts, places = [part], [f"{part}/"]
    if part in DECODER_FOLDERS:
        parts, places = [part, "vae"], [f"{DECODER_FOLDERS[part]}/", "vae/", "scheduler/", "prompt_constants"]
    settings = manifest.model_dump(
        mode="json", include={"geometry", "image_size", "num_inference_steps", "true_cfg_scale", "numerics"}
    )
    settings["fingerprints"] = {name: manifest.fingerprints.get(name) for name in parts}
    files = [name for name in _SMALL_FILES if name.startswith(tuple(places)) and (folder / name).is_file()]
    settings["files"] = {name: _file_digest(folder / name) for name in files}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def assemble_model(
    base: Path,
    out: Path,
    *,
    autoregressive: Path | None = None,
    generation_decoder: Path | None = None,
    editing_decoder: Path | None = None,
    lineage: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> Manifest:
    """Make a model folder from a base and trained weights; the folder appears whole or not at all.

    Each part is a safetensors file with the trained module's own tensor names, or None: the base's own. Tensors that
    training left alone (the frozen vision tower) may be absent and are taken from the base. A base without an editing
    decoder gets one of the sizes that `start_editing_decoder` gives it.
    Raises: ModelError if a trained tensor has no place in the base.
    """
    manifest = read_manifest(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shutil.copytree(base, staging, dirs_exist_ok=True)
        if autoregressive is not None:
            model = load_autoregressive(base / "autoregressive", manifest.geometry)
            load_trained(model, autoregressive)
            save_autoregressive(model, staging / "autoregressive", load_tokenizer(base / "autoregressive"), dtype)
        if generation_decoder is not None:
            decoder = load_decoder(base / DECODER_FOLDERS["generation_decoder"])
            load_trained(decoder, generation_decoder)
            save_decoder(decoder, staging / DECODER_FOLDERS["generation_decoder"], dtype)
        if editing_decoder is not None:
            started = start_editing_decoder(base).editing_decoder
            assert started is not None
            load_trained(started, editing_decoder)
            save_decoder(started, staging / DECODER_FOLDERS["editing_decoder"], dtype)
        values = manifest.model_dump(exclude={"version", "parts", "fingerprints", "fingerprint", "lineage"})
        result = write_manifest(staging, lineage=dict(lineage), **values)
        if out.exists():
            shutil.rmtree(out)
        staging.chmod(0o755)
        staging.rename(out)
        return result
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_trained(module: torch.nn.Module, path: Path) -> None:
    """Give a module the weights that training left in a file; what it left alone may be absent there.

    Raises: ModelError if a trained tensor has no place in the module.
    """
    state = dict(module.state_dict())
    trained = load_file(path)
    unexpected = [name for name in trained if name not in state]
    if unexpected:
        raise ModelError(f"{path} holds tensors that the base has no place for: {', '.join(unexpected[:12])}")
    load_strictly(module, {**state, **trained}, str(path))
