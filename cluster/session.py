"""One way into Ray: inside a submitted job its cluster, with RAY_ADDRESS that cluster, otherwise a local one.

Ray clusters want a token. `ray.init()` and `ray start --head` make and use `~/.ray/auth_token` for themselves only, and
the `ray job` command does not look for it: it fails with "RAY_AUTH_MODE is currently 'disabled'". So every process that
talks to a cluster should have RAY_AUTH_MODE in its environment; `environment()` sets it before ray is imported,
and child processes inherit it.
"""

import os
import socket
from pathlib import Path

from cluster import beside


def environment() -> None:
    """Environment variables that ray reads when it is imported. Call it before anything imports ray."""
    if "RAY_AUTH_MODE" not in os.environ and (
        {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or (Path.home() / ".ray" / "auth_token").exists()
    ):
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two progress lines are not one line said twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a dead worker is noticed
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # its start prints an error; nobody asks it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset, each start warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def serving(cpus: int = 2) -> None:
    """Starts a cluster of this machine alone, to serve on: `serve.start` and `serve.run` come next.

    cpus: CPUs it offers. All of it gives way to what computes (`cluster.beside`), and the calling thread too.
    """
    import ray
    import ray.serve  # before the settings, which are not for this process: its handles need a loop of their own

    beside.give_way()
    beside.environment()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, namespace="serve")


def connect(cpus: int = 0) -> bool:
    """Connects this process; True when it is to a cluster that was there, False when to one of its own.

    cpus: CPUs a cluster of its own offers at least, also when the machine has fewer.
    RuntimeError, one line, when RAY_ADDRESS names a cluster that does not answer.
    """
    environment()
    import ray

    if ray.is_initialized():
        return True
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # "local" and not the default: a stale /tmp/ray/ray_current_cluster would be taken for a running cluster.
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cpus), log_to_driver=True, logging_level="ERROR")
        return False
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=True, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}); unset it to use this machine alone"
        ) from None
    return True


def _knock(address: str) -> None:
    """OSError when nothing listens at host:port; ray.init would try for minutes. Other forms of address are ray's."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
