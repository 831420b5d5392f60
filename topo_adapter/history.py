"""What an adapter was trained on and what that cost: records that its config keeps, and its model card shows."""

from __future__ import annotations

import numbers
from typing import Any, TypedDict

from .errors import TopologyConfigError

#: Runs that a config keeps, the last ones.
MAX_RUNS = 32
_MAX_TEXT = 200
_KINDS: dict[str, type] = {
    "stage": str,
    "data": str,
    "steps": int,
    "tokens": int,
    "length": int,
    "seconds": float,
    "device": str,
    "versions": dict,
}


class TrainingRun(TypedDict, total=False):
    """One training of an adapter, or a process's part of one; what is not known is left out.

    stage: of `distill`, 'local' or 'kl'.
    data: name of the data set, or the last part of its path.
    steps: optimizer steps. tokens: that they read, on all devices. length: tokens of each row, where all have as many.
    seconds: wall time from the first step to the last, calibration of the dial during them included.
    device: name of the device, with their number before it if there are several.
    versions: of this library and those it stands on.
    """

    stage: str
    data: str
    steps: int
    tokens: int
    length: int
    seconds: float
    device: str
    versions: dict[str, str]


def checked_runs(value: Any) -> list[TrainingRun] | None:
    """The records of a config, copied; None if there are none.

    Raises:
        TopologyConfigError: they are not of this form, or more or longer than any are.
    """
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_RUNS:
        raise TopologyConfigError(
            f"training_runs must be a list of 1 to {MAX_RUNS} records or None, got {_kind(value)}"
        )
    return [_checked_run(run, number) for number, run in enumerate(value)]


def add_run(runs: list[TrainingRun] | None, run: TrainingRun) -> list[TrainingRun]:
    """The records with one more, the oldest of too many left out."""
    return [*(runs or []), _checked_run(run, 0)][-MAX_RUNS:]


def _checked_run(run: Any, number: int) -> TrainingRun:
    where = f"training_runs[{number}]"
    if not isinstance(run, dict) or not run.keys() <= _KINDS.keys():
        raise TopologyConfigError(f"{where} must be a dict with keys among {list(_KINDS)}, got {_kind(run)}")
    for name, entry in run.items():
        kind = _KINDS[name]
        if kind is str:
            _check_text(f"{where}[{name!r}]", entry)
        elif kind is dict:
            if not isinstance(entry, dict) or len(entry) > 20:
                raise TopologyConfigError(
                    f"{where}[{name!r}] must be a dict of at most 20 versions, got {_kind(entry)}"
                )
            for library, version in entry.items():
                _check_text(f"{where}[{name!r}] keys", library)
                _check_text(f"{where}[{name!r}] values", version)
        else:
            wanted: Any = numbers.Real if kind is float else int
            if not isinstance(entry, wanted) or isinstance(entry, bool) or not 0 <= entry < 2**63:
                raise TopologyConfigError(
                    f"{where}[{name!r}] must be {'a number' if kind is float else 'an integer'} >= 0 and < 2**63, got "
                    f"{_kind(entry)}"
                )
    copied: Any = {name: dict(entry) if isinstance(entry, dict) else entry for name, entry in run.items()}
    return copied


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise TopologyConfigError(f"{name} must be a text of at most {_MAX_TEXT} characters, got {_kind(value)}")


def _kind(value: Any) -> str:
    """What was got instead, in few words, however long it is."""
    size = f" of {len(value):,}" if isinstance(value, (str, list, tuple, dict)) else ""
    shown = f": {value!r}"[:_MAX_TEXT] if isinstance(value, (float, dict)) else ""
    return f"{type(value).__name__}{size}{shown}"
