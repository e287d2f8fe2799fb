"""Answers of models that take a whole input at once: images to classes, latents to images, texts to hidden states.

A `Predictor` runs one model in a thread. What comes within a moment and has the same shape is computed together; what
breaks a batch is found by computing each alone, and only whoever breaks alone is told so.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from cluster import beside
from models.model import Batch, Input, Model
from serve.http import tensors
from serve.worker import Busy, Failed


class Predicts(Protocol):
    """What answers for a model: a thread here (`Predictor`), or a replica elsewhere."""

    takes: Mapping[str, Input]
    created: int

    def check(self) -> None:
        """Raises Failed while nothing can be answered."""

    async def predict(self, inputs: Batch) -> Batch:
        """Outputs with a row for each row of `inputs`, which were read by `takes`.

        ValueError for what the model refuses, Busy, Failed; anything else broke in the model.
        """


@dataclass
class Job:
    """One call's tensors, and where its answer goes."""

    inputs: Batch
    rows: int
    answer: Future = field(default_factory=Future)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be computed together."""
        return tuple(sorted((name, tuple(tensor.shape[1:])) for name, tensor in self.inputs.items()))


class Predictor:
    """Runs `model.predict` in a thread. max_rows: of a call of the model. max_len: longest of the sizes that are free.

    wait: seconds for which a call waits for others. waiting: jobs that may wait before more are refused.
    """

    def __init__(
        self, model: Model, max_rows: int = 64, max_len: int = 2048, wait: float = 0.002, waiting: int = 256
    ) -> None:
        self.takes = model.takes()
        self.created = int(time.time())
        self.max_rows, self.max_len, self.wait, self.limit = max_rows, max_len, wait, waiting
        self.failure: BaseException | None = None
        self.calls = 0  # of the model
        self._model = model.eval()
        weight = next(model.parameters())
        self._place = {"device": weight.device, "dtype": weight.dtype}
        self._open = 0  # jobs not answered; belongs to the event loop
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="predictor", daemon=True)
        self._thread.start()

    # -- the event loop's side -----------------------------------------------------------------------------------

    def check(self) -> None:
        if self.failure is not None:
            raise Failed(f"the model stopped: {self.failure}")

    async def predict(self, inputs: Batch) -> Batch:
        self.check()
        count = tensors.rows(inputs)
        if count > self.max_rows:
            raise ValueError(f"inputs: {count} rows, at most {self.max_rows} in one request")
        longest = max(size for tensor in inputs.values() for size in tensor.shape[1:] or (0,))
        if longest > self._longest():
            raise ValueError(f"inputs: a row is {longest} long, at most {self._longest()} is allowed")
        if self._open >= self.limit:
            raise Busy(f"{self._open} requests are running or waiting already, try again later")
        job = Job(inputs, count)
        self._open += 1
        self._inbox.put(job)
        try:
            return await asyncio.wrap_future(job.answer)
        finally:
            self._open -= 1

    def stop(self) -> None:
        """Ends the thread after its present call; what waits gets Failed."""
        self._inbox.put(None)
        self._thread.join()

    def _longest(self) -> int:
        fixed = (size for wanted in self.takes.values() for size in wanted.shape if size is not None)
        return max(self.max_len, *fixed, 0)

    # -- the model's side ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        beside.compute()
        waiting: list[Job] = []
        try:
            while self._collect(waiting):
                self._answer(self._batch(waiting))
            self.failure = Failed("it was shut down")
        except BaseException as error:  # whatever it was, nobody may be left waiting
            self.failure = error
        while not self._inbox.empty():
            job = self._inbox.get()
            waiting += [job] if job is not None else []
        for job in waiting:
            job.answer.set_exception(Failed(f"the model stopped: {self.failure}"))

    def _collect(self, waiting: list[Job]) -> bool:
        """Waits for a job, and a moment more for others, until a batch is full. False: stop."""
        deadline = time.monotonic() + self.wait
        while True:
            full = sum(job.rows for job in waiting) >= self.max_rows
            left = 0.0 if full else max(0.0, deadline - time.monotonic())
            try:
                job = self._inbox.get(timeout=left if waiting else None)
            except queue.Empty:
                return True
            if job is None:
                return False
            if not waiting:
                deadline = time.monotonic() + self.wait
            waiting.append(job)

    def _batch(self, waiting: list[Job]) -> list[Job]:
        """Takes the oldest and those that go with it."""
        batch, count, kind = [], 0, waiting[0].kind
        for job in list(waiting):
            if job.kind == kind and count + job.rows <= self.max_rows:
                waiting.remove(job)
                batch.append(job)
                count += job.rows
        return [job for job in batch if job.answer.set_running_or_notify_cancel()]  # its client may have gone

    def _answer(self, batch: list[Job]) -> None:
        try:
            found = self._compute(batch) if batch else []
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:
                for job in batch:
                    self._answer([job])
            return
        for job, outputs in zip(batch, found, strict=True):
            job.answer.set_result(outputs)

    @torch.inference_mode()
    def _compute(self, batch: list[Job]) -> Iterable[Batch]:
        inputs = {name: torch.cat([job.inputs[name] for job in batch]) for name in batch[0].inputs}
        inputs = {
            name: tensor.to(**self._place) if tensor.is_floating_point() else tensor.to(self._place["device"])
            for name, tensor in inputs.items()
        }
        self.calls += 1
        outputs = self._model.predict(inputs)
        parts = {name: tensor.cpu().split([job.rows for job in batch]) for name, tensor in outputs.items()}
        return [{name: rows[index] for name, rows in parts.items()} for index in range(len(batch))]


def load(path: str, **options: Any) -> Predictor:
    """Of a run (its newest checkpoint) or a model folder. One line of ValueError when its model does not predict."""
    from models import hub
    from models.registry import supports

    model = hub.load(path)
    if "predict" not in supports(model):
        raise ValueError(f"{path}: {type(model).__name__} answers no whole input; it is a language model to be served")
    return Predictor(model.to("cuda" if torch.cuda.is_available() else "cpu"), **options)
