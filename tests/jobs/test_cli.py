"""The command line as a user meets it: exit codes, one clear line for every mistake, one JSON object with --json."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import make_tiny_model

from jobs import cli, command
from jobs.command import DEMO_CONFIGS, Outcome
from nexusgen.comparison import FP32_TOLERANCE
from nexusgen.config import load_config
from nexusgen.errors import ConfigError, GateError, InputError, ModelError, UsageError
from nexusgen.model.manifest import read_manifest
from pipelines.embed import EmbedConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.pack import PackConfig
from pipelines.register import RegisterConfig
from pipelines.serve import ServeConfig
from pipelines.train import TrainConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def nexusgen(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command; gives exit code, standard output and standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result: tuple[int, str, str]) -> str:
    """The one line that a refused command printed, with its exit code in front."""
    code, out, err = result
    assert out == ""
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("nexusgen: error: ")
    return f"{code} {line.removeprefix('nexusgen: error: ')}"


# --- wrong usage ------------------------------------------------------------------------------------------------------


def test_help_names_every_command(nexusgen: Run) -> None:
    code, out, _ = nexusgen("--help")
    assert code == 0
    assert all(one.NAME in out for one in cli.COMMANDS)


def test_version_is_the_packages(nexusgen: Run) -> None:
    code, out, _ = nexusgen("--version")
    assert (code, out.strip()) == (0, f"nexusgen {metadata.version('nexusgen')}")


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["generate"], ["generate", "a star", "-o", "x.png", "--sede", "1"]]
)
def test_wrong_usage_is_2(nexusgen: Run, arguments: list[str]) -> None:
    code, out, err = nexusgen(*arguments)
    assert code == 2
    assert out == ""
    assert "usage: nexusgen" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--steps", "0"),
        ("--size", "big"),
        ("--size", "64x"),
        ("--size", "x64"),
    ],
)
def test_options_out_of_range_are_2(nexusgen: Run, option: str, value: str) -> None:
    code, _, err = nexusgen("generate", "a star", "-o", "x.png", option, value)
    assert code == 2
    assert option in err


def test_misspelt_key_is_2_and_suggests_the_right_one(nexusgen: Run) -> None:
    line = refused(nexusgen("train", DEMO_CONFIGS / "train_ar.yaml", "num_stepss=3"))
    assert line.startswith("2 ")
    assert "unknown key 'num_stepss'; did you mean 'num_steps'?" in line


def test_misspelt_key_of_a_roads_job(nexusgen: Run) -> None:
    line = refused(nexusgen("road", DEMO_CONFIGS / "road.yaml", "train_ar.num_stepss=3"))
    assert line.startswith("2 ")
    assert "'train_ar.num_stepss'; did you mean 'num_steps'?" in line


def test_a_job_of_a_road_cant_have_a_key_of_the_roads_own(nexusgen: Run) -> None:
    line = refused(nexusgen("road", DEMO_CONFIGS / "road.yaml", "evaluate.model=demo-base"))
    assert line.startswith("2 ")
    assert "evaluate.model is 'demo-base', but the road's own model holds" in line


def test_misspelt_job_of_a_road(nexusgen: Run) -> None:
    assert "did you mean 'train_ar'?" in refused(nexusgen("road", DEMO_CONFIGS / "road.yaml", "trainar.num_steps=3"))


def test_wrong_value_is_2(nexusgen: Run) -> None:
    line = refused(nexusgen("train", DEMO_CONFIGS / "train_ar.yaml", "num_steps=many"))
    assert line.startswith("2 ")
    assert "num_steps = 'many'" in line


def test_missing_config_is_2(nexusgen: Run, tmp_path: Path) -> None:
    assert refused(nexusgen("pack", tmp_path / "absent.yaml")).startswith("2 cannot read the config")


def test_overrides_may_follow_options(nexusgen: Run, storage: Path) -> None:
    code, out, _ = nexusgen("pack", DEMO_CONFIGS / "pack.yaml", "--json", f"storage={storage}", "counts={editing: 2}")
    assert code == 0
    assert json.loads(out)["samples"] == 2


# --- what isn't there, or can't be written ----------------------------------------------------------------------------


def test_missing_input(nexusgen: Run, storage: Path, model: Path) -> None:
    settings = [f"storage={storage}", f"model={model}", f"input={storage}/absent.tar"]
    line = refused(nexusgen("embed", DEMO_CONFIGS / "embed_vision.yaml", *settings))
    assert line[0] in "12"
    assert "absent.tar" in line


def test_unwritable_storage(nexusgen: Run) -> None:
    assert "/proc/none" in refused(nexusgen("pack", DEMO_CONFIGS / "pack.yaml", "storage=/proc/none"))
    assert "/proc/none" in refused(nexusgen("demo", "--out", "/proc/none"))


@pytest.mark.parametrize("out", ["/proc/x.png", "absent/x.png", "folder.png"])
def test_unwritable_picture_is_refused_before_the_model_is_looked_for(nexusgen: Run, tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.png").mkdir()
    line = refused(nexusgen("generate", "a star", "-o", tmp_path / out, "--model", tmp_path / "no model"))
    assert line.startswith("1 ")
    assert str(Path(out).parent) in line or out in line
    assert "no model" not in line


def test_unknown_picture_format_is_2(nexusgen: Run, tmp_path: Path) -> None:
    assert ".png" in refused(nexusgen("generate", "a star", "-o", tmp_path / "x.doc"))


def test_serve_writes_the_application_for_other_tools(nexusgen: Run) -> None:
    arguments = ("serve", DEMO_CONFIGS / "serve.yaml", "port=8123", "ar={replicas: [1, 3]}", "--write-serve-config")
    code, printed, _ = nexusgen(*arguments)
    assert code == 0
    written = yaml.safe_load(printed)
    assert written["http_options"]["port"] == 8123
    (application,) = written["applications"]
    assert application["import_path"] == "pipelines.serve:build_app"
    assert application["args"]["ar"]["replicas"] == [1, 3]


def test_folder_that_is_no_model(nexusgen: Run, tmp_path: Path) -> None:
    line = refused(nexusgen("generate", "a star", "-o", tmp_path / "x.png", "--model", tmp_path))
    assert line == f"1 {tmp_path} is not a model folder: it holds no nexusgen.json"
    line = refused(nexusgen("serve", DEMO_CONFIGS / "serve.yaml", f"storage={tmp_path}", f"model={tmp_path}"))
    assert "is not a model folder" in line


def test_no_registered_model_says_how_to_get_one(
    nexusgen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    line = refused(nexusgen("generate", "a star", "-o", tmp_path / "x.png", "--storage", tmp_path / "none"))
    assert "nexusgen demo" in line
    assert not (tmp_path / "none").exists()


def test_a_dead_tracking_server_is_one_message(nexusgen: Run, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    line = refused(nexusgen("promote", "1", "--storage", storage))
    assert line.startswith("1 ")
    assert "mlflow" in line.lower()
    assert "127.0.0.1" in line


def test_promote_without_a_model(nexusgen: Run, storage: Path) -> None:
    assert "run register first" in refused(nexusgen("promote", "1", "--storage", storage))


def test_too_few_cpus_are_refused_with_the_numbers(nexusgen: Run, storage: Path, model: Path) -> None:
    settings = [f"storage={storage}", f"model={model}", "embed_vision.num_encoders=500"]
    line = refused(nexusgen("road", DEMO_CONFIGS / "road.yaml", *settings))
    assert line.startswith("1 the road needs 501 CPUs, but only ")
    assert list(storage.iterdir()) == []  # nothing was started


# --- pictures and answers ---------------------------------------------------------------------------------------------


def test_generate_writes_the_picture_of_a_seed(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a.png", 3), ("b.png", 3), ("c.png", 4)):
        code, out, _ = nexusgen(
            "generate", "一个红色的圆形", "-o", tmp_path / name, "--model", model, "--seed", seed, "--json"
        )
        assert code == 0
        data = json.loads(out)
        assert data["seed"] == seed
        assert data["size"] == [96, 96]
        assert data["fingerprint"] == read_manifest(model).fingerprint
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_size_and_steps_of_a_picture(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    code, text, _ = nexusgen("generate", "a star", "-o", out, "--model", model, "--size", "32x80", "--steps", 1)
    assert code == 0
    assert "32x80" in text
    with Image.open(out) as picture:
        assert picture.size == (80, 32)


def test_edit_draws_with_the_decoder_that_is_named(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.png", tmp_path / "out.webp"
    Image.new("RGB", (64, 48), "red").save(source)
    line = refused(nexusgen("edit", source, "Make it blue.", "-o", out, "--model", model))
    assert "no editing_decoder" in line
    assert "--decoder generation" in line
    arguments = ("edit", source, "Make it blue.", "-o", out, "--model", model, "--decoder", "generation", "--steps", 1)
    code, text, _ = nexusgen(*arguments, "--json")
    assert code == 0
    assert json.loads(text)["decoder"] == "generation"
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("WEBP", (96, 96))
    source.write_bytes(b"no picture")
    assert "can't be used as a picture" in refused(nexusgen(*arguments))
    assert "say what to change" in refused(nexusgen("edit", out, " ", *arguments[3:]))


def test_size_that_the_model_cannot_draw(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    line = refused(nexusgen("generate", "a star", "-o", tmp_path / "x.png", "--model", model, "--size", "50"))
    assert "multiples of 16" in line


@pytest.mark.parametrize(
    ("text", "size", "name", "said"),
    [
        ("a star", "60000x60000", "x.png", "size 60000x60000: .* at most 4,194,304 pixels"),
        ("a star", "16x16400", "x.webp", "a side of a WEBP has at most 16,383 pixels; write a .png"),
        ("a star", "65504x16", "x.jpg", "a side of a JPEG has at most 65,500 pixels; write a .png"),
        (" ", "96", "x.png", "the prompt is empty"),
        ("x" * 100_000, "96", "x.png", "100,000 characters"),
        ("a \udcff", "96", "x.png", "UTF-8"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_model_is_loaded(
    nexusgen: Run, model: Path, tmp_path: Path, text: str, size: str, name: str, said: str
) -> None:
    result = nexusgen("generate", text, "-o", tmp_path / name, "--model", model, "--size", size)
    assert re.search(said, refused(result))
    assert len(result[2].splitlines()) == 1  # not even a memory plan
    Image.new("RGB", (64, 48), "red").save(tmp_path / "in.png")
    options = ("-o", tmp_path / name, "--model", model, "--size", size, "--decoder", "generation")
    result = nexusgen("edit", tmp_path / "in.png", text, *options)
    assert re.search(said.replace("prompt is empty", "instruction is empty"), refused(result))
    assert len(result[2].splitlines()) == 1


def test_edit_proposes_only_a_decoder_that_is_there(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    manifest = json.loads((folder / "nexusgen.json").read_text())
    (folder / "nexusgen.json").write_text(json.dumps({**manifest, "parts": ["autoregressive", "vae"]}))
    Image.new("RGB", (64, 48), "red").save(tmp_path / "in.png")
    line = refused(nexusgen("edit", tmp_path / "in.png", "Make it blue.", "-o", tmp_path / "x.png", "--model", folder))
    assert line.endswith("has no editing_decoder; it holds autoregressive, vae: use a model that has one")


def test_prompt_that_is_not_unicode(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    assert "UTF-8" in refused(nexusgen("generate", "a \udcff", "-o", tmp_path / "x.png", "--model", model))


def test_huge_prompt(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    line = refused(nexusgen("generate", "x" * 100_000, "-o", tmp_path / "x.png", "--model", model))
    assert line.startswith("1 ")
    assert "100000" in line.replace(",", "")
    assert len(line) < 500
    assert not (tmp_path / "x.png").exists()


def test_describe_answers(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70, 90), "red").save(tmp_path / "x.png")
    code, out, _ = nexusgen("describe", tmp_path / "x.png", "-q", "What?", "--model", model, "--json")
    assert code == 0
    data = json.loads(out)
    assert data["question"] == "What?"
    assert data["finish_reason"] in ("stop", "length")
    assert isinstance(data["answer"], str)


def test_describe_says_which_options_change_nothing(nexusgen: Run) -> None:
    for name, count in (("describe", 3), ("generate", 0)):
        assert " ".join(nexusgen(name, "--help")[1].split()).count("changes nothing here") == count


def test_describe_prints_its_answer_as_it_comes(nexusgen: Run, tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), "white").save(tmp_path / "x.png")
    asked = ("describe", tmp_path / "x.png", "-q", "What colour is the background?", "--model", "demo-base")
    answer = json.loads(nexusgen(*asked, "--json")[1])["answer"]
    code, out, _ = nexusgen(*asked)
    assert (code, out) == (0, answer + "\n")
    assert answer == answer.strip() != ""


@pytest.mark.parametrize(
    ("options", "is_same"),
    [
        (["--offload"], True),
        (["--device", "cpu", "--dtype", "fp32"], True),
        (["--dtype", "bf16"], False),
        (["--quantise", "fp8"], False),
        (["--numerics", "reference", "--dtype", "bf16"], False),
        (["--numerics", "exact", "--dtype", "bf16"], False),
    ],
)
def test_how_a_model_is_held(nexusgen: Run, tmp_path: Path, options: list[str], is_same: bool) -> None:
    pictures = []
    for number, chosen in enumerate([[], options]):
        out = tmp_path / f"{number}.png"
        code, text, _ = nexusgen(
            "generate", "a star", "-o", out, "--model", "demo-base", "--steps", 2, *chosen, "--json"
        )
        assert code == 0
        pictures.append(np.asarray(Image.open(out)))
    assert np.array_equal(*pictures) == is_same
    found = json.loads(text)
    assert found["dtype"] == ("bfloat16" if "bf16" in options else "float32")
    assert found["quantise"] == ("fp8" if "fp8" in options else None)
    assert found["numerics"] == ("exact" if "exact" in options else "reference")


def test_numerics_and_dtype_of_answers(nexusgen: Run, tmp_path: Path) -> None:
    pictures = []
    for numerics in ("reference", "exact"):
        out = tmp_path / f"{numerics}.png"
        options = ("--dtype", "bf16", "--numerics", numerics, "--steps", 2)
        assert nexusgen("generate", "a star", "-o", out, "--model", "demo-base", *options)[0] == 0
        pictures.append(np.asarray(Image.open(out)))
    assert not np.array_equal(*pictures)
    _, _, err = nexusgen("describe", out, "--model", "demo-base")
    _, _, err_bf16 = nexusgen("describe", out, "--model", "demo-base", "--dtype", "bf16")
    assert weights_of(err) == pytest.approx(2 * weights_of(err_bf16), abs=0.0015)


def weights_of(err: str) -> float:
    return float(next(line for line in err.splitlines() if line.startswith("autoregressive ")).split()[1])


def test_a_device_that_is_not_there(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("generate", "a star", "-o", tmp_path / "x.png", "--model", model, "--device")
    assert "wanted cpu, cuda or cuda:N" in refused(nexusgen(*arguments, "toaster"))
    assert refused(nexusgen(*arguments, "toaster")).startswith("2 ")
    line = refused(nexusgen(*arguments, "cuda:99"))
    assert line.startswith("1 ")
    assert "--device cpu" in line


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    num_bytes = 2 * psutil.virtual_memory().total // 4 * 4
    tensors = {"huge": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}
    header = json.dumps(tensors).encode()
    with (folder / "decoders" / "generation" / "conditioner.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)  # a hole, which takes no room on disk
    line = refused(nexusgen("generate", "a star", "-o", tmp_path / "x.png", "--model", folder))
    found = re.match(r"1 the model needs ([\d.]+) GB on cpu in fp32, which has ([\d.]+) GB free", line)
    assert found is not None, line
    assert num_bytes / 1e9 <= float(found[1]) < num_bytes / 1e9 + 0.1
    assert float(found[1]) > float(found[2])
    assert "--dtype bf16" in line
    assert not (tmp_path / "x.png").exists()


def test_describe_needs_a_picture(nexusgen: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    assert "image_undecodable" in refused(nexusgen("describe", tmp_path / "x.png", "--model", model))
    assert "absent.png" in refused(nexusgen("describe", tmp_path / "absent.png", "--model", model))


def test_a_picture_needs_no_ray(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom jobs import cli\n"
        f"code = cli.main(['generate', 'a star', '-o', {str(tmp_path / 'x.png')!r}, '--model', {str(model)!r}])\n"
        "sys.exit(code or 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()  # and no library says anything
    assert told[0] == f"generate: model {model}"
    assert told[1].split() == ["memory", "GB"]
    assert [line.split("  ")[0] for line in told[3:]] == [
        "autoregressive",
        "generation_decoder",
        "vae",
        "computing, autoregressive (estimate)",
        "computing, drawing (estimate)",
        "peak, whole",
        "peak, --offload",
        "free on cpu",
    ]


# --- the other commands -----------------------------------------------------------------------------------------------


def test_inspect_counts_and_reports(nexusgen: Run, storage: Path) -> None:
    counts = "counts={editing: 2, generation: 3}"
    assert nexusgen("pack", DEMO_CONFIGS / "pack.yaml", f"storage={storage}", counts)[0] == 0
    code, out, _ = nexusgen("inspect", storage / "tars" / "demo", "--json", "--report", storage / "report")
    assert code == 0
    found = json.loads(out)
    assert found["by_task"] == {"understanding": 0, "generation": 3, "editing": 2}
    assert found["quarantined"] == []
    assert json.loads((storage / "report" / "inspect.json").read_text("utf-8")) == found
    assert "editing 2" in (storage / "report" / "inspect.txt").read_text("utf-8")
    assert "generation 3" in nexusgen("inspect", storage / "tars" / "demo")[1]


def test_verify_fails_on_a_difference(nexusgen: Run, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "gen_decoder"
    code, out, _ = nexusgen("verify", golden)
    assert code == 0
    assert out.splitlines()[0].startswith("ok  ")
    assert re.search(r"^(\d+) of \1 tensors agree", out, re.MULTILINE)
    folder = shutil.copytree(golden, tmp_path / "golden")
    recorded = load_file(folder / "io.safetensors")
    recorded["pred.out"][0, 0, 0, 0] = float("nan")
    recorded = {name: tensor for name, tensor in recorded.items() if not name.startswith("euler.cfg3")}
    save_file(recorded, folder / "io.safetensors")
    code, out, _ = nexusgen("verify", folder)
    assert code == 1
    assert "FAILED: generation_decoder.pred.out" in out
    code, out, err = nexusgen("verify", folder, "--json")
    assert code == 1
    data = json.loads(out)
    assert not data["passed"]
    (failed,) = [case for case in data["cases"] if not case["passed"]]
    case = {"name": "generation_decoder.pred.out", "max_abs": None, "max_rel": None}
    assert failed == {**case, "tolerance": FP32_TOLERANCE, "passed": False}
    assert data["skipped"] == ["generation_decoder.euler.cfg3: its tensors aren't in this set"]
    assert "FAIL       NaN" in err
    (folder / "io.safetensors").write_bytes(b"nothing")
    assert "io.safetensors is not a readable safetensors file" in refused(nexusgen("verify", folder))


def test_import_and_export(nexusgen: Run, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    code, out, _ = nexusgen(
        *("import", "--autoregressive", golden / "ar", "--out", tmp_path / "model", "--json"),
        *("--generation-decoder", golden / "gen_decoder" / "generation_decoder.bin"),
        *("--editing-decoder", golden / "edit_decoder" / "edit_decoder.bin"),
    )
    assert code == 0
    found = json.loads(out)
    assert found["parts"] == ["autoregressive", "generation_decoder", "editing_decoder"]
    assert found["fingerprint"] == read_manifest(tmp_path / "model").fingerprint
    assert [text.split()[0] for text in found["lacks"]] == ["tokenizer", "vae", "prompt"]
    code, out, _ = nexusgen("export", tmp_path / "model", "--out", tmp_path / "out", "--json")
    assert code == 0
    files = json.loads(out)["files"]
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"model.safetensors", "config.json", "generation_decoder.bin", "edit_decoder.bin"} <= set(files)
    assert "not an empty folder" in refused(nexusgen("export", tmp_path / "model", "--out", tmp_path / "out"))
    line = refused(nexusgen("generate", "a", "-o", tmp_path / "x.png", "--model", tmp_path / "model"))
    assert "has no part vae" in line
    Image.new("RGB", (56, 56)).save(tmp_path / "x.png")
    assert "no tokenizer" in refused(nexusgen("describe", tmp_path / "x.png", "--model", tmp_path / "model"))


def test_import_of_nothing_is_2(nexusgen: Run, tmp_path: Path) -> None:
    assert refused(nexusgen("import", "--out", tmp_path / "model")).startswith("2 nothing to import")
    assert nexusgen("import", "--autoregressive", tmp_path)[0] == 2  # no --out
    line = refused(nexusgen("import", "--autoregressive", tmp_path / "absent", "--out", tmp_path / "model"))
    assert "absent doesn't exist" in line


def test_verify_needs_a_golden_set(nexusgen: Run, tmp_path: Path) -> None:
    assert "no golden set" in refused(nexusgen("verify", tmp_path))


def test_make_base_keeps_what_is_there(nexusgen: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    assert "is not empty" in refused(nexusgen("make-base", "--out", tmp_path))


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("pack", PackConfig),
        ("embed_vision", EmbedConfig),
        ("embed_latents", EmbedConfig),
        ("embed_predicted", EmbedConfig),
        ("train_ar", TrainConfig),
        ("train_generation_decoder", TrainConfig),
        ("train_editing_decoder", TrainConfig),
        ("register", RegisterConfig),
        ("evaluate", EvaluateConfig),
        ("serve", ServeConfig),
    ],
)
def test_shipped_configs_are_valid(file: str, config: type[Any]) -> None:
    loaded = load_config(config, DEMO_CONFIGS / f"{file}.yaml")
    assert (loaded.storage, loaded.name) == (command.DEFAULT_STORAGE, "demo")


@pytest.mark.parametrize("mode", ["vision", "latents", "predicted"])
def test_shipped_configs_of_the_full_size_embed_each_mode(mode: str) -> None:
    loaded = load_config(EmbedConfig, DEMO_CONFIGS.parent / "7b" / f"embed_{mode}.yaml")
    assert (loaded.mode, loaded.gpus_per_encoder, loaded.decode_threads) == (mode, 1, 8)


@pytest.mark.parametrize(("suite", "judged"), [("geneval", False), ("imgedit", True)])
def test_shipped_configs_of_the_full_size_evaluate_public_benchmarks(suite: str, judged: bool) -> None:
    loaded = load_config(EvaluateConfig, DEMO_CONFIGS.parent / "7b" / f"evaluate_{suite}.yaml")
    assert (loaded.benchmark, loaded.actor_gpus, loaded.judge is not None) == (suite, 1, judged)


def test_the_shipped_config_of_pictures_encodes_nothing() -> None:
    loaded = load_config(EmbedConfig, DEMO_CONFIGS.parent / "7b" / "embed_images.yaml")
    assert (loaded.mode, loaded.gpus_per_encoder, loaded.decode_threads) == ("images", 0, 4)


@pytest.mark.parametrize(
    ("size", "stage"), [("7b", "ar"), ("7b", "generation_decoder"), ("7b", "editing_decoder"), ("3b", "ar")]
)
def test_shipped_configs_of_the_full_size_train_each_stage(size: str, stage: str) -> None:
    loaded = load_config(TrainConfig, DEMO_CONFIGS.parent / size / f"train_{stage}.yaml")
    assert (loaded.stage, loaded.gpus_per_worker, loaded.parallelism) == (stage, 1, "fsdp")
    assert loaded.virtual_streams == loaded.num_micro_batches == loaded.batch_samples // (2 if stage == "ar" else 1)


# --- errors -> exit codes ---------------------------------------------------------------------------------------------


def execute(work: Callable[[], Outcome], json_: bool = False) -> int:
    return command.execute(argparse.Namespace(run=lambda _: work(), json=json_))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (InputError("x"), 1),
        (ModelError("x"), 1),
        (GateError("x"), 1),
        (PermissionError(13, "Permission denied", "x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_have_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Outcome:
        raise error

    assert execute(work) == code
    assert capsys.readouterr().err.startswith("nexusgen: error: ")


def test_errors_of_many_lines_become_one(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Outcome:
        raise InputError("first\n   second\nthird")

    assert execute(work) == 1
    assert capsys.readouterr().err == "nexusgen: error: first second third\n"


def test_bugs_are_not_hidden() -> None:
    def work() -> Outcome:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(work)


def test_json_is_alone_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> Outcome:
        print("chatter")
        os.write(1, b"chatter of a library\n")
        subprocess.run(["echo", "chatter of a child"], check=True)
        return Outcome("text", {"a": [1, float("nan")], "path": Path("x")})

    assert execute(work, json_=True) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"a": [1, None], "path": "x"}
    assert captured.err.count("chatter") == 3
