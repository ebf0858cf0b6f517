"""`python -m TWIN.analyse WHAT --model DIR --data FILE --out DIR`: what thoughts do, measured.

After section 5 of the Coconut paper (arXiv 2412.06769), with controls. Each analysis leaves three
files: NAME.json (every number), NAME.md (its table) and NAME.png, the same to the byte when run
again on the same machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.backend import Decoding
from coconut.batches.batch import collate
from coconut.batches.curriculum import Sample, question_row
from coconut.checkpoints.checkpoint import sha256, write_text
from coconut.commands.generate import add_model, too_low
from coconut.config.reading import WITH_FEEDBACK
from coconut.errors import UserError, guarded
from coconut.inside import figures
from coconut.inside.graph import Graph, read_graph
from coconut.inside.lens import READINGS, Lens
from coconut.reporting.console import Console
from coconut.run.evaluate import markers_of
from coconut.text.answers import OUTCOMES, classify_chain, exact_match, extract

if TYPE_CHECKING:
    from coconut.backend import MakeBackend

SEED = 20_241
"""Of the generated sets; no training run of this project has it."""
NOISES = (0.5, 1.0, 2.0)
"""Standard deviations of added noise, in rms of the thoughts themselves."""
N_TREE = 3
"""Candidates whose value is added up."""

DRAWN = 2
"""Thoughts whose values are drawn question by question, as in the paper."""

Table = tuple[list[str], list[list[Any]]]


@dataclass(frozen=True)
class Options:
    """What an analysis is run on, beside the model."""

    items: list[dict[str, Any]]
    swapped: list[dict[str, Any]]
    """The same items asking for the other name."""
    batch_size: int
    max_new_tokens: int
    reading: str
    seed: int


@dataclass(frozen=True)
class Analysis:
    """One command: what it measures, its table, its picture."""

    help: str
    measure: Callable[[Lens, Options, Callable[[int], None]], dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    draw: Callable[[dict[str, Any]], bytes]


def answers(
    lens: Lens,
    questions: Sequence[str],
    options: Options,
    n_thoughts: int,
    thoughts: np.ndarray | None = None,
) -> list[str]:
    """What the model writes for each question after n_thoughts.

    thoughts (N, n_thoughts, D): to feed back instead of its own.
    """
    decoding = Decoding(options.max_new_tokens, lens.tokenizer.eos_id)
    written = [""] * len(questions)
    for numbers, batch in _batches(lens, questions, options.batch_size, n_thoughts):
        given = None if thoughts is None else np.ascontiguousarray(thoughts[numbers].swapaxes(0, 1))
        for i, new in zip(numbers, lens.backend.generate(batch, decoding, given), strict=True):
            written[i] = lens.tokenizer.decode(new)
    return written


def thoughts_of(lens: Lens, questions: Sequence[str], options: Options) -> np.ndarray:
    """The model's own thoughts about each question: (N, R, D)."""
    found: list[np.ndarray] = [np.empty(0)] * len(questions)
    for numbers, batch in _batches(lens, questions, options.batch_size, lens.n_thoughts):
        for i, own in zip(numbers, lens.backend.thoughts(batch).swapaxes(0, 1), strict=True):
            found[i] = own
    return np.stack(found)


def _batches(lens: Lens, questions: Sequence[str], size: int, n_thoughts: int) -> Any:
    """(numbers, Batch) of questions of like length."""
    markers = markers_of(lens.tokenizer)
    rows = []
    for i, question in enumerate(questions):
        sample = Sample(i, lens.tokenizer.encode_question(question + "\n"), [], [])
        rows.append(question_row(lens.config, sample, lens.stage, markers, n_thoughts))
    order = np.argsort([len(row.ids) for row in rows], kind="stable")
    for start in range(0, len(order), size):
        numbers = [int(i) for i in order[start : start + size]]
        yield numbers, collate([rows[i] for i in numbers], lens.tokenizer.pad_id)


