"""A cluster's job API, as `submit`, `jobs` and `status` use it: who asks, which versions, jobs and their logs.

Ray's own client submits, stops and follows; it knows no time limit, and answers of a cluster that goes away would be
waited for without end. So what is only read is asked for here. Every request carries the token that Ray itself would
find, whatever RAY_AUTH_MODE says: a cluster without tokens ignores it.

Nothing here shows a job's runtime environment: Ray gives its variables in plain text to everyone who has the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nexusgen.errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_PORT = 8265  # of Ray's dashboard
CONNECT_S = 10.0
ANSWER_S = 20.0
HEAD_PATIENCE_S = 60.0  # a head that has just started doesn't know its own processes yet
FOLLOW_PATIENCE_S = 60.0  # a cluster that is followed may be silent so long
SILENCE_S = 20.0  # after so long without a log line, ask whether the job still runs
LAST_LINES_S = 10.0  # the log of a job that is over may come so late
RETRY_S = 1.0

OVER = ("SUCCEEDED", "FAILED", "STOPPED")
# Loggers of Ray's that set a level of their own.
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_INTERPRETER = re.compile(r"--dashboard_agent_command=(.+?) -u ")  # in the command line of a node's raylet


@dataclass(frozen=True)
class JobState:
    """One submitted job. Times are Unix seconds; `exit_code` is its driver's, None where that was lost or killed."""

    id: str
    status: str
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    message: str = ""
    metadata: Mapping[str, str] | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in OVER

    @classmethod
    def from_answer(cls, values: Mapping[str, Any]) -> JobState:
        """Of the API's JSON."""
        started, ended = values.get("start_time"), values.get("end_time")
        return cls(
            id=str(values["submission_id"]),
            status=str(values["status"]),
            started=started / 1000 if started else None,
            ended=ended / 1000 if ended else None,
            exit_code=values.get("driver_exit_code"),
            message=values.get("message") or "",
            metadata=values.get("metadata") or {},
        )


def find_token() -> tuple[str, str]:
    """Ray's token, and where it was found: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; or both "".

    Raises: InputError if the file that RAY_AUTH_TOKEN_PATH names can't be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    if not named and not path.is_file():
        return "", ""
    try:
        return path.read_text(encoding="utf-8").strip(), str(path)
    except OSError as error:
        raise InputError(f"the token file RAY_AUTH_TOKEN_PATH={named} can't be read: {error.strerror}") from None


def url_of(address: str) -> str:
    """The job API's URL for `host`, `host:port` or a URL. Raises: UsageError for anything else."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"--address {address}: wanted the cluster's dashboard, like http://head:{DEFAULT_PORT} "
            "(Ray's own ports, ray:// among them, don't take jobs)"
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else DEFAULT_PORT)
    except ValueError:
        raise UsageError(f"--address {address}: the port isn't a number from 0 to 65535") from None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


