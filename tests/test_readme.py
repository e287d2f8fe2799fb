"""The README's commands and programs, run as they stand there; `make demo` in its short form, with the tiny recipe."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = [body.strip() for language, body in BLOCKS if language == "bash"]
PROGRAMS = [body for language, body in BLOCKS if language == "python"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(home), "EDIFICE_HOME": str(home / ".edifice")}


def run(command, environment, timeout=300):
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_the_readme_has_what_is_tested_here():
    assert "make demo" in COMMANDS and "make test" in COMMANDS and len(PROGRAMS) == 2
    assert "@" not in (ROOT / "README.md").read_text().replace("@serve", ""), "a number is still to be filled in"


def test_make_demo_in_short(environment):
    out = run("RECIPE=tiny bash infra/demo.sh --name readme --steps 6", environment)
    assert "bits" in out and re.search(r"completion", out, re.I), out[-2000:]


def test_train_serve_and_ask(environment):
    trainings = [command for command in COMMANDS if command.startswith("python -m jobs.pretrain")]
    assert len(trainings) == 3
    for command in trainings:
        run(command, environment)
    for command in COMMANDS:
        if command.startswith(
            ("python -m jobs.evaluate", "python -m jobs.compare", "python -m models", "python -m kernels")
        ):
            run(command, environment)
    serving = next(command for command in COMMANDS if command.startswith("serve run"))
    server = subprocess.Popen(
        serving, shell=True, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.5)
        program = next(program for program in PROGRAMS if "openai" in program)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def test_python_program(environment):
    program = next(program for program in PROGRAMS if "init_state" in program)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "gated_deltanet" in done.stdout, done.stderr[-2000:]
