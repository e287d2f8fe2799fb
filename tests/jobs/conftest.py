"""One real Ray head for all tests of jobs, with ports, a token and an EDIFICE_HOME of its own."""

import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from group import ROOT, environment, free_ports, wait


class Cluster(NamedTuple):
    """environment: of a process that uses the cluster through ray.init; dashboard: http address; home: EDIFICE_HOME."""

    environment: dict[str, str]
    dashboard: str
    home: Path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    sockets = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)  # their paths have 107 bytes
    gcs, dashboard, agent, client, metrics = free_ports(5)
    # The token is this cluster's own: whatever a person has in ~/.ray stays out of it.
    variables = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED=0,
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=1,
        EDIFICE_HOME=home,
    )
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--metrics-export-port={metrics}", f"--temp-dir={sockets.name}"]
    log = (home / "head.log").open("w")
    head = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait(lambda: head.poll() is not None or answers(address), 90, f"the head to answer ({home / 'head.log'})")
        assert head.poll() is None, (home / "head.log").read_text()[-2000:]
        yield Cluster({**variables, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}, address, home)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()
        sockets.cleanup()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address + "/api/version", timeout=2).close()
    except urllib.error.HTTPError:  # 401: it is there and wants the token
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One EDIFICE_HOME for a file whose runs are made in its own process, so that a corpus is prepared once."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDIFICE_HOME", str(tmp_path_factory.mktemp("home")))
        yield
