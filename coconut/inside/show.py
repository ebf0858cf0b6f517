"""An inspection as tables on a terminal; plain columns when piped."""

import sys
from collections.abc import Sequence
from typing import TextIO

import rich.box
import rich.console
import rich.text

from coconut.inside.findings import READINGS, Inspection, Reading
from coconut.reporting.console import ruled

PIPED_WIDTH = 240
"""Columns of a line that no terminal cuts."""
NARROW = 24
"""Characters of a sentence in a table that is too wide for its terminal."""
SHOWN_TOKENS = 5
OTHERS, BY_ITSELF = "other words", "begins so by itself"
SHORT = {OTHERS: "others", BY_ITSELF: "P(lead)"}


class Tables:
    """Prints inspections. stream: stdout unless given; NO_COLOR takes the colours away."""

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self._rich = rich.console.Console(file=stream, highlight=False, markup=False, emoji=False)
        self._is_plain = not self._rich.is_terminal
        # NO_COLOR asks for no colour; without bold too, a captured terminal stays plain text.
        self._has_styles = not self._is_plain and not self._rich.no_color
        if self._is_plain:
            self._rich.width = PIPED_WIDTH

    def show(self, found: Inspection, kind: str) -> None:
        """Every table of one question. kind: the reading shown as the tree, see READINGS."""
        number = "" if found.idx is None else f" {found.idx}"
        self._say(f"question{number}: {found.question}", "bold")
        if found.gold is not None:
            self._say(f"right answer: {found.gold}")
        for warning in found.warnings:
            self._say(f"warning: {warning}", "bold yellow")
        for note in found.notes:
            self._say(f"note: {note}", "yellow")
        self._stops(found)
        if found.thoughts:
            self._thoughts(found)
            self._attention(found)
        for reading in found.readings:
            if reading.kind == kind:
                self._tree(found, reading)
        self._say("")

    def _stops(self, found: Inspection) -> None:
        columns = ["thoughts", "answer", "right", "certainty"]
        if found.graph is not None:
            columns += [f"p({found.graph.nodes[choice]})" for choice in found.graph.choices]
        rows = []
        for stop in found.stops:
            right = {None: "", True: "yes", False: "no"}[stop.is_correct]
            answer = stop.answer or f"none: {stop.text}"
            row = [_starred(str(stop.n_thoughts), not stop.is_trained), _cut(answer, 48), right]
            row.append("" if stop.certainty is None else _percent(stop.certainty))
            rows.append([*row, *map(_percent, stop.choices or ())])
        title = "If it stopped after so many thoughts"
        self._table(title, columns, rows, numbers=(0, *range(3, len(columns))))
        if not all(stop.is_trained for stop in found.stops):
            self._say("  * outside of what its method trains")
        chain = found.stops[0].chain
        if chain:
            self._say("")
            self._say("Printed without thoughts" + ("" if found.stops[0].is_trained else " *"))
            for line, is_stated in zip(chain, found.stops[0].chain_is_stated, strict=True):
                mark = "stated      " if is_stated else "not stated  "
                if found.graph is None or is_stated is None:
                    mark = ""
                self._say(f"  {mark}{_cut(line, 100)}")

    def _thoughts(self, found: Inspection) -> None:
        rows = []
        for thought in found.thoughts:
            top = [f"{_shown(token)} {_percent(p)}" for token, p in thought.top[:SHOWN_TOKENS]]
            cosines = " ".join(f"{cosine:.2f}" for cosine in thought.cosines)
            rows.append([str(thought.number), f"{thought.norm_ratio:.2f}", cosines, "  ".join(top)])
        columns = ["thought", "length", "cosine with 1, 2, ...", "through the output head"]
        if not self._fits(columns, rows):
            # A token a line: broken inside, none could be read.
            for row in rows:
                row[-1] = row[-1].replace("%  ", "%\n")
        self._table("Thoughts (length in embeddings' mean lengths)", columns, rows, numbers=(0, 1))

    def _attention(self, found: Inspection) -> None:
        means, rows = [], []
        for s, segment in enumerate(found.segments):
            short, cells = [], []
            for thought in found.thoughts:
                layer, head = thought.attention_at[s]
                is_seen = thought.attention_max[s] > 0
                short.append(_percent(thought.attention[s]) if is_seen else "")
                at = f" / {_percent(thought.attention_max[s])} {layer + 1}.{head + 1}"
                cells.append(f"{short[-1]}{at}" if is_seen else "")
            means.append([_cut(segment, NARROW), *short])
            rows.append([_cut(segment, 40), *cells])
        title = "Attention of each thought's latent: mean / largest, at layer.head"
        columns = ["", *(f"thought {thought.number}" for thought in found.thoughts)]
        if not self._fits(columns, rows):
            title = (
                "Attention of each thought's latent, mean of its heads (--html shows the largest)"
            )
            columns, rows = ["", *(str(thought.number) for thought in found.thoughts)], means
        self._table(title, columns, rows, numbers=range(1, len(columns)))

    def _tree(self, found: Inspection, reading: Reading) -> None:
        graph = found.graph
        assert graph is not None, "a reading needs a graph"
        # Where a thought itself is read, there is nothing to read before the first.
        ks = range(int(reading.kind == "thought"), len(reading.values))
        used = [n for n in range(len(graph.nodes)) if any(row[n] for row in reading.values)]
        order = sorted(used, key=lambda n: (graph.distances[n] is None, graph.distances[n] or 0, n))
        rows = []
        for node in order:
            distance = graph.distances[node]
            role = "right" if node == graph.right else "wrong" if node in graph.choices else ""
            role = "asked" if node == graph.asked else role
            cells = [_starred(_percent(reading.values[k][node]), distance == k) for k in ks]
            rows.append(
                [graph.nodes[node], "-" if distance is None else str(distance), role, *cells]
            )
        rest = [_percent(max(0.0, 1 - sum(reading.values[k]))) for k in ks]
        rows.append([OTHERS, "", "", *rest])
        own = [_percent(p) if p >= 0.0005 else f"{p:.0e}" for p in reading.lead_probability]
        if reading.kind != "thought":
            rows.append([BY_ITSELF, "", "", *own])
        columns = ["concept", "hops", "", *(f"after {k}" for k in ks)]
        if not self._fits(columns, rows):
            columns[3:] = [str(k) for k in ks]
            rows = [[SHORT.get(row[0], row[0]), *row[1:]] for row in rows]
        lead = reading.leads[-1]
        title = f"Latent tree: the next concept behind {lead!r} ({READINGS[reading.kind]})"
        if reading.kind == "thought":
            title = f"Latent tree: {READINGS[reading.kind]}"
        self._table(title, columns, rows, numbers=(1, *range(3, len(columns))))
        self._say("  * as many hops from the asked name as thoughts")
        if not reading.is_trained:
            self._say("  Its method does not train such text behind thoughts.")

    def _fits(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
        """Whether no cell would be broken."""
        widths = (max(map(len, column)) for column in zip(columns, *rows, strict=True))
        return self._is_plain or sum(width + 2 for width in widths) + 2 <= self._rich.width

    def _table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        numbers: Sequence[int],
    ) -> None:
        self._say("")
        self._say(title, "bold")
        box = None if self._is_plain else rich.box.SIMPLE_HEAD
        look = {"box": box, "header_style": None if self._has_styles else ""}
        is_number = [i in numbers for i in range(len(columns))]
        self._rich.print(ruled(columns, rows, is_number, collapse_padding=True, **look))

    def _say(self, line: str, style: str = "") -> None:
        style = style if self._has_styles else ""
        self._rich.print(rich.text.Text(_printable(line), style=style), soft_wrap=True)


def _printable(text: str) -> str:
    """Data and models may write anything; a terminal must not act on it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(token: str) -> str:
    return repr(token) if token != token.strip() or not token else _printable(token)


def _cut(text: str, n: int) -> str:
    text = _printable(text)
    return text if len(text) <= n else text[: n - 1] + "…"


def _percent(p: float) -> str:
    return f"{100 * p:.1f}%" if p >= 0.0005 else ("<0.1%" if p > 0 else "0")


def _starred(text: str, is_marked: bool) -> str:
    return f"{text}*" if is_marked else text
