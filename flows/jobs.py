"""Jobs of a Ray cluster: one is started or joined, its log followed over interruptions, its exit code told."""

import asyncio
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from csm.errors import InputError
from flows.progress import say

CONNECT_SECONDS, RETRY_SECONDS = 5.0, 3.0
QUIET_SECONDS = 30.0  # without a line, after which it is asked whether job and head are still there
STARTING_SECONDS = 60.0  # in which a head that answers may not take jobs yet
GIVE_UP_SECONDS = 300.0  # without an answer
UNREACHABLE = (
    OSError,
    RuntimeError,
    ValueError,
    aiohttp.ClientError,
    AuthenticationError,
)  # RuntimeError: an answer other than 200


class Jobs:
    """The Jobs API at ``url``.

    Raises:
        InputError: it is no such address, nobody answers there, or the cluster's token is not known here.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            self.host = None
        if not self.host or parts.scheme not in ("http", "https") or "@" in parts.netloc:
            raise InputError("--submit: expected http://HEAD:8265, the address of the cluster's dashboard")
        self.url = url.rstrip("/")
        for name in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env.packaging",
        ):
            logging.getLogger(name).setLevel(logging.WARNING)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # else Ray would ask a RAY_ADDRESS of the environment instead
        try:
            self.require_answer()
            self.client = JobSubmissionClient(self.url)
        except AuthenticationError:
            raise InputError(
                f"--submit {url}: the cluster asks for its token: export RAY_AUTH_MODE=token, and put the token into ~/.ray/auth_token or "
                "RAY_AUTH_TOKEN"
            ) from None
        except UNREACHABLE as error:
            raise InputError(
                f"--submit {url}: no Ray dashboard answers there ({_line(error)}); check the address, or open a tunnel "
                "(ssh -N -L 8265:HEAD:8265 HEAD)"
            ) from None

    def require_answer(self) -> None:
        """Raise ``OSError`` within seconds if nobody listens."""
        socket.create_connection((self.host or "", self.port), timeout=CONNECT_SECONDS).close()

    def start(self, name: str, entrypoint: str, folder: Path) -> tuple[str, bool]:
        """Start a job ``name`` in a copy of ``folder``, or join the one that is not yet over; after that comes ``name-2``.

        Returns:
            Its id, and whether it was there already.
        """
        asked = time.monotonic()
        while True:
            earlier = {
                info.submission_id or "": info
                for info in self.client.list_jobs()
                if re.fullmatch(rf"{re.escape(name)}(-\d+)?", info.submission_id or "")
            }
            for job, info in earlier.items():
                if not info.status.is_terminal():
                    return job, True
            job = f"{name}-{len(earlier) + 1}" if earlier else name
            try:
                return self.client.submit_job(
                    entrypoint=entrypoint, submission_id=job, runtime_env={"working_dir": str(folder)}
                ), False
            except RuntimeError as error:
                if "No available agent" in str(error) and time.monotonic() - asked < STARTING_SECONDS:
                    time.sleep(RETRY_SECONDS)  # the head has only just been started
                elif "already exists" not in str(error):  # somebody else was quicker
                    raise InputError(f"--submit {self.url}: the job was refused ({_line(error)})") from None

    def info(self, job: str) -> JobDetails:
        """What the head knows of ``job`` now."""
        self.require_answer()
        return self.client.get_job_info(job)


def follow(jobs: Jobs, job: str, as_json: bool) -> int:
    """Print the log of ``job`` until it ends: to stderr, its last line with ``as_json`` to stdout; returns its exit code.

    A head that does not answer is asked again for minutes.
    """
    log, since = _Log(as_json), None
    while True:
        try:
            asyncio.run(_tail(jobs, job, log))
            info = jobs.info(job)
            since = None
            if info.status.is_terminal():
                break
        except UNREACHABLE as error:
            if "does not exist" in str(error):
                say(f"job {job}: {jobs.url} no longer knows it, as after a restart of the head; the same command goes on")
                return 1
            if since is None:
                say(f"job {job}: {jobs.url} does not answer ({_line(error)}); asking again")
                since = time.monotonic()
            if time.monotonic() - since > GIVE_UP_SECONDS:
                say(f"job {job}: no answer for {GIVE_UP_SECONDS / 60:.0f} minutes; the same command follows it again")
                return 1
        time.sleep(RETRY_SECONDS)
    done = info.status == JobStatus.SUCCEEDED
    log.close(done)
    if done:
        return 0
    if info.status == JobStatus.STOPPED:
        say(f"job {job}: stopped; the same command goes on")
        return 130
    if not info.driver_exit_code:
        say(f"job {job}: failed: {' '.join((info.message or '').split())}")
    return info.driver_exit_code or 1


async def _tail(jobs: Jobs, job: str, log: "_Log") -> None:
    """Give ``log`` what comes, until the job ends; raises if the head no longer answers."""
    chunks = jobs.client.tail_job_logs(job)
    log.again()
    while True:
        chunk = asyncio.ensure_future(anext(chunks, None))
        while not chunk.done():
            await asyncio.wait({chunk}, timeout=QUIET_SECONDS)
            # A connection that was cut, as by a laptop that slept, would be waited at for ever.
            if not chunk.done() and (await asyncio.to_thread(jobs.info, job)).status.is_terminal():
                chunk.cancel()
                return
        text = chunk.result()
        if text is None:
            return
        log.add(text)


class _Log:
    """A log that is told from its start each time, and printed once."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._printed, self._seen, self._last = as_json, 0, 0, ""

    def again(self) -> None:
        """The log begins anew."""
        self._seen = 0

    def add(self, text: str) -> None:
        """Print what is new in ``text``; the last line is kept back, as it may be the result."""
        new = text[max(0, self._printed - self._seen) :]
        self._seen += len(text)
        self._printed = max(self._printed, self._seen)
        if new:
            lines = (self._last + new).splitlines(keepends=True)
            self._last = lines.pop() if self._as_json or not lines[-1].endswith("\n") else ""
            self._write(sys.stderr, "".join(lines))

    def close(self, done: bool) -> None:
        """Print the last line: of a job that is ``done``, the result."""
        self._write(sys.stdout if done and self._as_json else sys.stderr, self._last)

    @staticmethod
    def _write(stream: Any, text: str) -> None:
        stream.write(text)
        stream.flush()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
