from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from servers import free_port, s3_server
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

from benchmarks.faulty_s3 import FaultyS3, faulty_s3
from nexusgen.errors import ModelError, ResourceError
from pipelines import checkpoint, storage
from pipelines.checkpoint import Checkpoint, DataInput, Meta, Saver


def make_meta(step: int, **values: Any) -> Meta:
    given: dict[str, Any] = {
        "stage": "ar",
        "step": step,
        "num_steps": 20,
        "run_id": "r",
        "seed": 0,
        "plan_digest": "p",
        "world_size": 1,
        "config": {"learning_rate": 1e-3},
        "base_fingerprint": "b",
        "inputs": (DataInput(name="x/vision", uri="u", digest="d", run_id="e"),),
        "num_samples": 10,
        "loss_first": 2.0,
        "loss_last": 1.0,
        "validation": {"mse": 0.5},
        "gradient_norms": (1.0, 0.5),
    }
    return Meta(**(given | values))


class Tiny(nn.Module):
    """A weight that is tied, sizes that two ranks share unevenly, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(tokens)))


def make_trained(seed: int, num_steps: int = 2, *, is_sharded: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module: nn.Module = Tiny()
    if is_sharded:
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    groups: list[dict[str, Any]] = [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in module.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=not is_sharded)
    for step in range(num_steps):
        optimizer.zero_grad()
        module(torch.arange(7)).square().sum().backward()
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
    return module, optimizer


def average_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() / 3 for name, parameter in module.named_parameters()}


def whole(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors of a training, whatever their sharding, on every rank."""
    weights, state = get_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True))
    return {"weights": weights, "state": state["state"]}


def full(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()
    }


def same(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def save_one(folder: str, step: int, seed: int = 0, keep_last: int = 3, **values: Any) -> str:
    """A checkpoint of one process's, as a training leaves it. Returns its URI."""
    saver = Saver(folder, 0, 1, keep_last)
    saver.save(*make_trained(seed), None, make_meta(step, **values))
    saver.close()
    return storage.join(folder, f"step-{step:06d}")


def find(folder: str) -> Checkpoint:
    found = checkpoint.latest(folder)
    assert found is not None
    return found


def steps_in(folder: str) -> list[str]:
    files = storage.list_files(folder, recursive=True)
    names = {file.removeprefix(f"{folder}/").partition("/")[0] for file in files}
    return sorted(name for name in names if "step" in name)


# ---- one process -----------------------------------------------------------------------------------------------------


def test_weights_optimizer_average_and_meta_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder = checkpoint.stage_folder(str(tmp_path), "demo", "ar")
    assert checkpoint.latest(folder) is None
    module, optimizer = make_trained(0)
    saver = Saver(folder, 0, 1, 3)
    saver.save(module, optimizer, None, make_meta(5))
    saver.save(module, optimizer, average_of(module), make_meta(10))
    saver.close()
    found = find(folder)
    assert (found.uri, found.meta) == (f"{folder}/step-000010", make_meta(10, has_ema=True))
    for other, other_optimizer in (make_trained(1), make_trained(1, num_steps=0)):
        parameter = other.middle.weight
        averaged = checkpoint.load(found, other, other_optimizer)
        assert other.middle.weight is parameter
        assert parameter.requires_grad
        same(whole(other, other_optimizer), whole(module, optimizer))
        same(averaged, average_of(module))
    first = Checkpoint(f"{folder}/step-000005", make_meta(5))
    assert checkpoint.load(first, *make_trained(1)) is None


def test_a_resumed_training_goes_on_like_an_undisturbed_one(tmp_path: Path) -> None:
    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.arange(7)).square().sum().backward()
        optimizer.step()

    undisturbed = make_trained(0)
    saver = Saver(str(tmp_path), 0, 1, 1)
    saver.save(*undisturbed, None, make_meta(2))
    saver.close()
    resumed = make_trained(1, num_steps=0)
    resumed[1].param_groups[0]["lr"] = undisturbed[1].param_groups[0]["lr"]
    checkpoint.load(find(str(tmp_path)), *resumed)
    for training in (undisturbed, resumed):
        step(*training)
    same(whole(*resumed), whole(*undisturbed))


