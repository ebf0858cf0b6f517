"""A question of statements read back from its text: the graph they make, what is asked."""

import re
from dataclasses import dataclass

from coconut.tasks.graphs import distances, shortest_path

_STATEMENT = re.compile(r"(?:Every )?([^\W_]+) is a ([^\W_]+)\.")
_QUESTION = re.compile(r"Is ([^\W_]+)(?: a ([^\W_]+) or ([^\W_]+))?\?")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True)
class Graph:
    """Nodes by index, in the order the text first says them.

    nodes: their words. edges: (parent, child). asked: the name in the question. choices: the two
    concepts that ProsQA offers, in its order; pointer chasing offers none. distances: hops from the
    asked name, None where it does not lead.
    """

    nodes: list[str]
    edges: list[tuple[int, int]]
    asked: int
    choices: tuple[int, ...]
    distances: list[int | None]

    @property
    def right(self) -> int | None:
        """The choice that the asked name leads to; None if it leads to both or to neither."""
        reached = [node for node in self.choices if self.distances[node] is not None]
        return reached[0] if len(reached) == 1 else None

    def statement(self, node: int) -> str:
        """The sentence that makes the asked name an instance of a node."""
        return f"{self.nodes[self.asked]} is a {self.nodes[node]}."

    @property
    def answer(self) -> str | None:
        """The right answer as a text; None without a right choice."""
        return None if self.right is None else self.statement(self.right)

    @property
    def names(self) -> list[int]:
        """Nodes that are said without Every: the asked one, and whatever has no parent."""
        below = {child for _, child in self.edges}
        return [n for n in range(len(self.nodes)) if n == self.asked or n not in below]

    def frontier(self, n_hops: int) -> list[int]:
        """Nodes whose shortest way from the asked name has this many hops."""
        return [node for node, distance in enumerate(self.distances) if distance == n_hops]

    def path(self) -> list[int]:
        """A shortest way from the asked name to the right choice; empty without a right choice.

        Of several, the one whose nodes the text says first.
        """
        return [] if self.right is None else shortest_path(self.edges, self.asked, self.right)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space between them."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def read_graph(question: str) -> Graph | None:
    """The graph of a question of ProsQA or of pointer chasing, None if the text has another form.

    Every sentence must be a statement but for the last, which asks. Statements told twice count
    once; a choice that no statement names is a node without edges.
    """
    *statements, last = sentences(question) or [""]
    asks = _QUESTION.fullmatch(last)
    said = [_STATEMENT.fullmatch(statement) for statement in statements]
    if asks is None or not statements or None in said:
        return None
    words = dict.fromkeys(w for match in said if match for w in match.groups())
    named = [word for word in asks.groups() if word]
    words |= dict.fromkeys(named)
    index = {word: i for i, word in enumerate(words)}
    edges = dict.fromkeys((index[m[1]], index[m[2]]) for m in said if m)
    asked, *choices = (index[word] for word in named)
    hops = distances(edges, [asked])
    return Graph(
        nodes=list(words),
        edges=list(edges),
        asked=asked,
        choices=tuple(choices),
        distances=[hops.get(node) for node in range(len(words))],
    )
