"""Progress of work measured in bytes: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time


class Progress:
    """`with Progress("encode", total) as progress: progress.add(bytes)`; total 0 when unknown."""

    def __init__(self, label: str, total: int = 0, quiet: bool = False, every: float = 5.0):
        self.label, self.total, self.every = label, total, every
        self.done, self.shown, self.started = 0, time.monotonic(), time.monotonic()
        self.bar = None
        self.plain = not quiet
        if not quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self.bar = progress.Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(label, total=total or None)
            self.plain = False

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def add(self, count: int) -> None:
        self.done += count
        if self.bar:
            self.bar.advance(self.task, count)
        elif self.plain and time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            self._line()

    def __exit__(self, kind, *_) -> None:
        if self.bar:
            self.bar.stop()
        elif self.plain and kind is None:
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        share = f" of {self.total / 1e6:.1f} MB" if self.total else " MB"
        left = f", {max(self.total - self.done, 0) / rate:.0f} s left" if self.total and rate else ""
        print(
            f"{self.label}: {self.done / 1e6:.1f}{share}, {rate / 1e6:.1f} MB/s{left}",
            file=sys.stderr,
            flush=True,
        )
