"""The batches of one worker, read ahead in a thread.

A step takes `batch` samples of the run, whatever the number of workers; a worker takes its contiguous slice
of them, cut into micro-batches. The cursor is the number of samples the whole run has consumed.
"""

import queue
import threading
from collections.abc import Iterator

from torch import Tensor

from jobs.data.index import Index

AHEAD = 2  # steps


class Loader:
    """Iterates for ever; each step is a list of `accumulate` micro-batches (see `Index.rows`) of this worker.

    index:      the rows; the loader's thread is from now on its only user
    batch:      samples in a step over all workers
    rank, world: this worker and the number of workers; world * accumulate has to divide batch
    cursor:     samples of the run consumed so far; `loader.cursor` counts on as steps are taken
    """

    def __init__(self, index: Index, batch: int, rank: int = 0, world: int = 1, accumulate: int = 1, cursor: int = 0):
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank={rank}, world={world}: rank has to be in 0 .. world-1")
        if accumulate < 1 or batch < 1 or batch % (world * accumulate):
            raise ValueError(
                f"batch={batch} cannot be split evenly: it has to be a multiple of "
                f"world x accumulate = {world} x {accumulate} = {world * accumulate}"
            )
        if cursor < 0:
            raise ValueError(f"cursor={cursor}: it counts samples, from 0")
        self.index, self.batch, self.cursor = index, batch, cursor
        self._rank, self._rows, self._accumulate = rank, batch // world, accumulate
        self._steps: queue.Queue = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(cursor,), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        return self

    def __next__(self) -> list[dict[str, Tensor]]:
        """The next step. An error of the reading thread is raised here, on this call and every later one."""
        if self._stopped.is_set():
            raise ValueError("this loader is closed")
        step = self._steps.get()
        if isinstance(step, BaseException):
            self._steps.put(step)
            raise step
        self.cursor += self.batch
        return step

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            try:  # it may wait for room
                self._steps.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read_ahead(self, cursor: int) -> None:
        try:
            while not self._stopped.is_set():
                rows = self.index.rows(cursor + self._rank * self._rows, self._rows)
                pieces = {name: tensor.chunk(self._accumulate) for name, tensor in rows.items()}
                self._steps.put([{name: pieces[name][i] for name in pieces} for i in range(self._accumulate)])
                cursor += self.batch
        except BaseException as error:
            self._steps.put(error)
