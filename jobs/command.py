"""What all commands share: how arguments become a configuration, where output goes, and which exit code an error has.

A command is a module of this package with NAME, HELP, `add_arguments` and `run`. Such a module imports the packages
that do the work inside `run`, so that `nexusgen --help` and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from nexusgen import __version__
from nexusgen.errors import InputError, NexusgenError, ResourceError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from nexusgen.config import Config
    from nexusgen.model.weights import Model
    from pipelines.runtime import JobReport

    ConfigT = TypeVar("ConfigT", bound=Config)

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
DEMO_CONFIGS = Path(__file__).parent / "configs" / "demo"
DEFAULT_STORAGE = "runs/demo"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of pictures that a command writes

MAX_UNIT = 3  # letters beside a number
MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383}  # pixels; libjpeg's and libwebp's limits

# Set before the libraries are imported, in this process and those that it starts; what the user has set stays.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_TRAIN_ENABLE_CONTROLLER_LOGGING": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # lines of its C++ core about what its own libraries do
}


@dataclass(frozen=True)
class Outcome:
    """What a command prints: `text` for people, or `data` as one JSON object with --json."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = EXIT_DONE


class Command(Protocol):
    """A module that is a command."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's own arguments."""

    def run(self, arguments: argparse.Namespace) -> Outcome:
        """Do the work. Raises: NexusgenError or OSError, shown as one line."""
        ...


