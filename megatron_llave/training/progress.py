"""How a run goes, as lines for people: a short one that fits a terminal, and a long one for progress.log.

logger.py makes the lines and writes them; the numbers of every step are in log.jsonl.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Console
from rich.text import Text

LINE_WIDTH = 80
"""Largest number of columns of a progress line."""
NOTABLE_WAIT = 0.05
"""Share of an interval that was spent waiting for data, from which the progress line says so."""
DAY = 86400
"""Seconds."""
LONG = {
    "learning rate": ("learning_rate", "{:.3g}"),
    "gradient norm": ("gradient_norm", "{:.3g}"),
    "temperature": ("temperature", "{:.4g}"),
    "alpha": ("alpha", "{:.3g}"),
    "positive": ("positive_similarity", "{:.3f}"),
    "hardest negative": ("hardest_negative_similarity", "{:.3f}"),
    "AUC": ("similarity_auc", "{:.3f}"),
    "TFLOP/s": ("tflops", "{:.3g}"),
    "MFU": ("mfu", "{:.1%}"),
    "negatives age": ("negatives_age", "{:d}"),
    "bad steps": ("bad_steps", "{:d}"),
    "memory GB": ("memory_gb", "{:.2f}"),
}
"""Name in the long line -> key of the record of the step, and its format."""

Number = float | int | str | None


@dataclass
class Interval:
    """Sums over the steps since the last progress line."""

    steps: int = 0
    loss: float = 0.0
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    margins: list[float] = field(default_factory=list)
    """Those of the steps that have one."""

    def add(self, record: Mapping[str, Number]) -> None:
        """Count the record of a step."""
        self.steps += 1
        self.loss += record["loss"]
        self.pairs += record["pairs"]
        self.tokens += record.get("tokens", 0)
        self.seconds += record["seconds"]
        self.data_seconds += record.get("data_seconds", 0.0)
        margin = record.get("similarity_margin", math.nan)
        self.margins += [margin] if math.isfinite(margin) else []

    def per_second(self, count: int) -> float:
        """The rate of something of which there were `count`."""
        return count / max(self.seconds, 1e-9)

    @property
    def waiting(self) -> float:
        """Share of the time that was spent waiting for data."""
        return self.per_second(self.data_seconds)

    @property
    def margin(self) -> float | None:
        """Mean margin; None where no step had one."""
        return sum(self.margins) / len(self.margins) if self.margins else None


@dataclass
class Total:
    """Sums over the steps since the start of this process."""

    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, record: Mapping[str, Number]) -> None:
        """Count the record of a step."""
        self.steps += 1
        self.skipped += record["skipped"]
        self.seconds += record["seconds"]

    def remaining(self, steps: int) -> float:
        """Seconds that further steps take at the mean pace."""
        return steps * self.seconds / max(1, self.steps)


@dataclass(frozen=True)
class Field:
    """A part of the short line."""

    name: str
    value: str
    order: int
    """Fields are left out in this order where the line would be too wide; 0: never."""
    style: str = ""
    unit: str = ""

    def text(self) -> Text:
        """The field with its colours."""
        return Text.assemble((self.name, "dim"), (self.value, self.style), (self.unit, "dim"))


def short_line(record: Mapping[str, Number], steps: int, interval: Interval, total: Total, width: int) -> Text:
    """The line of at most `width` columns; numbers have fixed widths, so that the lines of a run are aligned.

    Loss, margin, throughput and waiting are means since the last line, and the remaining time is that at the mean pace.
    Left out where the line would be too wide, one after the other: memory, margin, wait for data, throughput, the count
    of skipped pairs, and the remaining time.
    """
    loss, margin = interval.loss / interval.steps, interval.margin
    fields = [
        Field("step ", f"{record['step']:{len(str(steps))}d}/{steps}", 0),
        Field("loss ", fixed(loss, 6), 0, "" if math.isfinite(loss) else "bold red"),
        Field("", fixed(interval.per_second(interval.pairs), 5), 4, unit=" pairs/s"),
        Field("ETA ", f"{duration(total.remaining(steps - record['step'])):>6}", 6),
    ]
    if margin is not None:
        fields.append(Field("margin ", fixed(margin, 5), 2))
    if "memory_gb" in record:
        fields.append(Field("", fixed(record["memory_gb"], 4), 1, unit="GB"))
    if total.skipped:
        fields.append(Field("skipped ", str(total.skipped), 5, "yellow"))
    if interval.waiting >= NOTABLE_WAIT:
        fields.append(Field("wait ", f"{interval.waiting:.0%}", 3, "yellow"))
    line = _joined(fields)
    while line.cell_len > width and any(one.order for one in fields):
        fields.remove(min((one for one in fields if one.order), key=lambda one: one.order))
        line = _joined(fields)
    return line


def long_line(record: Mapping[str, Number], steps: int, interval: Interval, total: Total) -> str:
    """Everything that is known of an interval, with the time of day; numbers of LONG are those of its last step."""
    margin = {} if interval.margin is None else {"margin": f"{interval.margin:.3f}"}
    values = {name: (record.get(key), form) for name, (key, form) in LONG.items()}
    fields = {
        "step": f"{record['step']}/{steps}",
        "subset": record.get("subset"),
        "loss": f"{interval.loss / interval.steps:.5g}",
        **margin,
        **{name: form.format(value) for name, (value, form) in values.items() if value is not None},
        "pairs/s": f"{interval.per_second(interval.pairs):.5g}",
        "tokens/s": f"{interval.per_second(interval.tokens):.5g}",
        "data wait": f"{interval.waiting:.1%}",
        "skipped": total.skipped,
        "elapsed": duration(total.seconds),
        "ETA": duration(total.remaining(steps - record["step"])),
    }
    said = " | ".join(f"{name} {value}" for name, value in fields.items() if value is not None)
    return f"{time_of_day()} {said}"


def time_of_day() -> str:
    """Date and time of this machine, with which the lines of progress.log begin."""
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}"


def columns(console: Console) -> int:
    """Width of a progress line: LINE_WIDTH, or that of a terminal which is narrower."""
    return min(LINE_WIDTH, console.width) if console.is_terminal else LINE_WIDTH


def show(console: Console, line: Text) -> None:
    """Write a line to standard output at once; coloured on a terminal, unless NO_COLOR is set.

    Raises:
        OSError: standard output has gone, or lies on a full disk.
    """
    with console.capture() as rendered:
        console.print(line, soft_wrap=True)
    sys.stdout.write(rendered.get())
    sys.stdout.flush()


def fixed(value: float, width: int) -> str:
    """A number of `width` columns, at least 4, with as many digits as fit: 2.4073, 12.407, 1.2e-5, nan.

    Numbers that need a longer exponent than such a column has are wider.
    """
    texts = [re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.{n}e}") for n in (1, 0)]
    if not math.isfinite(value) or value == 0 or abs(value) >= 10.0 ** (3 - width):
        texts = [*(f"{value:.{digits}f}" for digits in range(width - 2, -1, -1)), *texts]
    return next((text for text in texts if len(text) <= width), texts[-1]).rjust(width)


def duration(seconds: float) -> str:
    """A duration in at most six columns: 3m48s, 12h04m, 3d04h, 412d, or years as 7y."""
    seconds = round(seconds)
    days, hours, minutes = seconds // DAY, seconds // 3600 % 24, seconds // 60 % 60
    if not days:
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
    return f"{days}d{hours:02d}h" if days < 100 else f"{days}d" if days < 100_000 else f"{days // 365}y"


def _joined(fields: Sequence[Field]) -> Text:
    return Text("  ").join(one.text() for one in fields)