def test_exported_weights_are_the_modules_or_the_averaged_ones(tmp_path: Path) -> None:
    module, optimizer = make_trained(0)
    module.middle.to(torch.bfloat16)
    saver = Saver(str(tmp_path / "c"), 0, 1, 2)
    saver.save(module, optimizer, None, make_meta(1))
    saver.save(module, optimizer, average_of(module), make_meta(2))
    saver.close()
    weights = {name: tensor.float() for name, tensor in module.state_dict().items()}
    checkpoint.export_weights(Checkpoint(f"{tmp_path}/c/step-000001", make_meta(1)), tmp_path / "w.safetensors")
    same(load_file(tmp_path / "w.safetensors"), weights)
    averaged = {name: tensor.float() for name, tensor in average_of(module).items()}
    averaged["head.weight"] = averaged["embed.weight"]
    checkpoint.export_weights(find(str(tmp_path / "c")), tmp_path / "a.safetensors")
    same(load_file(tmp_path / "a.safetensors"), weights | averaged)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = str(tmp_path / "ar")
    saver = Saver(folder, 0, 1, 2)
    trained = make_trained(0)
    for step, loss in ((5, 0.5), (10, 0.2), (15, 0.4), (20, 0.3), (25, float("nan")), (30, 0.2)):
        saver.save(*trained, None, make_meta(step, validation={"loss": loss}))
    saver.close()
    assert steps_in(folder) == ["step-000010", "step-000025", "step-000030"]
    assert storage.find_json(f"{folder}/best.json") == {"step": 10, "path": "step-000010", "loss": 0.2}
    # A training that began anew has no use for what another run left, nor one that resumed for later steps.
    save_one(folder, 5, run_id="s", validation={"loss": 0.9})
    assert steps_in(folder) == ["step-000005"]
    assert storage.find_json(f"{folder}/best.json") == {"step": 5, "path": "step-000005", "loss": 0.9}
    save_one(folder, 10, run_id="s")
    save_one(folder, 7, run_id="s")
    assert steps_in(folder) == ["step-000005", "step-000007"]
    checkpoint.forget(folder)
    assert checkpoint.latest(folder) is None
    assert not storage.exists(f"{folder}/best.json")


def test_what_was_written_in_part_is_never_the_latest_and_goes_with_the_next(tmp_path: Path) -> None:
    save_one(str(tmp_path), 5)
    for name in ("step-000010", ".step-000015-abc", "step-000020"):
        (tmp_path / name).mkdir()
    for name in ("step-000010", ".step-000015-abc"):
        (tmp_path / name / "__0_0.distcp").write_bytes(b"1")
    assert find(str(tmp_path)).meta.step == 5
    save_one(str(tmp_path), 10, seed=1)
    assert find(str(tmp_path)).meta.step == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-000005", "step-000010"]
    trained = make_trained(0)
    checkpoint.load(find(str(tmp_path)), *trained)
    same(whole(*trained), whole(*make_trained(1)))


def test_a_full_disk_or_a_missing_right_stops_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ar").write_text("in the way")
    saver = Saver(f"{tmp_path}/ar", 0, 1, 2)
    saver.save(*make_trained(0), None, make_meta(5))
    assert saver.num_failed == 1
    assert "step-000005: cannot write" in capsys.readouterr().err
    with pytest.raises(ResourceError, match=r"step-000005: cannot write .*rank 0"):
        saver.close()
    saver = Saver(f"{tmp_path}/ar", 0, 1, 2)
    saver.save(*make_trained(0), None, make_meta(5))
    (tmp_path / "ar").unlink()
    saver.save(*make_trained(0), None, make_meta(10))
    saver.close()
    assert find(f"{tmp_path}/ar").meta.step == 10


def test_weights_that_dont_fit_are_named(tmp_path: Path) -> None:
    save_one(str(tmp_path), 5)
    other = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(ModelError, match=rf"{tmp_path}/step-000005.*missing model.0.weight.*unexpected model.embed"):
        checkpoint.load(find(str(tmp_path)), other, torch.optim.AdamW(other.parameters()))
    wider = Tiny()
    wider.middle = nn.Linear(5, 6)
    with pytest.raises(ModelError, match=r"model.middle.weight has shape \(5, 5\), expected \(6, 5\)"):
        checkpoint.load(find(str(tmp_path)), wider, torch.optim.AdamW(wider.parameters()))


