"""How figures are written: the interval decides the digits."""

import math

from kallm.results.schema import Column, Estimate

__all__ = ["count_decimals", "format_bytes", "format_count", "format_estimate", "format_number", "format_score"]

DIGITS_WITHOUT_INTERVAL = 4
MINUS = "−"


def count_decimals(value: float, half: float | None) -> int:
    """Return how many decimals carry meaning: two digits of the interval, or four digits of a value without one."""
    if half:
        return min(max(1 - math.floor(math.log10(abs(half))), 0), 6)
    if value == 0:
        return 1
    return min(max(DIGITS_WITHOUT_INTERVAL - 1 - math.floor(math.log10(abs(value))), 0), 6)


def format_number(value: float, decimals: int, *, signed: bool = False) -> str:
    """Return a number with a true minus sign, thousands apart, and no negative zero."""
    text = f"{abs(value):,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return (MINUS if value < 0 else "+" if signed else "") + text


def format_score(value: float, column: Column, half: float | None = None) -> str:
    """Return one figure of a column, in percent where the column is a share."""
    scale = 100.0 if column.percent else 1.0
    decimals = count_decimals(value * scale, half * scale if half else None)
    return format_number(value * scale, min(decimals, 1) if column.percent and not half else decimals)


def format_estimate(estimate: Estimate, column: Column) -> str:
    """Return ``2.134 ± 0.012``, or the mean alone where one seed (or none) leaves the interval undefined."""
    mean = format_score(estimate.mean, column, estimate.half)
    if estimate.half is None:
        return mean
    scale = 100.0 if column.percent else 1.0
    decimals = count_decimals(estimate.mean * scale, estimate.half * scale)
    return f"{mean} ± {format_number(estimate.half * scale, decimals)}"


def format_count(count: int) -> str:
    """Return a parameter or token count in millions with four digits: ``39.38 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.{max(3 - len(str(int(count / size))) + 1, 0)}f} {unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Return bytes in GiB or MiB with three digits."""
    size, unit = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