def main(commands: Sequence[Any], argv: Sequence[str] | None = None) -> int:
    """Parse a command line made of `commands`, run one of them and return the exit code."""
    parser = argparse.ArgumentParser(prog="nexusgen", description="Nexus-Gen on Ray: from tar shards to HTTP answers.")
    parser.add_argument("--version", action="version", version=f"nexusgen {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    try:
        arguments, extra = parser.parse_known_args(argv)
        if "overrides" in arguments:  # argparse gives up on key=value after an option
            arguments.overrides += [text for text in extra if "=" in text and not text.startswith("-")]
            extra = [text for text in extra if text not in arguments.overrides]
        if extra:
            parser.error(f"unrecognized arguments: {' '.join(extra)}")
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    return execute(arguments)


def main_of(command: Any) -> int:
    """`python -m jobs.NAME ...`: the same as `nexusgen NAME ...`."""
    return main([command], [command.NAME, *sys.argv[1:]])


def execute(arguments: argparse.Namespace) -> int:
    """Run a parsed command: print its outcome, or its error as one line."""
    _be_quiet()
    try:
        if not getattr(arguments, "json", False):
            outcome = arguments.run(arguments)
            if outcome.text:
                print(outcome.text, flush=True)
        else:
            with _only_json() as out:
                outcome = arguments.run(arguments)
                print(json.dumps(_plain(outcome.data), ensure_ascii=False), file=out, flush=True)
    except NexusgenError as error:
        _complain(str(error))
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor may the interpreter complain when it flushes at the end
        return EXIT_FAILED
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        _complain("interrupted; started again, a job goes on from what is finished")
        return EXIT_INTERRUPTED
    except Exception as error:
        service = type(error).__module__.partition(".")[0]
        if service not in ("mlflow", "ray") or hasattr(error, "cause"):
            raise  # a fault of ours, or one that a worker passes on: the traceback tells where
        _complain(f"{service} failed ({type(error).__name__}): {error}")
        return EXIT_FAILED
    return int(outcome.exit_code)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """--json: one object on standard output, everything else on standard error."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...]."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see jobs/configs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the file, dotted if nested"
    )


def read_config(cls: type[ConfigT], arguments: argparse.Namespace) -> ConfigT:
    """The configuration that the command line names. Raises: ConfigError."""
    from nexusgen.config import load_config

    return load_config(cls, arguments.config, arguments.overrides)


def add_model_arguments(parser: argparse.ArgumentParser, draws: bool = True) -> None:
    """Which model a command uses, how it is held, and how it samples; one that doesn't draw takes all options, too."""
    idle = "" if draws else "; changes nothing here: no picture is drawn, and answers are the likeliest ones"
    parser.add_argument(
        "--model",
        metavar="MODEL",
        default="models:/nexusgen@champion",
        help="a model folder, demo-base, models:/nexusgen@ALIAS or models:/nexusgen/VERSION (default: %(default)s)",
    )
    parser.add_argument(
        "--storage", metavar="URI", default=DEFAULT_STORAGE, help="where registered models are (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of weights (default: bf16 on cuda, fp32 on the cpu)")
    parser.add_argument("--seed", type=_seed, default=0, help=f"of the picture's noise (default: %(default)s){idle}")
    parser.add_argument("--steps", type=_positive, help=f"denoising steps (default: the model's own){idle}")
    parser.add_argument(
        "--size", type=_size, metavar="HEIGHTxWIDTH", help=f"of the picture in pixels (default: the model's own){idle}"
    )
    add_json_argument(parser)


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """-o OUT.png, and how the model that draws it is held: see `draw_picture`."""
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    parser.add_argument(
        "--offload", action="store_true", help="hold one half of the model at a time: language model, or what draws"
    )
    parser.add_argument("--quantise", choices=("fp8",), help="a byte for each number in the decoder's blocks")
    parser.add_argument(
        "--numerics", choices=("reference", "exact"), help="how a decoder in bf16 rounds (default: the model's own)"
    )


def find_model(arguments: argparse.Namespace) -> Path:
    """The folder of the model that `add_model_arguments` names. Raises: InputError, ModelError or UsageError."""
    from pipelines import registry, storage, tracking

    # Looking a name up would make an empty registry where there is none.
    if arguments.model.startswith("models:/") and not storage.is_remote(arguments.storage):
        uri = tracking.mlflow_uri(arguments.storage)
        database = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not database.exists():
            raise InputError(
                f"--model {arguments.model}: the storage {arguments.storage} has no registered model ({database} is "
                "missing); run `nexusgen demo` first, name its folder with --storage, or give a model folder"
            )
    return registry.resolve_model(arguments.model, arguments.storage)


def open_model(arguments: argparse.Namespace, folder: Path, parts: Sequence[str]) -> Model:
    """Load a model's parts as the options say, after its memory plan has been printed on standard error.

    Raises: ModelError; UsageError for a device that isn't one; ResourceError if it isn't there or lacks memory.
    """
    import torch

    from nexusgen.memory import plan_memory
    from nexusgen.model.weights import load_model

    torch.set_num_threads(1)  # as in a replica of `serve`; sums in another order would change last bits
    report_progress(f"{arguments.command}: model {folder}")
    device = _find_device(arguments.device)
    is_cuda = device.startswith("cuda")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = names[arguments.dtype or ("bf16" if is_cuda else "fp32")]
    offload, quantise = getattr(arguments, "offload", False), getattr(arguments, "quantise", None)
    size, numerics = getattr(arguments, "size", None), getattr(arguments, "numerics", None)
    plan = plan_memory(folder, parts, dtype, device, offload=offload, quantise=quantise, size=size)
    report_progress(format_table(("memory", "GB"), plan.rows()))
    plan.check()
    return load_model(folder, parts, dtype, device, offload=offload, quantise=quantise, numerics=numerics)


def _find_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: wanted cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs here; use --device cpu")
    return name


def draw_picture(
    arguments: argparse.Namespace,
    folder: Path,
    parts: Sequence[str],
    draw: Callable[[Model], Image.Image],
    told: Mapping[str, Any] | None = None,
) -> Outcome:
    """Open a model, draw with it and write the picture to --out; `told` is more for --json.

    Raises: InputError, before the model is loaded, for a size that isn't drawn or the file can't hold; as `open_model`.
    """
    _check_picture_size(folder, arguments.out, arguments.size)
    model = open_model(arguments, folder, parts)
    started = time.monotonic()
    picture = draw(model)
    seconds = time.monotonic() - started
    steps = arguments.steps or model.manifest.num_inference_steps
    made: dict[str, str | int | None] = {
        "fingerprint": model.manifest.fingerprint,
        "seed": arguments.seed,
        "steps": steps,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantise": model.quantise,
        "numerics": model.numerics,
    }
    write_picture(picture, arguments.out, made)
    data = {
        "out": str(arguments.out),
        **made,
        **(told or {}),
        "size": [picture.height, picture.width],
        "model": str(folder),
        "seconds": seconds,
    }
    return Outcome(f"{arguments.out}: {picture.height}x{picture.width} pixels in {seconds:.1f} s", data)


def _check_picture_size(folder: Path, out: Path, size: tuple[int, int] | None) -> None:
    from nexusgen.model.manifest import read_manifest
    from nexusgen.sampling import check_size

    height, width = size if size is not None else read_manifest(folder).image_size
    check_size((height, width))
    name = FORMATS[out.suffix.lower()]
    longest = MAX_SIDES.get(name)
    if longest is not None and max(height, width) > longest:
        raise InputError(f"size {height}x{width}: a side of a {name} has at most {longest:,} pixels; write a .png")


def report_outcome(report: JobReport) -> Outcome:
    """A job's report: what it made and cost."""
    lines = [f"{report.job}: {'re-used' if report.reused else 'done'} in {report.seconds:.1f} s"]
    if report.samples_per_s and not report.reused:
        lines[0] += f", {report.samples} samples, {report.samples_per_s:.0f}/s"
    if report.loss_first is not None and report.loss_last is not None:
        lines[0] += f", loss {report.loss_first:.4f} -> {report.loss_last:.4f}"
    lines += [f"  {name}: {_short(value)}" for name, value in report.outputs.items()]
    return Outcome("\n".join(lines), report.to_json())


def report_progress(message: str) -> None:
    """A line on standard error about what a long command does next."""
    print(message, file=sys.stderr, flush=True)


def check_output_file(path: Path, suffixes: Sequence[str]) -> None:
    """Find out before the work whether its result can be written. Raises: UsageError or InputError."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"-o {path}: wanted a name that ends in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"-o {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise InputError(f"-o {path}: that is a folder; give the name of a file")
    check_folder(path.parent)


def read_picture(path: Path) -> Image.Image:
    """A picture's file, decoded. Raises: InputError if it can't be read or isn't a usable picture."""
    from nexusgen.errors import SampleError
    from nexusgen.images import decode_image

    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the picture {path}: {error.strerror or error}") from None
    except SampleError as error:
        raise InputError(f"{path} can't be used as a picture: {error}") from None


def write_picture(picture: Image.Image, path: Path, made: Mapping[str, str | int | None]) -> None:
    """Write a picture that says what made it; the file appears whole or not at all."""
    from nexusgen.images import encode_picture

    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(encode_picture(picture, made, FORMATS[path.suffix.lower()]))
    unfinished.replace(path)


def check_folder(folder: Path) -> None:
    """Make a folder if need be and see whether files can be written there. Raises: InputError."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder}: {error.strerror or error}") from None


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first, and those mostly of words, aligned to the left, others to the right."""
    padded = []
    for number, (name, *cells) in enumerate(zip(header, *rows, strict=True)):
        width = max(map(len, (name, *cells)))
        filled = [cell for cell in cells if cell]
        is_words = number == 0 or 2 * sum(map(_is_number, filled)) < len(filled)
        padded.append([cell.ljust(width) if is_words else cell.rjust(width) for cell in (name, "-" * width, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def _is_number(cell: str) -> bool:
    """Whether a cell holds a number, perhaps with a unit, and not a formula or sentence that begins with one."""
    return bool(re.match(r"[-+]?\d", cell)) and sum(map(str.isalpha, cell)) <= MAX_UNIT


def _be_quiet() -> None:
    """Leave standard error to our own messages: libraries' advice to programmers isn't for users."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("ray", "mlflow", "alembic", "transformers", "diffusers", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _only_json() -> Iterator[TextIO]:
    """Send standard output to standard error, of child processes too; gives the real one, for the JSON object."""
    sys.stdout.flush()
    real = os.dup(1)
    stdout = sys.stdout
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            if stdout is sys.__stdout__:
                with os.fdopen(os.dup(real), "w", encoding="utf-8") as out:
                    yield out
            else:
                yield stdout  # standard output has been replaced already, as by a test
    finally:
        os.dup2(real, 1)
        os.close(real)


def _complain(message: str) -> None:
    """One line, whatever a library has put into its message."""
    print(f"nexusgen: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """The same, as JSON knows it: a number that isn't finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3:
        return f"{value[0]} ... {value[-1]} ({len(value)} in all)"
    return json.dumps(_plain(value), ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number from 0 to 2**63 - 1")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number > 0")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted HEIGHTxWIDTH in pixels, like 96x96")
    return int(sides[0]), int(sides[-1])