class Harm:
    """Code in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


@pytest.mark.parametrize("damage", ["truncated", "missing", "no metadata", "bad metadata", "harmful metadata"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(save_one(str(tmp_path / "ar"), 5))
    (shard,) = folder.glob("*.distcp")
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "no metadata":
        (folder / checkpoint.METADATA).unlink()
    else:
        bad = b"bad" if damage == "bad metadata" else pickle.dumps(Harm())
        (folder / checkpoint.METADATA).write_bytes(bad)
    found = find(str(tmp_path / "ar"))
    with pytest.raises(ModelError, match=str(folder)):
        checkpoint.load(found, *make_trained(1))
    with pytest.raises(ModelError, match=str(folder)):
        checkpoint.export_weights(found, tmp_path / "w.safetensors")
    assert not (tmp_path / "harm-was-done").exists()


def test_a_damaged_pointer_or_meta_is_named(tmp_path: Path) -> None:
    uri = save_one(str(tmp_path), 5)
    (Path(uri) / "meta.json").write_text("{}")
    with pytest.raises(ModelError, match=r"(?s)latest.json.*stage.*fresh=true"):
        checkpoint.latest(str(tmp_path))
    (Path(uri) / "meta.json").unlink()
    with pytest.raises(ModelError, match=rf"{uri}/meta.json.*fresh=true"):
        checkpoint.latest(str(tmp_path))


# ---- object storage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3"), port, "bucket"):
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield "s3://bucket"


@pytest.fixture
def faulty(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The same S3 behind a proxy whose failures a test sets."""
    monkeypatch.setattr(storage, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(storage, "REQUEST_ATTEMPTS", 1)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 3)
    target_port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with faulty_s3(FaultyS3(target_port, 0.0)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


def test_checkpoints_are_uploaded_and_read_back_through_failures(
    bucket: str, faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 10)
    folder = f"{bucket}/through"
    module, optimizer = make_trained(0)
    for step in (5, 10):
        faulty.fail_next(("503", "PUT"), ("reset", "PUT"), ("500", "GET"))
        saver = Saver(folder, 0, 1, 1)
        saver.save(module, optimizer, average_of(module), make_meta(step))
        saver.close()
        assert saver.num_failed == 0
    assert faulty.num_faults == 6
    assert list(tmp_path.iterdir()) == []
    assert steps_in(folder) == ["step-000010"]
    other = make_trained(1)
    found = find(folder)
    faulty.fail_next(("503", "GET"), ("cut", "GET"))  # of the metadata; then of the tensors
    faulty.faults, faulty.share = ("reset", "cut"), 0.2
    same(checkpoint.load(found, *other), average_of(module))
    same(whole(*other), whole(module, optimizer))
    checkpoint.export_weights(found, tmp_path / "w.safetensors")
    same(load_file(tmp_path / "w.safetensors")["middle.weight"], average_of(module)["middle.weight"])


def test_an_outage_stops_no_training_but_is_told_at_the_end(
    bucket: str, faulty: FaultyS3, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"{bucket}/outage"
    saver = Saver(folder, 0, 1, 2)
    trained = make_trained(0)
    faulty.faults = ("503",)
    for step, share in ((5, 0.0), (10, 1.0), (15, 0.0), (20, 1.0)):
        faulty.share = share
        saver.save(*trained, None, make_meta(step))
        saver.wait()
    with pytest.raises(ResourceError, match=rf"{folder}/step-000020: cannot write .*after 3 attempts"):
        saver.close()
    assert saver.num_failed == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"checkpoint {folder}/step-{step}" for step in ("000010", "000020")
    ]
    with pytest.raises(ResourceError, match="after 3 attempts"):
        checkpoint.load(Checkpoint(f"{folder}/step-000015", make_meta(15)), *trained)
    faulty.share = 0.0
    assert find(folder).meta.step == 15
    assert steps_in(folder) == ["step-000005", "step-000015"]


def save_until_killed(folder: str) -> None:
    save_one(folder, 10)


def test_a_training_killed_before_it_points_to_its_checkpoint_goes_on_from_the_older(
    bucket: str, faulty: FaultyS3
) -> None:
    folder = f"{bucket}/killed"
    save_one(folder, 5)
    hold = faulty.hold(lambda path, port: path.endswith("latest.json"))
    child = multiprocessing.get_context("spawn").Process(target=save_until_killed, args=(folder,))
    child.start()
    assert hold.caught.wait(60)
    child.kill()
    child.join()
    hold.release(drop=True)
    assert steps_in(folder) == ["step-000005", "step-000010"]
    assert find(folder).meta.step == 5
    save_one(folder, 7)
    assert find(folder).meta.step == 7
    assert steps_in(folder) == ["step-000005", "step-000007"]


# ---- two ranks -------------------------------------------------------------------------------------------------------


def work(rank: int, folder: str, remote: str, port: int) -> None:
    """Both ranks' part of the tests below: what is told there is done here, in one pair of processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for is_sharded in (False, True):
        name = f"sharded-{is_sharded}"
        training = make_trained(3, is_sharded=is_sharded)
        ema = average_of(training[0])
        saver = Saver(f"{folder}/{name}", rank, 2, 2)
        saver.save(*training, ema, make_meta(5))
        saver.close()
        saved = whole(*training) | {"ema": full(ema)}
        other = make_trained(4, num_steps=is_sharded, is_sharded=is_sharded)
        averaged = checkpoint.load(find(f"{folder}/alone"), *other)
        assert averaged is not None
        loaded = whole(*other) | {"ema": full(averaged)}
        if rank == 0:
            torch.save({"saved": saved, "loaded": loaded}, f"{folder}/{name}.pt")
    saver = Saver(remote, rank, 2, 1)
    for step in (5, 10):
        saver.save(*training, ema, make_meta(step))
    saver.close()
    torch.distributed.barrier()
    assert storage.list_files(f"{remote}/step-000010") == [
        f"{remote}/step-000010/{file}" for file in (".metadata", "__0_0.distcp", "__1_0.distcp", "meta.json")
    ]
    other = make_trained(4, is_sharded=True)
    averaged = checkpoint.load(find(remote), *other)
    assert averaged is not None
    same(whole(*other), whole(*training))
    same(full(averaged), full(ema))
    storage.REQUEST_ATTEMPTS = storage.MAX_ATTEMPTS = 1
    storage.RETRY_BUDGET_S = 1.0
    if rank == 1:
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"  # where nobody listens
    saver = Saver(remote, rank, 2, 1)
    saver.save(*training, ema, make_meta(15))
    cause = "cannot write" if rank == 1 else "the parts of rank 1 didn't come"
    with pytest.raises(ResourceError, match=f"step-000015: {cause}"):
        saver.close()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo that still holds a tensor would abort the interpreter's own end


@pytest.fixture(scope="module")
def two_ranks(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, having read what one process wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    training = make_trained(2)
    saver = Saver(f"{folder}/alone", 0, 1, 1)
    saver.save(*training, average_of(training[0]), make_meta(5))
    saver.close()
    torch.multiprocessing.spawn(work, (str(folder), f"{bucket}/ranks", free_port()), nprocs=2)
    return folder


@pytest.mark.parametrize("is_sharded", [False, True])
def test_two_ranks_read_what_one_wrote_and_one_what_two_wrote(is_sharded: bool, two_ranks: Path) -> None:
    told = torch.load(two_ranks / f"sharded-{is_sharded}.pt")
    alone = make_trained(2)
    same(told["loaded"], whole(*alone) | {"ema": average_of(alone[0])})
    folder = f"{two_ranks}/sharded-{is_sharded}"
    assert len(list(Path(folder).glob("step-000005/*.distcp"))) == 2  # each rank wrote a part
    averaged = checkpoint.load(find(folder), *alone)
    same(whole(*alone) | {"ema": averaged}, told["saved"])
    checkpoint.export_weights(find(folder), two_ranks / "w.safetensors")
    exported = load_file(two_ranks / "w.safetensors")
    same(
        exported,
        told["saved"]["weights"] | told["saved"]["ema"] | {"head.weight": told["saved"]["ema"]["embed.weight"]},
    )


def test_two_ranks_upload_their_parts_and_one_that_cant_stops_no_training(bucket: str, two_ranks: Path) -> None:
    found = find(f"{bucket}/ranks")
    assert found.meta.step == 10
    assert "step-000015" in steps_in(f"{bucket}/ranks")
    trained = make_trained(0)
    checkpoint.load(found, *trained)
    same(whole(*trained)["weights"], torch.load(two_ranks / "sharded-True.pt")["saved"]["weights"])
    save_one(f"{bucket}/ranks", 12, keep_last=1)
    assert steps_in(f"{bucket}/ranks") == ["step-000012"]