def _right(written: Sequence[str], items: Sequence[dict[str, Any]]) -> np.ndarray:
    pairs = zip(written, items, strict=True)
    return np.array([exact_match(extract(text)[0], item["answer"]) for text, item in pairs])


def _accuracy(asked: np.ndarray, swapped: np.ndarray) -> dict[str, Any]:
    """Counts of questions right as asked, swapped and both."""
    return {
        "n": len(asked),
        "as_asked": int(asked.sum()),
        "swapped": int(swapped.sum()),
        "both": int((asked & swapped).sum()),
    }


def _questions(items: Sequence[dict[str, Any]]) -> list[str]:
    return [item["question"] for item in items]


def _percent(count: int, n: int) -> str:
    return f"{100 * count / n:.1f}" if n else "–"


# --- forced k


def forced_k(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy and outcome classes after exactly 0, 1, ... thoughts."""
    rows = []
    for k in range(lens.n_thoughts + 1):
        written = answers(lens, _questions(options.items), options, k)
        other = answers(lens, _questions(options.swapped), options, k)
        found = _accuracy(_right(written, options.items), _right(other, options.swapped))
        classes = [
            outcome(item, text, k) for item, text in zip(options.items, written, strict=True)
        ]
        found["outcomes"] = {name: classes.count(name) for name in OUTCOMES}
        found["with_chain"] = sum(extract(text)[1] != "" for text in written)
        rows.append({"thoughts": k, "is_trained": lens.is_trained(k), **found})
        advance(1)
    return {"rows": rows, "shortcut": _shortcut(options.items)}


def outcome(item: dict[str, Any], text: str, n_thoughts: int) -> str:
    """The class (section 5.1) of a text; a chain may begin wherever the thoughts may have led."""
    answer, chain = extract(text)
    return str(classify_chain(item, chain.split("\n"), answer, n_hidden=n_thoughts))


def _shortcut(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The no-name rule that goes farthest on these items, and its share."""
    from coconut.tasks.prosqa_stats import shortcut_accuracies

    found = shortcut_accuracies(items)
    # Rules that look at the asked name are the task itself, cut short.
    blind = {name: share for name, share in found.items() if "asked name" not in name}
    best = max(blind, key=lambda name: blind[name])
    return {"rule": best, "share": blind[best]}


def forced_k_table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts."""
    columns = ["thoughts", "as asked %", "swapped %", "both %", *OUTCOMES]
    rows = [
        [
            row["thoughts"],
            *(_percent(row[name], row["n"]) for name in ("as_asked", "swapped", "both")),
            *(row["outcomes"][name] for name in OUTCOMES),
        ]
        for row in found["rows"]
    ]
    return columns, rows


# --- the latent tree


@dataclass(frozen=True)
class _Tree:
    """A question's values: [k][node] after k thoughts, and the probability of the lead."""

    graph: Graph
    values: list[list[float]]
    leads: list[float]


def _trees(lens: Lens, options: Options, advance: Callable[[int], None]) -> list[_Tree]:
    trees = []
    for item in options.items:
        graph = read_graph(item["question"])
        if graph is None or graph.right is None:
            raise UserError("data", f"not a ProsQA question: {item['question'][:60]}...")
        lens.check(item["question"], 1, graph)
        read = lens.reading(item["question"], graph, options.reading)
        trees.append(_Tree(graph, read.values, read.lead_probability))
        advance(1)
    return trees


def _about_reading(lens: Lens, options: Options, trees: Sequence[_Tree]) -> dict[str, Any]:
    return {
        "reading": options.reading,
        "reading_means": READINGS[options.reading],
        "lead_probability": np.mean([tree.leads for tree in trees], axis=0).tolist(),
    }


def parallelism(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Value of the best 1, 2, 3 candidates after each number of thoughts, question by question."""
    trees = _trees(lens, options, advance)
    rows = []
    # Where thoughts themselves are read, there is nothing to read before the first.
    for k in range(int(options.reading == "thought"), lens.n_thoughts + 1):
        tops, frontier, expected, on_tree = [], [], [], []
        for tree in trees:
            values = np.array(tree.values[k])
            tops.append(np.cumsum(np.sort(values)[::-1][:N_TREE]))
            near = tree.graph.frontier(k)
            below = [n for n, d in enumerate(tree.graph.distances) if d]
            on_tree.append(values[below].sum())
            if near:
                frontier.append(values[near].sum())
                # What a reader that knew no graph would give them: its mass spread over concepts.
                n_concepts = len(tree.graph.nodes) - len(tree.graph.names)
                expected.append(values.sum() * len(near) / n_concepts)
        rows.append(
            {
                "thoughts": k,
                "top": np.mean(tops, axis=0).tolist(),
                "below_asked": float(np.mean(on_tree)),
                "frontier": float(np.mean(frontier)) if frontier else None,
                "frontier_if_uniform": float(np.mean(expected)) if expected else None,
                "n_with_frontier": len(frontier),
                # Each curve sorted for itself, as in the paper's figure.
                "percentiles": np.sort(np.array(tops), axis=0).T.round(4).tolist()
                if k <= DRAWN
                else [],
            }
        )
    return {**_about_reading(lens, options, trees), "rows": rows}


def parallelism_table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts: mean values."""
    columns = [
        "thoughts",
        "lead",
        "top 1",
        "top 2",
        "top 3",
        "below the name",
        "at k hops",
        "uniform",
    ]
    rows = [
        [
            row["thoughts"],
            f"{lead:.3f}",
            *(f"{value:.3f}" for value in row["top"]),
            f"{row['below_asked']:.3f}",
            "–" if row["frontier"] is None else f"{row['frontier']:.3f}",
            "–" if row["frontier"] is None else f"{row['frontier_if_uniform']:.3f}",
        ]
        for row in found["rows"]
        for lead in [found["lead_probability"][row["thoughts"]]]
    ]
    return columns, rows


def height(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Value of the nodes k hops below the asked name after k thoughts, by their height.

    Height: least number of edges down to a leaf. Right: the node leads to the right answer (or is
    it). relative: in means of the nodes at that distance in the same question; where few nodes
    share a thought each has more, and few of them are wrong.
    """
    trees = _trees(lens, options, advance)
    rows = []
    for k in range(1, min(lens.n_thoughts, DRAWN) + 1):
        groups: dict[tuple[int, bool], list[tuple[float, float]]] = {}
        for tree in trees:
            heights, leads_to = _heights(tree.graph), _leading_to(tree.graph)
            near = tree.graph.frontier(k)
            mean = float(np.mean([tree.values[k][node] for node in near])) if near else 0.0
            for node in near:
                value = tree.values[k][node]
                group = groups.setdefault((heights[node], node in leads_to), [])
                group.append((value, value / mean if mean else 1.0))
        for (h, is_right), pairs in sorted(groups.items()):
            values, relative = np.array(pairs).T
            rows.append(
                {
                    "thoughts": k,
                    "height": h,
                    "is_right": is_right,
                    "n": len(values),
                    "mean": float(np.mean(values)),
                    "standard_error": float(np.std(values) / np.sqrt(len(values))),
                    "relative": float(np.mean(relative)),
                }
            )
    return {**_about_reading(lens, options, trees), "rows": rows}


def _heights(graph: Graph) -> list[int]:
    """Hops from each node down to its nearest leaf."""
    children: dict[int, list[int]] = {}
    for parent, child in graph.edges:
        children.setdefault(parent, []).append(child)
    found = [0 if node not in children else -1 for node in range(len(graph.nodes))]
    # A height is known once a child of one less is; the graph has no cycles to get lost in.
    for h in range(1, len(graph.nodes)):
        for node, below in children.items():
            if found[node] < 0 and any(found[child] == h - 1 for child in below):
                found[node] = h
    return found


def _leading_to(graph: Graph) -> set[int]:
    """The right answer and every node that leads to it."""
    assert graph.right is not None, "checked when the trees were made"
    found, queue = {graph.right}, [graph.right]
    while queue:
        node = queue.pop()
        above = {parent for parent, child in graph.edges if child == node} - found
        found |= above
        queue += sorted(above)
    return found


def height_table(found: dict[str, Any]) -> Table:
    """A row a number of thoughts, height and side."""
    columns = ["thoughts", "height", "node", "nodes", "mean value", "± s.e.", "relative"]
    rows = [
        [
            row["thoughts"],
            row["height"],
            "right" if row["is_right"] else "wrong",
            row["n"],
            f"{row['mean']:.3f}",
            f"{row['standard_error']:.3f}",
            f"{row['relative']:.2f}",
        ]
        for row in found["rows"]
    ]
    return columns, rows


# --- does the content matter?


def ablate(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy with thoughts put in the place of the model's own; all else is computed as usual."""
    if not lens.n_thoughts or lens.config.method not in WITH_FEEDBACK:
        raise UserError(str(lens.directory), "its latents receive no thoughts: nothing to replace")
    sides = (options.items, options.swapped)
    own = [thoughts_of(lens, _questions(items), options) for items in sides]
    rows = []
    for name, about, change in _changes(own, options.seed):
        written, hits = [], []
        for side, items in enumerate(sides):
            given = change(side)
            n = 0 if given is None else lens.n_thoughts
            written.append(answers(lens, _questions(items), options, n, given))
            hits.append(_right(written[-1], items))
        found = _accuracy(hits[0], hits[1])
        # The concept that the other name's question has for an answer.
        found["other"] = sum(
            extract(text)[0].rsplit(" ", 1)[-1] == other["answer"].rsplit(" ", 1)[-1]
            for text, other in zip(written[0], options.swapped, strict=True)
        )
        rows.append({"thoughts": name, "about": about, **found})
        advance(1)
    return {"n_thoughts": lens.n_thoughts, "rows": rows, "shortcut": _shortcut(options.items)}


Change = Callable[[int], "np.ndarray | None"]


def _changes(own: list[np.ndarray], seed: int) -> list[tuple[str, str, Change]]:
    """(name, what it is, side -> thoughts (N, R, D)); side 0 as asked, 1 swapped.

    A change takes the same draws on both sides.
    """
    n, R, D = own[0].shape
    mean = [x.mean(axis=0, keepdims=True) for x in own]
    scale = [np.sqrt((x.astype(np.float64) ** 2).mean(axis=(0, 2), keepdims=True)) for x in own]
    # Another question: one step around a shuffled circle, so nobody is their own neighbour.
    circle = np.random.default_rng([seed, 0]).permutation(n)
    neighbour = np.empty(n, int)
    neighbour[circle] = np.roll(circle, 1)
    draws = np.random.default_rng([seed, 1])
    normal = draws.standard_normal((n, R, D))
    order = np.array([_derangement(R, draws) for _ in range(n)])

    def f32(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32)

    def one_mean(i: int) -> Change:
        def change(side: int) -> np.ndarray:
            x = own[side].copy()
            x[:, i] = mean[side][:, i]
            return x

        return change

    changes: list[tuple[str, str, Change]] = [
        ("own", "the model's own, put back: the control", lambda s: own[s]),
        ("none", "no latents at all", lambda s: None),
        ("zero", "zeros", lambda s: np.zeros_like(own[s])),
        ("mean", "the mean over all questions", lambda s: f32(np.repeat(mean[s], n, axis=0))),
        ("random", "random, at the thoughts' scale", lambda s: f32(normal * scale[s])),
    ]

    def noisy(sigma: float) -> Change:
        return lambda side: f32(own[side] + sigma * normal * scale[side])

    for sigma in NOISES:
        about = f"its own plus noise of {sigma:g} times their scale"
        changes.append((f"noise {sigma:g}", about, noisy(sigma)))
    changes.append(
        (
            "shuffled",
            "its own in another order",
            lambda s: np.take_along_axis(own[s], order[:, :, None], axis=1),
        )
    )
    changes.append(("another's", "of another question", lambda s: own[s][neighbour]))
    changes.append(
        ("other name's", "of the same graph, the other name asked", lambda s: own[1 - s])
    )
    for i in range(R):
        changes.append((f"mean at {i + 1}", f"only thought {i + 1} is the mean", one_mean(i)))
    return changes


def _derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random order that leaves nothing in its place (of one thing, itself)."""
    while True:
        order = rng.permutation(n)
        if n < 2 or (order != np.arange(n)).all():
            return order


def ablate_table(found: dict[str, Any]) -> Table:
    """A row a kind of thoughts."""
    columns = [
        "thoughts",
        "as asked %",
        "swapped %",
        "both %",
        "other name's answer %",
        "what they are",
    ]
    rows = [
        [
            row["thoughts"],
            *(_percent(row[name], row["n"]) for name in ("as_asked", "swapped", "both", "other")),
            row["about"],
        ]
        for row in found["rows"]
    ]
    return columns, rows


# --- out of distribution


def ood(lens: Lens, options: Options, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy on graphs that differ from the data's in one way each."""
    from coconut.tasks import prosqa

    exclude = {key for item in options.items for key in prosqa.keys(item)}
    n, rows = len(options.items), []
    for number, (name, about, changes) in enumerate(_shifts(options.items)):
        items = options.items
        if changes is not None:
            shifted = prosqa.Options(**changes)
            items = list(prosqa.generate(shifted, options.seed + number, n, exclude=exclude))
        longest = max((item["question"] for item in items), key=len)
        try:
            lens.check(longest, options.max_new_tokens)
        except UserError as error:
            rows.append({"set": name, "about": about, "left_out": error.problems[0]})
            advance(1)
            continue
        swapped = [prosqa.swap(item) for item in items]
        hits = [
            _right(answers(lens, _questions(side), options, lens.n_thoughts), side)
            for side in (items, swapped)
        ]
        sizes = {
            "nodes": float(np.mean([len(item["idx_to_symbol"]) for item in items])),
            "edges": float(np.mean([len(item["edges"]) for item in items])),
            "hops": float(np.mean([len(item["steps"]) for item in items])),
        }
        found = {**_accuracy(*hits), **sizes, "shortcut": _shortcut(items)}
        rows.append({"set": name, "about": about, **found})
        advance(1)
    return {"rows": rows}


def _shifts(items: Sequence[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any] | None]]:
    """(name, what differs, generator's options): one change each from the data's own size."""
    nodes = max(len(item["idx_to_symbol"]) for item in items)
    hops = [len(item["steps"]) for item in items]
    low, high = min(hops), max(hops)
    # Questions that long are at most one in twenty of the data's own.
    deep = next(h for h in range(low, high + 2) if sum(x >= h for x in hops) <= len(hops) / 20)
    base = {"nodes": nodes, "min_hops": low, "max_hops": max(high, 6)}
    shifts: list[tuple[str, str, dict[str, Any] | None]] = [
        ("the data", "as given", None),
        ("fresh", "the same size, generated anew", base),
        ("more hops", f"{deep} or more", base | {"min_hops": deep, "max_hops": deep + 3}),
        ("denser", "one parent more for each node", base | {"more_parents": 1}),
        ("equal depth", "both concepts equally deep", base | {"equal_depth": True}),
    ]
    for more in (4, 8, nodes):
        if nodes + more <= _most_nodes():
            about = f"{nodes + more} raw nodes for {nodes}"
            shifts.append((f"{nodes + more} nodes", about, base | {"nodes": nodes + more}))
    return shifts


def _most_nodes() -> int:
    """The most nodes there are words for."""
    from coconut.tasks import prosqa

    return len(prosqa.CONCEPTS) + 2


def ood_table(found: dict[str, Any]) -> Table:
    """A row a set."""
    columns = [
        "set",
        "nodes",
        "edges",
        "hops",
        "as asked %",
        "swapped %",
        "both %",
        "best blind rule %",
    ]
    rows = []
    for row in found["rows"]:
        if "left_out" in row:
            rows.append([row["set"], *["–"] * 6, row["left_out"]])
            continue
        sizes = [f"{row[name]:.1f}" for name in ("nodes", "edges", "hops")]
        shares = [_percent(row[name], row["n"]) for name in ("as_asked", "swapped", "both")]
        rows.append([row["set"], *sizes, *shares, f"{100 * row['shortcut']['share']:.1f}"])
    return columns, rows


ANALYSES: dict[str, Analysis] = {
    "forced-k": Analysis(
        "accuracy and outcome classes after 0, 1, ... thoughts",
        forced_k,
        forced_k_table,
        figures.forced_k,
    ),
    "parallelism": Analysis(
        "value of the best 1, 2, 3 nodes after each thought",
        parallelism,
        parallelism_table,
        figures.parallelism,
    ),
    "height": Analysis(
        "value of nodes by their height, right and wrong ones apart",
        height,
        height_table,
        figures.height,
    ),
    "ablate": Analysis(
        "accuracy with zeroed, noisy, shuffled and other questions' thoughts",
        ablate,
        ablate_table,
        figures.ablate,
    ),
    "ood": Analysis("accuracy on deeper, denser, larger graphs", ood, ood_table, figures.ood),
}
"""Name on the command line -> what it does."""


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Run one analysis, or all, and write its files."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {twin}.analyse",
        description="What thoughts do, over a data set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:12} {a.help}" for name, a in ANALYSES.items()),
    )
    parser.add_argument("what", choices=[*ANALYSES, "all"])
    add_model(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="ProsQA items with graphs")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--items", type=int, metavar="N", help="the first N; else all")
    parser.add_argument("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    parser.add_argument("--reading", choices=list(READINGS), help="of the tree; else by method")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    parser.add_argument("--seed", type=int, default=SEED, help="of noise and generated sets")
    options = parser.parse_args(argv)
    guarded(lambda: _run(twin, make_backend, options))


def _run(twin: str, make_backend: MakeBackend, given: argparse.Namespace) -> None:
    from coconut.tasks import prosqa

    least = {"items": 2, "latents": 0, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
    if problems := too_low(given, **least):
        raise UserError("command line", *problems)
    items = prosqa.read(given.data)[: given.items]
    lens = Lens(given.model, make_backend, given.latents, given.base)
    longest = max((item["question"] for item in items), key=len)
    lens.check(longest, 1)
    limit = lens.backend.n_positions
    n_new = given.max_new_tokens
    if limit is not None:
        prompts = (len(lens.tokenizer.encode_question(i["question"] + "\n")) for i in items)
        n_new = min(n_new, limit - max(prompts) - lens.n_thoughts - 2)
    if n_new < 1:
        raise UserError(given.data, f"a question fills the model's {limit} positions; shorten it")
    options = Options(
        items=items,
        swapped=[prosqa.swap(item) for item in items],
        batch_size=given.batch_size,
        max_new_tokens=n_new,
        reading=given.reading or lens.own_reading,
        seed=given.seed,
    )
    names = list(ANALYSES) if given.what == "all" else [given.what]
    about = _about(twin, lens, given, items)
    console = Console()
    for name in names:
        analysis, shown = ANALYSES[name], options
        with console.progress(name, len(items)) as bar:
            found = analysis.measure(lens, shown, bar.advance)
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
    try:
        write_text(out / f"{name}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_text(out / f"{name}.md", "\n".join(lines) + "\n")
        write_text(out / f"{name}.png", image)
    except OSError as error:
        raise UserError(str(out), f"cannot be written: {error.strerror}") from error
