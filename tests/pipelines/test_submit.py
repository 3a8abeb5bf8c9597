"""Jobs on a cluster of three nodes of this machine, submitted from beside it: what travels, what shows, how it ends."""

from __future__ import annotations

import http.server
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from cluster_site import BUCKET, SECRETS, Site, site
from servers import free_port

from jobs import cli
from jobs import submit as submit_command
from jobs.command import DEMO_CONFIGS
from nexusgen.errors import ResourceError, UsageError
from pipelines import submit
from pipelines.submit_api import JobApi, JobState, find_token, url_of

STORAGE = f"s3://{BUCKET}/road"
# Small enough for a minute, and still every job with its real work.
ROAD = (
    f"storage={STORAGE}",
    "name=road",
    "pack.counts={generation: 24, editing: 8, understanding: 8}",
    "pack.samples_per_shard=20",
    "embed_vision.num_encoders=1",
    "embed_latents.num_encoders=1",
    "embed_predicted.num_encoders=1",
    *(f"train_{stage}.num_steps=4" for stage in ("ar", "generation_decoder", "editing_decoder")),
    *(f"train_{stage}.batch_samples=8" for stage in ("ar", "generation_decoder", "editing_decoder")),
    *(f"train_{stage}.warmup_steps=1" for stage in ("ar", "generation_decoder", "editing_decoder")),
    "train_editing_decoder.num_workers=1",
    "evaluate.per_category=1",
    "evaluate.num_explicit=2",
    "evaluate.num_questions=2",
    "evaluate.num_edits=2",
    "evaluate.steps=2",
    "evaluate.num_actors=1",
    "promote.thresholds={}",
    "promote.understanding_drop=1",
)


# --- without a cluster ------------------------------------------------------------------------------------------------


