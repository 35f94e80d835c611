"""Checks of a method's options and ranks: what is refused, in one wording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from lora_init.factors import LoraInitError


def require(method: str, option: str, value: object, ok: bool, what: str) -> None:
    """Raises `LoraInitError` unless `ok`, which says that the option's value is `what`."""
    if not ok:
        raise LoraInitError(f"{method}: {option} must be {what}, got {value!r}")


def check_choice(method: str, option: str, value: object, choices: Sequence[str]) -> None:
    """Raises `LoraInitError` unless the value is one of the choices."""
    require(method, option, value, value in choices, f"one of {', '.join(choices)}")


def check_positive(method: str, option: str, value: object) -> None:
    """Raises `LoraInitError` unless the value is a finite number > 0."""
    require(method, option, value, is_number(value) and value > 0, "a number > 0")


def check_rank(name: str, r: int, most: int, of: str, why: str) -> None:
    """Raises `LoraInitError` if the rank of the layer `name` is above `most`, the size `of` it."""
    if r > most:
        raise LoraInitError(
            f"{name}: r = {r} exceeds {of} = {most}, {why}: lower r for this layer (rank_pattern)"
        )


def is_count(value: object, least: int) -> bool:
    """Whether it is a whole number ≥ `least`, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
