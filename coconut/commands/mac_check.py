"""`mlx-coconut mac-check`: the first hour on a Mac as one command, which writes down what it saw.

Each check says what it measured and whether that is as it should be; one that fails does not stop
the others.
"""

import argparse
import importlib
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from coconut import __version__
from coconut.backend import MakeBackend
from coconut.commands.checks import CHECKS, Bench
from coconut.errors import UserError, guarded, options_of
from coconut.files import read_json, write_json
from coconut.reporting.console import silenced
from coconut.world import wanted_device


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Check this machine, or make a table of what was written on several."""
    parser = options_of(twin, "mac-check", "Check that MLX computes as it should on this machine.")
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", help=", ".join(names))
    parser.add_argument("--out", default="mac-check.json", metavar="FILE", help="what is written")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print these files as a table")
    options = parser.parse_args(argv)
    if options.table:
        return guarded(lambda: print(table([read_json(Path(name)) for name in options.table])))
    return guarded(lambda: check_all(twin, make_backend, options))


def check_all(twin: str, make_backend: MakeBackend, options: argparse.Namespace) -> None:
    """Run the checks, say each, write the file; status 1 if one is not as it should be."""
    if twin != "mlx_coconut":
        raise UserError("mac-check", "checks MLX; use mlx-coconut mac-check")
    probes = importlib.import_module(f"{twin}.probes")
    seen: dict[str, Any] = {"machine": machine(probes), "checks": {}}
    on_gpu = importlib.import_module(f"{twin}.backend").start_device(wanted_device(None), False)
    print(" | ".join(f"{name} {value}" for name, value in seen["machine"].items()))
    with tempfile.TemporaryDirectory() as folder:
        for check in CHECKS:
            if options.only and check.__name__ not in options.only:
                continue
            bench = Bench(twin, make_backend, probes, Path(folder), on_gpu)
            found = one_check(check, bench)
            seen["checks"][check.__name__] = found
            rest = ", ".join(f"{n} {shown(v)}" for n, v in found.items() if n not in ("ok", "took"))
            state = "ok   " if found["ok"] else "WRONG"
            print(
                f"{state} {check.__name__} ({check.__doc__}): {rest} | {found['took']:.1f} s",
                flush=True,
            )
    write_json(Path(options.out), seen)
    wrong = [name for name, found in seen["checks"].items() if not found["ok"]]
    print(f"wrote {options.out}" + (f"; not as it should be: {', '.join(wrong)}" if wrong else ""))
    sys.exit(1 if wrong else 0)


def one_check(check: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """What a check saw, with its seconds; of one that fails, the error."""
    start = time.perf_counter()
    try:
        with silenced():
            found = check(bench)
    except Exception as error:
        found = {
            "ok": False,
            "error": f"{type(error).__name__}: {error}",
            "at": traceback.format_exc()[-600:],
        }
    return found | {"took": time.perf_counter() - start}


def machine(probes: ModuleType) -> dict[str, Any]:
    """System, chip, memory and versions."""
    names = ("device", "device_name", "memory_size", "max_recommended_working_set_size", "mlx")
    mlx = probes.versions()
    found = {"system": platform.platform(), "python": platform.python_version()}
    return found | {"coconut": __version__} | {name: mlx[name] for name in names if name in mlx}


def shown(value: Any) -> str:
    """A number or a table of numbers in a line."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {shown(inner)}" for name, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(files: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of such files, a row a machine."""
    columns = {
        "tokens/s, batch 1": ("decoding", "tokens_per_second_batch_1"),
        "batch 8": ("decoding", "tokens_per_second_batch_8"),
        "update float32, s": ("update", "float32_seconds"),
        "bfloat16, s": ("update", "bfloat16_seconds"),
        "peak GB": ("memory", "peak_memory_bytes"),
        "ProsQA questions/s": ("demo", "samples_per_second"),
        "both right": ("demo", "both_accuracy"),
    }
    lines = [["chip", "system", "MLX", *columns, "not as it should be"]]
    lines.append(["---"] * len(lines[0]))
    for seen in files:
        about, checks = seen["machine"], seen["checks"]
        row = [str(about.get(name, "")) for name in ("device_name", "system", "mlx")]
        for check, name in columns.values():
            value = checks.get(check, {}).get(name)
            value = value / 1e9 if name == "peak_memory_bytes" and value is not None else value
            row.append("" if value is None else shown(float(value)))
        wrong = [name for name, found in checks.items() if not found["ok"]]
        lines.append([*row, ", ".join(wrong) or "none"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
