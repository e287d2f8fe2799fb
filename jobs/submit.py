"""`python -m jobs.submit RECIPE ...`: a job for a running cluster; `ray job submit` with what it needs filled in.

Starts no cluster. The address is RAY_ADDRESS or the head's default on this machine; mistakes in the command are found
here, before anything is sent.
"""

import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from cluster import session
from jobs import cli
from jobs.config import check

ROOT = Path(__file__).parents[1]
DEFAULT = "http://127.0.0.1:8265"


def main(arguments: list[str]) -> None:
    job = cli.parse("jobs.submit", arguments)
    try:
        check(job)
    except ValueError as error:
        cli.fail(error)
    session.environment()
    address = os.environ.get("RAY_ADDRESS") or DEFAULT
    if address.startswith("http") and not answers(address):
        cli.fail(
            f"no Ray cluster answers at {address}; start one: RAY_AUTH_MODE=token ray start --head --block, "
            f"or set RAY_ADDRESS; without a cluster: python -m jobs.pretrain {shlex.join(arguments)}",
            code=1,
        )
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address]
    command += ["--working-dir", str(ROOT), "--", "python", "-m", "jobs.pretrain", *arguments]
    print(shlex.join(command[1:]), flush=True)
    raise SystemExit(subprocess.run(command, check=False).returncode)


def answers(address: str) -> bool:
    """Whether a dashboard is there. 401 is an answer too: it wants the token, which the ray command brings."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, TimeoutError, ValueError):
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
