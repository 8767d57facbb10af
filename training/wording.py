"""How numbers are said."""

from __future__ import annotations

HOUR_S, DAY_S = 3600, 86_400
FLOP_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def counted(number: float, noun: str) -> str:
    """1 step; 1,250 steps; 22.6 epochs."""
    return f"{number:,}".removesuffix(".0") + f" {noun}{'' if number == 1 else 's'}"


def flop(number: float) -> str:
    """23.05 EFLOP, 575.80 TFLOP, 0.12 GFLOP."""
    size, unit = next((pair for pair in FLOP_UNITS if number >= pair[0]), FLOP_UNITS[-1])
    return f"{number / size:,.2f} {unit}"


def duration(seconds: float) -> str:
    """4 d 07 h, 3 h 05 min, 12 min 08 s."""
    whole = round(seconds)
    for size, unit, part, part_unit in (
        (DAY_S, "d", HOUR_S, "h"),
        (HOUR_S, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02} {part_unit}"
    return f"{whole} s"
