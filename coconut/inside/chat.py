"""`mlx-coconut chat --model DIR`: ask a checkpoint, question after question.

On a terminal with a prompt, line editing and streamed answers; from a pipe a line is a question.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any, TextIO, cast

import rich.console

from coconut.backend import MakeBackend
from coconut.batches.batch import collate
from coconut.batches.decoding import Decoding
from coconut.checkpoints.named import add_model, too_low
from coconut.errors import UserError, guarded, nearest, options_of
from coconut.inside.graph import read_graph
from coconut.inside.known import strangeness
from coconut.inside.lens import Lens
from coconut.reporting.console import Console
from coconut.tasks import prosqa, prosqa_graph
from coconut.text.answers import exact_match
from coconut.text.tokenizer import MARKERS

PROMPT = "> "
HELP = """\
Type a question; the model thinks, then answers. Each question stands alone: these models were
trained on single questions, so nothing said before is given to them.
  /k N         think N thoughts from now on (/k: how many; /k own: as trained)
  /again       ask the last question again, say after /k
  /sweep       the last question's answer after 0, 1, ... thoughts
  /thoughts    what the output head reads in each thought of the last question
  /example N   ask a new ProsQA question over a graph of N raw nodes
  /help, /quit (or Ctrl-D); Ctrl-C stops an answer"""
N_NODES = 28
"""Raw nodes of an example's graph: those of ProsQA."""
N_TOP = 5
"""Tokens that /thoughts names for each thought."""

_SIGN = re.compile(r"#{3,}[ ]?")
_OPEN_SIGN = re.compile(r"#+[ ]?$")


