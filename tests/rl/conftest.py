"""One local Ray for all tests of rl, with a token-free, dashboard-free cluster of its own."""

import pytest
import torch

from cluster import session

session.environment()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cluster():
    """CPUs are a count here, not cores: three runners and the driver share what the machine has."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=200 * 1024**2,
    )
    yield
    ray.shutdown()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDIFICE_HOME", str(tmp_path))
    return tmp_path
