"""Measurements for the planner. benchmarks/plan_accuracy.py measures real runs and writes measured.json."""

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypedDict


class Measurements(TypedDict):
    """Content of measured.json. Each list has one item per benchmark case, with the relative error of the planner."""

    date: str
    hardware: str
    load_average: float
    process_bytes: dict[str, int]  # ZeRO stage -> resident memory of a rank with a tiny model
    kept_by_glibc: float  # fraction of freed activations that malloc keeps in its heap
    cpu_flops_per_rank: float
    memory: list[dict[str, Any]]
    default_malloc: list[dict[str, Any]]
    time: list[dict[str, Any]]


@lru_cache
def read_measurements() -> Measurements:
    return json.loads(files("trainer.planning").joinpath("measured.json").read_text(encoding="utf-8"))


def measured_errors() -> dict[str, Any]:
    """Return the planner's relative errors against real runs, with date, hardware and load average of the measurement.

    Each kind of error (memory, default_malloc, time) has a dict: number of cases, mean and largest absolute error.
    """
    measured = read_measurements()
    errors_by_kind = {
        "memory": [case["error"] for case in measured["memory"]],
        "default_malloc": [case["error_with_allowance"] for case in measured["default_malloc"]],
        "time": [case["error"] for case in measured["time"] if case["held_out"]],
    }
    result: dict[str, Any] = {key: measured[key] for key in ("date", "hardware", "load_average")}
    for kind, signed_errors in errors_by_kind.items():
        if errors := [abs(error) for error in signed_errors]:
            result[kind] = {"cases": len(errors), "mean": sum(errors) / len(errors), "largest": max(errors)}
    return result


def error_lines() -> list[str]:
    """Return `measured_errors` as lines of text, one line per kind of error."""
    errors = measured_errors()
    descriptions = {
        "memory": "memory, where malloc returns freed memory (MALLOC_MMAP_THRESHOLD_=65536)",
        "default_malloc": "memory of a CPU process, with default malloc",
        "time": f"time, under a load of {errors['load_average']:.0f}",
    }
    return [
        f"error against measurement, {text}: {errors[kind]['mean']:.0%} in the mean, {errors[kind]['largest']:.0%} "
        f"at most ({errors[kind]['cases']} runs, {errors['hardware']}, {errors['date']})"
        for kind, text in descriptions.items()
        if kind in errors
    ]
