"""Ray beside an engine on the same cores: `python -m cluster.beside ray start --head`, or any other command.

The threads of an engine on a CPU meet at barriers some hundred times a step: whoever interrupts one of them stops all.
Ray's daemons, the proxy and the gateways wake up some thousand times a second, each time for very little. So

- they have the policy SCHED_BATCH: a thread that wakes up interrupts nobody, but runs when a core is free or at the
  scheduler's next tick, some milliseconds later, and gets as much of the machine as before. Policies are of threads,
  and inherited by the threads and processes that a thread starts. Only Linux has it; elsewhere nothing happens.
- a chunk passes through fewer threads on its way, by the variables in SETTINGS.
"""

import os
import sys

SETTINGS = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # between the proxy and gateways; not through Ray's objects
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # the proxy's loop does it, not another thread
}


def give_way() -> None:
    """The calling thread, and what it starts from now on, interrupt nobody when they wake up."""
    _follow("SCHED_BATCH")


def compute() -> None:
    """The calling thread, and what it starts from now on, may interrupt others, as is usual."""
    _follow("SCHED_OTHER")


def environment() -> None:
    """SETTINGS where nothing else is said, for the processes that are started from now on."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def _follow(policy: str) -> None:
    if sys.platform == "linux":
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m cluster.beside COMMAND [ARGUMENT ...]")
    give_way()
    environment()
    os.execvp(sys.argv[1], sys.argv[1:])
