"""A server to be measured, in a process of its own until its input ends: `python -m serve.bench.server KIND FOLDER`.

ray: the Ray Serve application, through Ray's proxy. direct: past the proxy. uvicorn: the same endpoints over an engine
in the server's own process. "ready URL" comes out when it answers.
"""

import argparse
import os
import socket
import sys
import time
import urllib.request

from cluster import session
from serve.bench.engines import LENGTH

KINDS = ("ray", "direct", "uvicorn")
DIRECT = 30000  # Ray Serve's first port for them


def ray(folder: str, threads: int, port: int) -> None:
    import ray
    from ray import serve

    from serve.app import build

    session.serving()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"model": folder, "name": "llama", "dtype": "bf16", "max_len": str(LENGTH), "cpus": "0"}
        serve.run(build(args), name="bench", route_prefix="/")
        until_it_ends(DIRECT if os.environ.get("RAY_SERVE_ENABLE_DIRECT_INGRESS") == "1" else port)
    finally:
        serve.shutdown()
        ray.shutdown()


def uvicorn(folder: str, threads: int, port: int) -> None:
    import threading

    import torch
    import uvicorn

    from serve.engine import Engine
    from serve.http.api import create_app
    from serve.http.served import Served, Service
    from serve.load import load
    from serve.worker import Worker, aside

    torch.set_num_threads(threads)

    def warmed() -> Engine:
        engine = load(folder, dtype="bf16", max_len=LENGTH)
        engine.warm()
        return engine

    worker = Worker(aside(warmed))
    app = create_app(Service.of(Served.local(worker, "llama")))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until_it_ends(port)
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()


def until_it_ends(port: int) -> None:
    """Says where the server is once it answers, and waits for the end of the input."""
    url, begin = f"http://127.0.0.1:{port}", time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"{url}/ready", timeout=5).close()
            break
        except OSError:
            if time.monotonic() - begin > 120:
                raise
            time.sleep(0.1)
    print(f"\nready {url}", flush=True)
    sys.stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.bench.server", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if args.kind == "direct":
        os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "1"  # before Ray is imported
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of replicas too; Ray would give each as many as its CPUs
    os.environ.pop("EDIFICE_API_KEYS", None)
    (uvicorn if args.kind == "uvicorn" else ray)(args.folder, args.threads, port)


if __name__ == "__main__":
    main()
