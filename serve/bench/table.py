"""The table of a run, in Markdown: each row with its share of what the machine allows, then ours against the others."""

from dataclasses import dataclass

from serve.bench.arrivals import Rounds
from serve.bench.limits import Limits
from serve.bench.server import KINDS

COLUMNS = ("engine", "weights", "requests", "tokens/s", "spread", "of the limit", "first token ms", "P50 ms", "P99 ms")


@dataclass(frozen=True)
class Row:
    """What was measured of `rows` requests at a time."""

    engine: str
    form: str
    rows: int
    found: Rounds


class Table:
    """Lines are printed as they come."""

    def __init__(self, limits: Limits, parameters: int) -> None:
        self.limits, self.parameters = limits, parameters
        self.lines: list[str] = []
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def add(self, row: Row) -> None:
        if not self.rows:
            self.tell("")
            self.tell(f"| {' | '.join(COLUMNS)} |")
            self.tell(f"| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}")
        self.rows.append(row)
        found, share = row.found, row.found.rate / self.limits.rate(self.parameters, row.form, row.rows)
        name = f"edifice, HTTP {row.engine}" if row.engine in KINDS else row.engine
        times = " | ".join(f"{1e3 * seconds:.1f}" for seconds in (found.first, found.middle, found.late))
        self.tell(
            f"| {name} | {row.form} | {row.rows} | {found.rate:.0f} | {found.spread:.0%} | {share:.0%} | {times} |"
        )

    def note(self, line: str) -> None:
        """For the end."""
        self.notes.append(line)

    def close(self) -> None:
        """What the rows say together."""
        for line in ["", *(f"- {line}" for line in self._compared()), "", *(f"- {line}" for line in self.notes)]:
            if line or self.lines[-1]:
                self.tell(line)
        while not self.lines[-1]:
            self.lines.pop()

    def _compared(self) -> list[str]:
        by = {(row.engine, row.form, row.rows): row.found for row in self.rows}
        lines = []
        for (engine, form, rows), theirs in by.items():
            ours = by.get(("edifice", form, rows))
            if engine == "edifice" or ours is None:
                continue
            if engine in KINDS:
                part = theirs.rate / ours.rate
                lines.append(f"{rows} at a time over HTTP ({engine}): {part:.0%} of the engine's tokens/s")
            else:
                lines.append(f"{form}, {rows} at a time: {ours.rate / theirs.rate:.2f}x {engine}")
        most = max((row.rows for row in self.rows), default=0)
        for row in self.rows:
            if row.rows == most and row.form == "bf16" and row.engine in ("edifice", *KINDS):
                late = row.found.late / max(row.found.middle, 1e-9)
                lines.append(f"{most} at a time, {row.engine}: P99 between tokens is {late:.1f}x P50")
        return lines
