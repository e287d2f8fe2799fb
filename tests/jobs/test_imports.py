"""The loop and the torch engine need neither Ray nor DeepSpeed: a bare machine can train."""

import subprocess
import sys

from group import ROOT, environment

CODE = """
import sys
import jobs.loop, jobs.engine, jobs.checkpoint, jobs.config
print(sorted({name.split(".")[0] for name in sys.modules} & {"ray", "deepspeed", "vllm", "transformers"}))
"""


def test_the_loop_imports_without_ray_and_deepspeed():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
