"""`mlx-coconut analyse WHAT --model DIR --data FILE --out DIR`: what thoughts do, measured.

After section 5 of the Coconut paper (arXiv 2412.06769), with controls. Each analysis leaves three
files: NAME.json (every number), NAME.md (its table) and NAME.png, the same to the byte when run
again on the same machine.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.backend import MakeBackend
from coconut.checkpoints.named import add_model, too_low
from coconut.errors import UserError, guarded, options_of
from coconut.files import here_or_shipped, sha256, write_text
from coconut.inside.analyses import ablate, forced_k, height, parallelism, shifted
from coconut.inside.analyses.asking import SEED, Analysis, Options
from coconut.inside.findings import READINGS
from coconut.inside.graph import read_graph
from coconut.inside.lens import Lens
from coconut.reporting.console import Console
from coconut.tasks import prosqa

ANALYSES = {
    "forced-k": forced_k.ANALYSIS,
    "parallelism": parallelism.ANALYSIS,
    "height": height.ANALYSIS,
    "ablate": ablate.ANALYSIS,
    "ood": shifted.ANALYSIS,
}
"""Name on the command line -> what it does."""


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Run one analysis, or all, and write its files."""
    said = "\n".join(f"  {name:12} {analysis.help}" for name, analysis in ANALYSES.items())
    parser = options_of(twin, "analyse", "What thoughts do, over a data set.", said)
    parser.add_argument("what", choices=[*ANALYSES, "all"])
    add_model(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", type=here_or_shipped, help="items with graphs")
    add("--out", required=True, metavar="DIR", help="where the files go")
    add("--items", type=int, metavar="N", help="the first N; else all")
    add("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    add("--reading", choices=list(READINGS), help="of the tree; else by method")
    add("--batch-size", type=int, default=64, metavar="B")
    add("--max-new-tokens", type=int, default=48, metavar="N")
    add("--seed", type=int, default=SEED, help="of noise and generated sets")
    options = parser.parse_args(argv)
    guarded(lambda: _run(twin, make_backend, options))


def _run(twin: str, make_backend: MakeBackend, given: argparse.Namespace) -> None:
    least = {"items": 2, "latents": 0, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
    if problems := too_low(given, **least):
        raise UserError("command line", *problems)
    items = prosqa.read(given.data)[: given.items]
    lens = Lens(given.model, make_backend, given.latents, given.base)
    longest = max((item["question"] for item in items), key=len)
    lens.check(longest, 1)
    limit = lens.backend.n_positions
    room = [lens.room(item["question"], given.max_new_tokens) for item in items]
    if min(room) < 1:
        raise UserError(given.data, f"a question fills the model's {limit} positions; shorten it")
    options = Options(
        items=items,
        swapped=[prosqa.swap(item) for item in items],
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        reading=given.reading or lens.own_reading,
        seed=given.seed,
    )
    names = list(ANALYSES) if given.what == "all" else [given.what]
    about = _about(twin, lens, given, items)
    console = Console()
    if short := sum(n < given.max_new_tokens for n in room):
        console.say(f"note: {short} questions leave fewer than {given.max_new_tokens} positions")
    for name in names:
        analysis = ANALYSES[name]
        with console.progress(name, len(items)) as bar:
            found = analysis.measure(lens, options, bar.advance)
        found = {"analysis": name, **about, **found}
        columns, rows = analysis.table(found)
        console.table(f"{name}: {analysis.help}", columns, rows)
        _write(Path(given.out), name, found, columns, rows, analysis)
        console.say(f"wrote {Path(given.out) / name}.json, .md and .png")


def _about(
    twin: str, lens: Lens, given: argparse.Namespace, items: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What a reader of the numbers must know to get them again."""
    weights = sorted(lens.directory.glob("*.safetensors"))
    return {
        "model": str(given.model),
        "model_sha256": [sha256(path)[:16] for path in weights],
        "method": lens.config.method,
        "n_thoughts": lens.n_thoughts,
        "data": str(given.data),
        "data_sha256": sha256(Path(given.data))[:16],
        "items": len(items),
        "seed": given.seed,
        "back_end": twin,
        "dtype": lens.backend.dtype,
        "notes": lens.notes(read_graph(items[0]["question"])),
    }


def _write(
    out: Path,
    name: str,
    found: dict[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    analysis: Analysis,
) -> None:
    image = analysis.draw(found)
    lines = [
        f"# {name}: {analysis.help}",
        "",
        f"`{found['model']}` ({found['method']}, {found['n_thoughts']} thoughts),"
        f" {found['items']} questions of `{found['data']}`, {found['back_end']}.",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    lines += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
    write_text(out / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(out / f"{name}.md", "\n".join(lines) + "\n")
    write_text(out / f"{name}.png", image)