class JobApi:
    """The job API of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect. Raises: UsageError for the address; ResourceError if nothing answers or the token is refused."""
        self.url = url_of(address)
        self._token, self._token_place = find_token()
        self._headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        parts = urlsplit(self.url)
        try:
            socket.create_connection((parts.hostname or "", parts.port or DEFAULT_PORT), timeout=CONNECT_S).close()
        except OSError as error:
            raise ResourceError(
                f"no Ray cluster answers at {self.url} ({error}): start it, or correct --address; "
                "a dashboard that listens to its own machine alone (--dashboard-host) is reached through a tunnel"
            ) from None
        self.ray_version = str(self._get("/api/version").get("ray_version", "unknown"))

    def check_versions(self) -> None:
        """See that this side's Ray and Python are the cluster's, as code of one may not run on the other's.

        Raises: ResourceError naming both.
        """
        import ray

        theirs = str(self._get("/api/v0/cluster_metadata").get("data", {}).get("pythonVersion", "unknown"))
        pairs = {"Ray": (ray.__version__, self.ray_version), "Python": (platform.python_version(), theirs)}
        for what, (here, there) in pairs.items():
            if here.split(".")[:2] != there.split(".")[:2]:
                raise ResourceError(
                    f"the cluster at {self.url} runs {what} {there}, this command {what} {here}: they must agree in "
                    f"the first two numbers. Submit from an environment with {what} {there}, or start the cluster "
                    f"with {what} {here} (constraints.txt names the versions that are tested)"
                )

    def interpreter(self) -> str:
        """The Python that runs Ray on the head, where a job's driver runs. `python` is whatever PATH finds there."""
        deadline = time.monotonic() + HEAD_PATIENCE_S
        while time.monotonic() < deadline:
            for node in self._get("/nodes?view=summary").get("data", {}).get("summary", []):
                raylet = node.get("raylet", {})
                found = _INTERPRETER.search(" ".join(node.get("cmdline") or []))
                if raylet.get("isHeadNode") and raylet.get("state") == "ALIVE" and found is not None:
                    return found[1]
            time.sleep(RETRY_S)
        return "python"

    def jobs(self) -> list[JobState]:
        """All submitted jobs that the cluster remembers, oldest first."""
        answers = [values for values in self._get("/api/jobs/") if values.get("submission_id")]
        return sorted(map(JobState.from_answer, answers), key=lambda state: state.started or 0.0)

    def job(self, job_id: str) -> JobState:
        """One of them. Raises: InputError if the cluster doesn't know it."""
        values = self._get(f"/api/jobs/{job_id}", missing=self._unknown(job_id))
        if not values.get("submission_id"):  # Ray's number of a driver
            raise InputError(self._unknown(job_id))
        return JobState.from_answer(values)

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        return str(self._get(f"/api/jobs/{job_id}/logs", missing=self._unknown(job_id)).get("logs", ""))

    def submit(self, **values: Any) -> None:
        """As Ray's `submit_job`. Raises: FileExistsError if the id is taken; ResourceError if it is refused."""
        deadline = time.monotonic() + HEAD_PATIENCE_S
        while True:
            try:
                self._client().submit_job(**values)
                return
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise FileExistsError(values["submission_id"]) from None
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ResourceError(
                        f"the cluster at {self.url} refuses the job: {_last_line(str(error))}"
                    ) from None
            time.sleep(RETRY_S)

    def stop(self, job_id: str) -> bool:
        """Tell a job to end. False if it had ended already."""
        self.job(job_id)
        return bool(self._client().stop_job(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> JobState:
        """Write the job's log as it grows, from its beginning, until the job is over; gives how it ended.

        Lost connections are made anew. Raises: ResourceError if the cluster stays silent; InputError if it has
        forgotten the job.
        """
        reader = _LogReader(self, job_id, write)
        silent_since: float | None = None
        while True:
            with contextlib.suppress(_SilenceError):  # whether the job is still there is asked below
                asyncio.run(reader.read())
            try:
                state = self.job(job_id)
                silent_since = None
                if state.is_over:
                    return state
            except _SilenceError as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > FOLLOW_PATIENCE_S:
                    raise ResourceError(
                        f"{error}, for {FOLLOW_PATIENCE_S:g} s. The job may run on, or be lost with its head: when the "
                        "cluster answers again, the same `nexusgen submit` attaches to it or goes on from what is done"
                    ) from None
            time.sleep(RETRY_S)

    def _unknown(self, job_id: str) -> str:
        return (
            f"the cluster at {self.url} knows no job {job_id}; `nexusgen jobs list --address {self.url}` names them. "
            "A head that was started anew has forgotten its jobs: submit again, what is finished is kept"
        )

    def _get(self, path: str, missing: str = "") -> Any:
        """The JSON at a path. Raises: InputError with the text `missing` for a 404; ResourceError for no answer, or one
        that isn't a dashboard's.
        """
        import requests

        try:
            answer = requests.get(self.url + path, headers=self._headers, timeout=(CONNECT_S, ANSWER_S))
            if answer.status_code == 404 and missing:
                raise InputError(missing)
            self._check_token(answer.status_code)
            if answer.status_code == 404:
                raise ResourceError(f"{self.url} is no Ray cluster's dashboard: it has no {path}")
            if answer.status_code != 200:
                raise _SilenceError(f"the cluster at {self.url} answers {answer.status_code} to {path}")
            return answer.json()
        except ValueError:
            raise ResourceError(
                f"{self.url} is no Ray cluster's dashboard: what it gives at {path} isn't JSON"
            ) from None
        except requests.RequestException as error:
            raise _SilenceError(f"the cluster at {self.url} doesn't answer ({type(error).__name__})") from None

    def _check_token(self, status: int) -> None:
        if status not in (401, 403):
            return
        if not self._token:
            raise ResourceError(
                f"the cluster at {self.url} asks for a token, and there is none here: have `ray get-auth-token` print "
                "it on the head, write it to a file, and name the file in RAY_AUTH_TOKEN_PATH"
            )
        raise ResourceError(
            f"the cluster at {self.url} refuses the token in {self._token_place}: it isn't the cluster's. "
            "`ray get-auth-token` prints the right one on the head; RAY_AUTH_TOKEN_PATH names the file to read here"
        )

    def _client(self) -> JobSubmissionClient:
        """Ray's client. It would take RAY_ADDRESS or RAY_API_SERVER_ADDRESS in place of the address it is given."""
        from ray.job_submission import JobSubmissionClient

        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        hidden = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
        try:
            return JobSubmissionClient(self.url, headers=dict(self._headers))
        except OSError as error:  # those of `requests` among them
            raise _SilenceError(f"the cluster at {self.url} doesn't answer ({type(error).__name__})") from None
        except RuntimeError as error:
            raise ResourceError(f"the cluster at {self.url} doesn't take jobs: {_last_line(str(error))}") from None
        finally:
            os.environ.update({name: value for name, value in hidden.items() if value is not None})


class _SilenceError(ResourceError):
    """The cluster doesn't answer, at the moment."""


class _LogReader:
    """Reads a job's log through connections that may break; each begins with the log's beginning."""

    def __init__(self, api: JobApi, job_id: str, write: Callable[[str], None]) -> None:
        self._api, self._job_id, self._write = api, job_id, write
        self._num_written = 0  # characters

    async def read(self) -> None:
        """Until the job's log ends or the connection does. Raises: _SilenceError."""
        import aiohttp

        lines = self._api._client().tail_job_logs(self._job_id)
        num_read = 0
        pending = asyncio.ensure_future(anext(lines))
        over_since: float | None = None
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=LAST_LINES_S if over_since else SILENCE_S)
                if not done:
                    if over_since is not None:
                        return
                    state = await asyncio.to_thread(self._api.job, self._job_id)
                    over_since = time.monotonic() if state.is_over else None
                    continue
                text = pending.result()
                new = text[max(0, self._num_written - num_read) :]
                num_read += len(text)
                if new:
                    self._num_written += len(new)
                    self._write(new)
                pending = asyncio.ensure_future(anext(lines))
        except StopAsyncIteration:
            return
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise _SilenceError(f"the connection to {self._api.url} broke ({error})") from None
        finally:
            pending.cancel()


def _last_line(text: str) -> str:
    """Ray's answers to a refused request end with a traceback, and that with the reason."""
    lines = [line for line in text.replace("\\n", "\n").splitlines() if line.strip(" .\"'")]
    return lines[-1].strip(" .\"'") if lines else text