def refusal(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a refused command printed, with its exit code in front."""
    code = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert out == ""
    return f"{code} {err.splitlines()[-1].removeprefix('nexusgen: error: ')}"


def test_what_only_this_machine_sees_is_refused_before_anything_is_sent(capfd: pytest.CaptureFixture[str]) -> None:
    address = ("--address", "http://127.0.0.1:1")
    said = refusal(capfd, "submit", "road", DEMO_CONFIGS / "road.yaml", *address)
    assert said.startswith("2 storage=runs/demo is relative to a folder of this machine")
    said = refusal(capfd, "submit", "embed", DEMO_CONFIGS / "embed_vision.yaml", "storage=s3://b/x", *address)
    assert said.startswith("2 input=runs/demo/tars/demo is relative")
    said = refusal(capfd, "submit", "train", DEMO_CONFIGS / "train_ar.yaml", "storage=s3://b/x", "n_steps=3", *address)
    assert said.startswith("2 ")
    assert "unknown key 'n_steps'" in said
    settings = ("storage=s3://b/x", "--env", "NOT_SET_ANYWHERE")
    said = refusal(capfd, "submit", "train", DEMO_CONFIGS / "train_ar.yaml", *settings, *address)
    assert said == "2 --env NOT_SET_ANYWHERE: there is no such variable here; set it, or leave it to the cluster"


def test_a_cluster_that_isnt_there_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert "1 no Ray cluster answers at http://127.0.0.1:1 " in refusal(
        capfd, "jobs", "list", "--address", "127.0.0.1:1"
    )
    said = refusal(capfd, "jobs", "list", "--address", "ray://head:10001")
    assert said.startswith("2 --address ray://head:10001: wanted the cluster's dashboard, like http://head:8265")


def test_addresses() -> None:
    assert url_of("head") == "http://head:8265"
    assert url_of("head:80") == "http://head:80"
    assert url_of("https://ray.example.org/a/") == "https://ray.example.org:443/a"
    assert url_of("http://[::1]:8265") == "http://[::1]:8265"


def test_variables_travel_by_name_and_passwords_only_when_asked() -> None:
    here = {
        "AWS_ENDPOINT_URL": "http://s3",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_CA_BUNDLE": "/here/ca",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MINE": "1",
    }
    assert submit.variables_of([], here) == {
        "AWS_ENDPOINT_URL": "http://s3",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    }
    assert submit.variables_of(["MINE", "AWS_SECRET_ACCESS_KEY"], here).keys() == {
        *("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"),
        *("MINE", "AWS_SECRET_ACCESS_KEY"),
    }
    assert submit.secrets_among(["MINE", "AWS_SECRET_ACCESS_KEY"]) == ["AWS_SECRET_ACCESS_KEY"]
    here["MLFLOW_TRACKING_URI"] = "http://user:word@mlflow:5000"
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI holds a user or password") as caught:
        submit.variables_of([], here)
    assert "word@" not in str(caught.value)
    assert submit.variables_of(["MLFLOW_TRACKING_URI"], here)["MLFLOW_TRACKING_URI"] == here["MLFLOW_TRACKING_URI"]


def test_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert find_token() == ("", "")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert find_token() == ("home", str(tmp_path / ".ray" / "auth_token"))
    (tmp_path / "token").write_text("named")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token()[0] == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert find_token() == ("given", "RAY_AUTH_TOKEN")


def test_attempts_are_counted_and_others_ids_are_not_taken_for_one() -> None:
    states = [JobState(name, "FAILED") for name in ("a-1f-10", "a-1f", "a-1f-2", "a-1f-x", "a-1f2", "b")]
    assert [state.id for state in submit.attempts_of(states, "a-1f")] == ["a-1f", "a-1f-2", "a-1f-10"]


def read_work(job: str, config: str, *overrides: str) -> submit.Work:
    return submit_command._read_work(job, DEMO_CONFIGS / config, ["storage=s3://b/x", *overrides])


def running(work: submit.Work, job_id: str = "") -> JobState:
    """What the cluster says of a job that was submitted."""
    metadata = {submit.DIGEST: work.digest, submit.PLACES: "\n".join(work.places)}
    return JobState(job_id or work.id, "RUNNING", metadata=metadata)


def test_an_id_tells_stage_or_mode() -> None:
    assert read_work("train", "train_ar.yaml").id.startswith("train-ar-demo-")
    assert read_work("embed", "embed_latents.yaml", "input=s3://b/t").id.startswith("embed-latents-demo-")
    assert read_work("pack", "pack.yaml").id.startswith("pack-demo-")


def test_every_job_has_a_configuration_of_its_own() -> None:
    for job in submit_command.JOBS:
        name = {"embed": "embed_vision", "train": "train_ar"}.get(job, job)
        overrides = {"embed": ["input=s3://b/t"], "evaluate": ["model=demo-base"]}.get(job, [])
        work = read_work(job, f"{name}.yaml", *overrides)
        assert work.job == job


def test_a_file_that_a_setting_names_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embed = ("embed", "embed_vision.yaml", "input=s3://b/t")
    with pytest.raises(UsageError, match=r"drop_keys=takedowns\.txt: there is no such file here to be sent"):
        read_work(*embed, "drop_keys=takedowns.txt")
    Path("takedowns.txt").write_text("key-1\n")
    work = read_work(*embed, "drop_keys=takedowns.txt")
    assert work.arguments[-1] == 'drop_keys="config/drop_keys/takedowns.txt"'
    with submit.staged(work.files, ship_code=False) as folder:
        monkeypatch.chdir(folder)  # as the job finds itself
        config = submit_command._load("embed", Path(work.arguments[0]), list(work.arguments[1:]))
        assert Path(config.drop_keys).read_text() == "key-1\n"  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    Path("takedowns.txt").write_text("key-2\n")
    assert read_work(*embed, "drop_keys=takedowns.txt").digest != work.digest
    for seen_by_all in ("s3://b/takedowns.txt", "/mnt/takedowns.txt"):
        assert read_work(*embed, f"drop_keys={seen_by_all}").files.keys() == {"config/embed_vision.yaml"}
    road = read_work("road", "road.yaml", "embed_latents.drop_keys=takedowns.txt")
    assert road.arguments[-1] == 'embed_latents.drop_keys="config/embed_latents.drop_keys/takedowns.txt"'
    benchmark = ("suites=[geneval]", "model=models:/nexusgen/1", "prompts=takedowns.txt")
    assert read_work("evaluate", "evaluate.yaml", *benchmark).files["config/prompts/takedowns.txt"] == Path(
        "takedowns.txt"
    )
    with pytest.raises(UsageError, match="against=runs/other is relative to a folder of this machine"):
        read_work("evaluate", "evaluate.yaml", "model=demo-base", "against=runs/other")


def test_no_second_driver_on_the_same_place() -> None:
    ar, other = read_work("train", "train_ar.yaml"), read_work("train", "train_ar.yaml", "num_workers=2")
    with pytest.raises(UsageError) as caught:
        submit.check_no_other([running(ar)], other, other.id, "http://head:8265")
    assert str(caught.value) == (
        f"job {ar.id} runs and writes s3://b/x/checkpoints/demo/ar, as this one would: wait for its end, or stop it "
        f"(a training saves first) and submit again: nexusgen jobs stop {ar.id} --address http://head:8265"
    )
    with pytest.raises(UsageError, match="writes s3://b/x/checkpoints"):
        submit.check_no_other([running(ar)], ar, "another-id", "")
    with pytest.raises(UsageError, match="job mine-2 runs under this id, with other settings"):
        submit.check_no_other([running(ar, "mine-2")], other, "mine", "")
    submit.check_no_other([running(ar)], ar, ar.id, "")  # attached to
    submit.check_no_other([JobState(ar.id, "FAILED", metadata=running(ar).metadata)], other, other.id, "")
    for free in ("name=demo2", "stage=generation_decoder", "storage=s3://b/y"):
        work = read_work("train", "train_ar.yaml", "num_workers=2", free)
        submit.check_no_other([running(ar), JobState("not-of-submit", "RUNNING")], work, work.id, "")
    road = read_work("road", "road.yaml")
    with pytest.raises(UsageError, match=f"job {road.id} runs and writes s3://b/x/checkpoints/demo/ar,"):
        submit.check_no_other([running(road)], ar, ar.id, "")
    assert len(road.places) == len(set(road.places)) == 7
    serves = [read_work("serve", "serve.yaml", f"port={port}") for port in (8000, 8001)]
    with pytest.raises(UsageError, match="writes the cluster's server"):
        submit.check_no_other([running(serves[0])], serves[1], serves[1].id, "")


def test_a_job_that_doesnt_stop_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head whose job ends at the third question, or never."""
    questions: list[str] = []
    until = 3

    class Head(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"ray_version": ray.__version__, "version": "4", "session_name": "s"})

        def do_POST(self) -> None:
            self.answer({"stopped": True})

        def answer(self, values: dict[str, object]) -> None:
            if self.path == "/api/jobs/mine":
                questions.append(self.path)
                values = {"submission_id": "mine", "status": "STOPPED" if len(questions) > until else "RUNNING"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr(submit, "STOP_WAIT_S", 2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = ["jobs", "stop", "mine", "--address", f"http://127.0.0.1:{server.server_port}"]
        assert cli.main(words) == 0
        assert "job mine: stopped" in capsys.readouterr().out
        until = 1_000_000
        assert cli.main(words) == 1
        assert "job mine: still RUNNING after 4 s" in capsys.readouterr().out
        server.shutdown()


def test_only_sources_and_the_named_files_travel(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1")
    with submit.staged({"config/mine.yaml": tmp_path / "mine.yaml"}, ship_code=True) as folder:
        assert {path.name for path in folder.iterdir()} == {"nexusgen", "pipelines", "jobs", "config"}
        assert (folder / "jobs" / "configs" / "demo" / "road.yaml").is_file()
        assert not list(folder.rglob("__pycache__"))
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 30e6
    with submit.staged({"config/mine.yaml": tmp_path / "mine.yaml"}, ship_code=False) as folder:
        assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["config/mine.yaml"]


# --- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site"), num_workers=2) as made:
        yield made


@pytest.mark.timeout(1500)
def test_a_road_is_one_job_and_shows_no_secret(place: Site) -> None:
    code, made, log = place.submit("road", DEMO_CONFIGS / "road.yaml", *ROAD)
    assert code == 0, log[-3000:]
    assert (made["status"], made["submitted"], made["exit_code"]) == ("SUCCEEDED", True, 0)
    assert made["id"].startswith("road-road-")
    assert "== promote: done" in log
    (listed,) = place.jobs()
    assert (listed["id"], listed["status"], listed["job"]) == (made["id"], "SUCCEEDED", "road")
    assert not any(secret in json.dumps(listed) + log for secret in SECRETS.values())
    shown = httpx.get(f"{place.address}/api/jobs/", headers=bearer(place), timeout=60).text
    assert not any(secret in shown for secret in SECRETS.values())
    leaks = [str(path) for path in place.nodes.ray_logs() if b"held-by-the-nodes" in path.read_bytes()]
    assert not leaks


def bearer(place: Site) -> dict[str, str]:
    return {"Authorization": f"Bearer {place.nodes.token_path.read_text()}"}


@pytest.mark.timeout(600)
def test_what_doesnt_go_is_told_in_plain_words(place: Site, tmp_path: Path) -> None:
    jobs = ("jobs", "list", "--address", place.address)
    (tmp_path / "wrong").write_text("0" * 64)
    code, _, err = place.run(*jobs, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert code == 1
    assert f"refuses the token in {tmp_path / 'wrong'}: it isn't the cluster's" in err
    code, _, err = place.run(*jobs, RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert code == 1
    assert "asks for a token, and there is none here" in err
    code, _, err = place.run(*jobs, RAY_AUTH_TOKEN=place.nodes.token_path.read_text(), RAY_AUTH_TOKEN_PATH="")
    assert code == 0
    code, _, err = place.run("jobs", "logs", "nothing", "--address", place.address)
    assert code == 1
    assert f"the cluster at {place.address} knows no job nothing" in err


def test_another_version_is_refused(place: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(place.nodes.token_path))
    api = JobApi(place.address)
    api.check_versions()
    theirs = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.1.0")
    with pytest.raises(ResourceError, match=f"runs Ray {theirs}, this command Ray 2.1.0: they must agree"):
        api.check_versions()
    monkeypatch.setattr(ray, "__version__", theirs)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    with pytest.raises(ResourceError, match=f"runs Python {sys.version.split()[0]}, this command Python 3.99.1"):
        api.check_versions()


@pytest.mark.nodes
@pytest.mark.timeout(1500)
def test_a_job_is_attached_to_left_stopped_and_submitted_again(place: Site) -> None:
    port = free_port()
    serve = ("serve", DEMO_CONFIGS / "serve.yaml", f"storage={STORAGE}", f"port={port}", "model=demo-base")
    at = ("--address", place.address)
    code, out, err = place.run("submit", *serve, *at, "--no-follow", "--json")
    assert code == 0, err
    made = json.loads(out)
    # With another setting it would be a second driver.
    code, _, err = place.run("submit", *serve, "queue_size=3", *at)
    assert code == 2, err
    assert f"nexusgen jobs stop {made['id']} --address {place.address}" in err
    code, _, err = place.run("submit", *serve, "queue_size=3", "--id", made["id"], *at)
    assert code == 2, err
    assert "runs under this id, with other settings" in err
    # Submitted again while it runs: attached to. Ctrl-C leaves it running.
    process = place.start("submit", *serve, *at)
    assert process.stderr is not None
    lines = []
    while not any("attached to it" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"nexusgen jobs stop {made['id']} --address {place.address}" in err
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while not answers(url):
        assert time.monotonic() < deadline, place.run("jobs", "logs", made["id"], *at)[1][-3000:]
        time.sleep(1)
    # A second Ctrl-C stops it.
    process = place.start("submit", *serve, *at)
    assert process.stderr is not None
    while "attached to it" not in process.stderr.readline():
        pass
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "is told to stop" in err
    code, out, _ = place.run("jobs", "stop", made["id"], *at)
    assert f"job {made['id']}: stopped" in out
    # Submitted again after its end: another attempt.
    code, out, err = place.run("submit", *serve, *at, "--no-follow", "--json")
    assert json.loads(out)["id"] == f"{made['id']}-2"
    place.run("jobs", "stop", f"{made['id']}-2", *at)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.nodes
@pytest.mark.timeout(600)
def test_the_jobs_own_exit_code_is_given(place: Site) -> None:
    settings = (f"storage={STORAGE}", "name=none", "ar=null", "generation_decoder=null")
    code, made, log = place.submit(
        "register", DEMO_CONFIGS / "register.yaml", *settings, "model=models:/nexusgen/999", "--id", "mine"
    )
    assert (code, made["id"], made["exit_code"]) == (2, "mine", 2), log[-2000:]
    code, made, log = place.submit("register", DEMO_CONFIGS / "register.yaml", *settings, "model=/nowhere")
    assert (code, made["exit_code"]) == (1, 1)
    assert "model /nowhere: there is no such folder" in log
