"""The check of a cluster of which this machine is no node: by a job, deleted afterwards."""

from __future__ import annotations

import contextlib
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ekd_ray.errors import UserError, hide_secrets
from ekd_ray.files import parse_json
from ekd_ray.scale.cluster import REACH_SECONDS
from ekd_ray.scale.cluster_check import QUESTIONS

LOOK_SECONDS = 1.0
AWAY_LOOKS = 4
JOB_SECONDS = 120.0  # for a job to start, beside what its questions may take


def check_from_outside(url: str, out: str | None, *, seconds: float) -> dict[str, Any]:
    """The values of a `ClusterReport`, from `ekd-ray cluster check` on the cluster's head.

    The versions of the driver are those of the head, where jobs' drivers run.

    Args:
        url: of the dashboard, `http://HOST:8265`; out, seconds: as of `check_cluster`.

    Raises:
        UserError: the dashboard does not answer or wants a token, the head has no ekd_ray, or the
            job did not end in time.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    with _in_sentences(url):
        client = JobSubmissionClient(url)
        # Ray tells the job its address.
        words = ["cluster", "check", "--json", "--timeout", f"{seconds:g}"]
        command = shlex.join([*words, *(["--out", out] if out else [])])
        job = client.submit_job(entrypoint=f"python -m ekd_ray {command}")
        try:
            limit = JOB_SECONDS + QUESTIONS * seconds
            deadline = time.monotonic() + limit
            while not (status := client.get_job_status(job)).is_terminal():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the cluster at {url} did not end a job in {limit:g} s: look at its head."
                    )
                time.sleep(LOOK_SECONDS)
            said = client.get_job_logs(job)
        finally:
            _delete(client, job)
    values = _values_in(said)
    if values is None or status not in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise UserError(_describe_failure(url, said))
    return values


@contextlib.contextmanager
def _in_sentences(url: str) -> Iterator[None]:
    """Make a `UserError` of what Ray's client says when there is no way in."""
    import ray.exceptions

    shown, answered = hide_secrets(url), False
    try:
        # Ray's own client would wait for ever.
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url.rstrip('/')}/api/version", timeout=REACH_SECONDS).close()
        answered = True
        yield
    except ray.exceptions.AuthenticationError:
        raise UserError(
            f"the cluster at {shown} wants its token: bring it here as ~/.ray/auth_token (or "
            "RAY_AUTH_TOKEN), and set RAY_AUTH_MODE=token."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if "No available agent" in reason:
            cure = (
                "its head may have begun just now, or another Ray of that machine has the port of "
                "its agent (ray start --dashboard-agent-listen-port PORT takes another)"
            )
        else:
            cure = "check --address, and that the head runs"
        verb = "takes no job from here" if answered else "does not answer"
        raise UserError(f"the dashboard of Ray at {shown} {verb} ({reason}): {cure}.") from None


def _delete(client: Any, job: str) -> None:
    """Stop a job that has not ended, and remove it from the list of jobs."""
    if not client.get_job_status(job).is_terminal():
        client.stop_job(job)
    # Ray looks after a job once a second, and writes one that it no longer finds down as failed:
    # a job is away when it stays away.
    away = 0
    for _ in range(20):
        if job in [known.submission_id for known in client.list_jobs()]:
            away = 0
            with contextlib.suppress(RuntimeError):  # it has not ended yet
                client.delete_job(job)
        elif (away := away + 1) == AWAY_LOOKS:
            return
        time.sleep(LOOK_SECONDS)


def _values_in(said: str) -> dict[str, Any] | None:
    """The JSON that the job has printed among what Ray says of it."""
    start, end = said.find("\n{\n"), said.rfind("}")
    with contextlib.suppress(ValueError):
        found = parse_json(said[start : end + 1]) if 0 <= start < end else None
        if isinstance(found, dict) and {"faults", "nodes", "versions", "token"} <= found.keys():
            return found
    return None


def _describe_failure(url: str, said: str) -> str:
    if "No module named ekd_ray" in said:
        return (
            f"the head of {url} has no ekd_ray for its `python`: install it there, or ask with the "
            f"code of a clone: ray job submit --address {url} --working-dir . -- python -m ekd_ray "
            "cluster check."
        )
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    last = errors or said.strip().splitlines() or ["error: it said nothing"]
    return f"the check on the head of {url} ended without an answer: {last[-1][:500]}"
