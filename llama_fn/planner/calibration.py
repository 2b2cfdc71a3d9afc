"""What a machine measured of itself (check_npu --graphs) in the place of the figures of a data sheet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_fn.errors import UserError
from llama_fn.hardware import Hardware

FORMAT = "llama_fn.check_npu/1"
REPORT = "report.json"
_MAKE = "python -m llama_fn.tools.check_npu --graphs=DIR writes one on a machine with NPUs"


def calibrated(hardware: Hardware, path: Path) -> Hardware:
    """`hardware` with the rates of a report, as far as it has them. MFU still counts from the rate of the data sheet.

    UserError for a file that is no report, that is one of other hardware, or whose rates are no positive numbers.
    """
    report = read_report(path, "--calibration")
    if report.get("hardware") != hardware.name:
        raise UserError(
            f"--calibration={path} was measured on {report.get('hardware')} and --hardware is {hardware.name}: name "
            "the hardware that was measured, or leave --calibration out"
        )
    axes = [row for row in _axes(path, report) if row["devices"] > 1]
    found = {
        "peak_flops_per_s": _rate(path, report, "matmul_flops_per_s"),
        "hbm_bytes_per_s": _rate(path, report, "hbm_bytes_per_s"),
        "link_bytes_per_s": min((row["bytes_per_s"] for row in axes if row["inside"]), default=None),
        "network_bytes_per_s": min((row["bytes_per_s"] for row in axes if not row["inside"]), default=None),
    }
    known: dict[str, Any] = {name: rate for name, rate in found.items() if rate is not None}
    if not known:
        raise UserError(f"--calibration={path} has no rates: it was written on a machine without an NPU. {_MAKE}")
    rest = ", ".join(name for name, rate in found.items() if rate is None)
    source = f"measured {report.get('date')} ({path})" + (f"; {rest} as published" if rest else "")
    return replace(hardware, rated_flops_per_s=hardware.peak_flops_per_s, source=source, **known)


def read_report(path: Path, flag: str) -> dict[str, Any]:
    """What is in the file that `flag` names; UserError where that is no report."""
    try:
        report = json.loads(path.read_bytes())
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("format") != FORMAT or "hardware" not in report:
        raise UserError(f"{flag}={path} is no report of format {FORMAT}. {_MAKE}")
    return report


def _rate(path: Path, report: dict[str, Any], key: str) -> float | None:
    rate = report.get(key)
    if rate is not None and not _positive(rate):
        raise UserError(f"--calibration={path}: {key} is {rate!r}, and should be a positive number or null")
    return rate


def _axes(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = report.get("axes") or []
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and _positive(row.get("devices")) and _positive(row.get("bytes_per_s"))
        and isinstance(row.get("inside"), bool)
        for row in rows
    )  # fmt: skip
    if not good:
        raise UserError(
            f"--calibration={path}: axes should be a list of rows with axis, devices, inside (true or false) and "
            "bytes_per_s (positive)"
        )
    return list(rows)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