class Chat:
    """One conversation: `answer` a line, which is a question or a command."""

    def __init__(
        self, lens: Lens, screen: rich.console.Console, max_new_tokens: int, seed: int = 0
    ) -> None:
        self.lens, self.screen = lens, screen
        self.max_new_tokens = max_new_tokens
        self.n_thoughts = lens.n_thoughts
        self.last: str | None = None
        self.n_failed = 0
        self._random = Random(seed)
        self._nodes = N_NODES
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(HELP),
            "k": self._set_thoughts,
            "again": lambda _: self.ask(self._last()),
            "sweep": lambda _: self._sweep(),
            "thoughts": lambda _: self._show_thoughts(),
            "example": self._example,
        }

    def answer(self, line: str) -> bool:
        """Answer a line; False if it ends the conversation. What is wrong with it takes a line."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self.ask(line)
        except UserError as error:
            self.n_failed += 1
            print("; ".join(error.problems), file=sys.stderr, flush=True)
        return True

    def ask(self, question: str, gold: str | None = None) -> None:
        """Think and answer, word by word. gold: the right answer, to be told how it went."""
        self._check(question)
        self.last = question
        tokenizer, backend = self.lens.tokenizer, self.lens.backend
        row = self.lens.prompt(question, self.n_thoughts)
        room = self.lens.room(question, self.max_new_tokens)
        shown = ""

        def show(tokens: list[int], is_last: bool = False) -> bool:
            nonlocal shown
            text = self._readable(tokenizer.decode(tokens), is_last)
            if text.startswith(shown) and text != shown:
                self.say(text[len(shown) :], end="")
                shown = text
            return tokenizer.ended(tokens)

        start = time.perf_counter()
        tokens: list[int] = []
        try:
            # `stops` is told every new token of a row, so it can show them as they come.
            decoding = Decoding(room, tokenizer.eos_id, stops=show)
            [tokens] = backend.generate(collate([row], tokenizer.pad_id), decoding)
        finally:
            if tokens:
                show(tokens, is_last=True)
            self.say("" if shown else "(no answer)")
        seconds = time.perf_counter() - start
        if self.screen.is_terminal:
            parts = [f"{self.n_thoughts} thoughts", f"{len(tokens)} tokens", f"{seconds:.2f} s"]
            if tokens and not tokenizer.ended(tokens):
                parts.append("cut off")
            self.say(" | ".join(parts), "dim")
        if gold is not None:
            self.say("right" if exact_match(shown.rsplit("\n", 1)[-1], gold) else f"wrong: {gold}")

    def say(self, text: str, style: str = "", end: str = "\n") -> None:
        """Text as it is: no markup, no wrapping; styles on a terminal, none with NO_COLOR."""
        style = "" if self.screen.no_color else style
        self.screen.print(text, style=style, end=end, soft_wrap=True, markup=False, highlight=False)
        self.screen.file.flush()

    @staticmethod
    def _readable(text: str, is_last: bool) -> str:
        """Chain and answer without the sign between them; a sign that may still grow is held."""
        text = text.lstrip()
        for marker in MARKERS:
            text = text.replace(marker, "")
        if not is_last:
            # Half a character, or half a sign, is shown once it is whole.
            text = _OPEN_SIGN.sub("", text.rstrip("\ufffd"))
        text = _SIGN.sub("", text)
        return text.rstrip() if is_last else text

    def _check(self, question: str) -> None:
        """Raise UserError for text that this model can make nothing of."""
        self.lens.n_thoughts = self.n_thoughts
        self.lens.check(question, 1)
        if problem := strangeness(self.lens.tokenizer, read_graph(question)):
            raise UserError("question", f"{problem}; /example shows one")

    # --- commands

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            near = nearest(f"/{name}", [f"/{known}" for known in (*self._commands, "quit")])
            hint = near or "/help lists them"
            raise UserError("command", f"no command /{name}; {hint}")
        self._commands[name](rest.strip())

    def _last(self) -> str:
        if self.last is None:
            raise UserError("command", "no question yet; ask one, or /example")
        return self.last

    def _set_thoughts(self, text: str) -> None:
        own = self.lens.own_thoughts
        if text == "own":
            self.n_thoughts = own
        elif text:
            if not (text.isascii() and text.isdigit()) or int(text) > 1000:
                raise UserError("command", f"/k: a number of thoughts, got {text!r}")
            if int(text) and not own:
                raise UserError("command", "/k: this model was trained without thoughts")
            self.n_thoughts = int(text)
        trained = "" if self.n_thoughts == own else f" (its last training used {own})"
        self.say(f"{self.n_thoughts} thoughts{trained}")

    def _sweep(self) -> None:
        question = self._last()
        self.lens.n_thoughts = max(self.n_thoughts, self.lens.own_thoughts)
        self.lens.check(question, 1)
        room = self.lens.room(question, self.max_new_tokens)
        graph = read_graph(question)
        gold = None if graph is None else graph.answer
        rows: list[list[Any]] = []
        for stop in self.lens.stops(question, None, gold, max(room, 1)):
            sure = "" if stop.certainty is None else f"{stop.certainty:.3f}"
            verdict = {None: "", True: "right", False: "wrong"}[stop.is_correct]
            rows.append([stop.n_thoughts, stop.answer or "(no answer)", sure, verdict])
        self._table("after so many thoughts", ["thoughts", "answer", "probability", ""], rows)

    def _show_thoughts(self) -> None:
        question = self._last()
        self.lens.n_thoughts = self.n_thoughts
        _, thoughts = self.lens.thoughts(question, N_TOP)
        if not thoughts:
            raise UserError("command", "/thoughts: 0 thoughts; /k N asks for some")
        rows = []
        for t in thoughts:
            # The first whatever it has, the others if two digits show something of them.
            said = [(token, p) for i, (token, p) in enumerate(t.top) if i == 0 or p >= 0.005]
            rows.append([t.number, "  ".join(f"{_visible(token)} {p:.2f}" for token, p in said)])
        self._table("read by the output head", ["thought", "most probable tokens"], rows)

    def _example(self, text: str) -> None:
        if text:
            if not (text.isascii() and text.isdigit()):
                raise UserError("command", f"/example: a number of raw nodes, got {text!r}")
            self._nodes = int(text)
        hops = (1, 2) if self._nodes < 6 else (2, 6) if self._nodes < 12 else (3, 6)
        options = prosqa_graph.Options(nodes=self._nodes, min_hops=hops[0], max_hops=hops[1])
        seed = int(self._random.random() * 2**32)
        item = next(iter(prosqa.generate(options, seed, 1)))
        self.say(item["question"])
        self.ask(item["question"], item["answer"])

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        Console(stream=cast(TextIO, self.screen.file)).table(title, columns, rows)


def _visible(token: str) -> str:
    return token.replace("\n", "\\n").strip(" ") or repr(token)


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Open a checkpoint and answer until the questions end."""
    parser = options_of(twin, "chat", "Ask a checkpoint, question after question.", HELP)
    add_model(parser)
    parser.add_argument("--latents", type=int, metavar="K", help="thoughts; else the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the examples")
    options = parser.parse_args(argv)

    def run() -> None:
        if problems := too_low(options, latents=0, max_new_tokens=1, seed=0):
            raise UserError("command line", *problems)
        lens = Lens(options.model, make_backend, options.latents, options.base)
        chat = Chat(lens, rich.console.Console(), options.max_new_tokens, options.seed)
        if sys.stdin.isatty():
            _converse(chat, twin)
            return
        for line in _piped_lines():
            if not chat.answer(line):
                break
        if chat.n_failed:
            sys.exit(2)

    guarded(run)


def _converse(chat: Chat, twin: str) -> None:
    backend = chat.lens.backend
    chat.say(
        f"{twin} | {backend.model_type} {backend.n_params / 1e6:.1f}M params | {backend.device}"
        f" {backend.dtype} | {chat.lens.directory} | {chat.n_thoughts} thoughts",
        "dim",
    )
    chat.say("Ask, or /example, /help, /quit.")
    for line in _typed_lines():
        try:
            if not chat.answer(line):
                return
        except KeyboardInterrupt:
            chat.say("stopped", "dim")


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D, or Ctrl-C at the prompt."""
    try:
        # Opening it is what gives `input` line editing and the arrow keys a history.
        import readline  # noqa: F401
    except ImportError:
        pass  # some builds of Python lack it; typing works without
    while True:
        try:
            yield input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _piped_lines() -> Iterable[str]:
    # What is no UTF-8 becomes surrogates, which the tokenizer refuses in one line.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin
