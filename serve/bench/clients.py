"""Clients of a server, in a process of their own: `python -m serve.bench.clients URL MODEL`.

Each request streams over a connection of its own, and all are sent at once. One JSON line comes out, as of
`serve.bench.engines`. A chunk tells how many tokens have come (`continuous_usage_stats`), for the server may send
several together; what lies between two chunks is what a reader waits.
"""

import argparse
import asyncio
import json
import time
from urllib.parse import urlsplit

from serve.bench import checkpoint
from serve.bench.arrivals import Round, Stream

_COUNT = b'"completion_tokens":'


async def ask(host: str, port: int, body: bytes, begin: float) -> Stream:
    """Over HTTP/1.1 by hand: a client that computes little, for it runs beside the server. OSError when it breaks."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    stream: Stream = []
    status = await reader.readline()
    async for line in reader:
        if line.startswith(b"data: {"):  # between them are the frames of the transfer
            count = int(line.rpartition(_COUNT)[2].partition(b",")[0])
            if not stream or count > stream[-1][1]:
                stream.append((time.perf_counter() - begin, count))
        elif line.startswith(b"data: [DONE]"):
            writer.close()
            return stream
    raise OSError(f"a stream broke off after {len(stream)} chunks: {status.decode().strip()}")


async def measured(url: str, model: str, prompts: list[list[int]], tokens: int) -> Round:
    parts = urlsplit(url)
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    bodies = [json.dumps(body | {"prompt": prompt}).encode() for prompt in prompts]
    begin = time.perf_counter()
    streams = await asyncio.gather(*(ask(parts.hostname, parts.port, one, begin) for one in bodies))
    if short := [stream[-1][1] for stream in streams if stream[-1][1] != tokens]:
        raise OSError(f"{short[0]} tokens came where {tokens} were asked for")
    return Round.of(streams)


async def _all(args: argparse.Namespace) -> dict[int, dict]:
    found, draw = {}, 0
    for rows in args.rows:
        until, runs = time.monotonic() + args.warm, []
        while len(runs) < args.rounds:
            warming = time.monotonic() < until or not draw
            draw += 1
            prompts = checkpoint.prompts(rows, args.prompt, args.vocab, draw)
            one = await measured(args.url, args.model, prompts, args.tokens)
            if not warming:
                runs.append(one.json())
        found[rows] = {"rounds": runs}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve.bench.clients", description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=float, default=6.0, help="seconds with each number of requests before it counts")
    args = parser.parse_args()
    print("\n" + json.dumps(asyncio.run(_all(args))), flush=True)


if __name__ == "__main__":
    main()
