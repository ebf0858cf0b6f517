"""Text to token ids and back: one face over tiktoken and Hugging Face tokenizers.

Text never makes a control token: `<|latent|>` or an end-of-text written in a question is encoded as
the characters it is made of, so that no data file can move the latents. Control tokens are put in
by id (`start_id`, `latent_id`, `end_id`, `eos_id`).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from coconut.checkpoints.checkpoint import read_bytes, read_json, write_json
from coconut.errors import UserError

START, END, LATENT = MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
END_OF_TEXT = "<|endoftext|>"

RANKS_FILE, ENCODING_FILE = "encoding.tiktoken", "encoding.json"
HF_FILE, HF_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# What a Hugging Face tokenizer may bring beside tokenizer.json; saving carries it along.
HF_COMPANIONS = (
    HF_CONFIG_FILE,
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

PROSQA_NAMES = (
    "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
).split()
PROSQA_CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus"
    " jelpus jompus kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus"
    " sterpus storpus terpus timpus tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()


class Tokenizer(ABC):
    """What the rest of the project knows of a tokenizer.

    eos_id ends an answer and pads a batch (pad_id). vocab_size counts the text tokens, eos among
    them: one more than their highest id. len() counts the latent markers too, so it is the number
    of embedding rows needed. start_id, end_id and latent_id are None until `with_latents`.
    chat_template is a Jinja text, None if the tokenizer brings none; special_tokens are its
    bos_token, eos_token, pad_token, ..., as far as it names them. coconut/chat.py reads both.
    """

    def __init__(self, name: str, eos_id: int, vocab_size: int, markers: dict[str, int]) -> None:
        self.name = name
        self.eos_id = self.pad_id = eos_id
        self.vocab_size = vocab_size
        self.start_id, self.end_id, self.latent_id = (markers.get(marker) for marker in MARKERS)
        self._markers = markers
        self.chat_template: str | None = None
        self.special_tokens: dict[str, str] = {}

    def __len__(self) -> int:
        return max([self.vocab_size, *(id_ + 1 for id_ in self._markers.values())])

    def decode(self, ids: Iterable[int], keep_markers: bool = False) -> str:
        """Text of the ids, without end-of-text and other control tokens.

        The latent markers go too unless `keep_markers`. Ids without a token (the spare embedding
        rows of some models) have no text. Bytes that are not UTF-8 become U+FFFD.
        """
        markers = self._markers.values()
        return self._text([i for i in ids if (keep_markers if i in markers else self._is_text(i))])

    @abstractmethod
    def _is_text(self, token_id: int) -> bool: ...

    @abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, nothing added. Raises UserError on lone surrogates."""

    @abstractmethod
    def encode_question(self, text: str) -> list[int]:
        """Ids of a text that opens a sequence: with BOS where the tokenizer's own template has it.

        GPT-2 and Qwen add nothing, Llama adds BOS.
        """

    @abstractmethod
    def encode_filled(self, text: str) -> list[int]:
        """Ids of a filled chat template, whose control tokens count; nothing is added."""

    @abstractmethod
    def is_control(self, token_id: int) -> bool:
        """Whether the id is a control token: end-of-text, a turn's end, a latent marker."""

    @abstractmethod
    def spelled(self, token_id: int) -> str:
        """A token as its vocabulary spells it; `token_id` reads it back."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of the single token spelled so, None if the vocabulary has none."""

    @abstractmethod
    def with_latents(self) -> Tokenizer:
        """The same tokenizer with the three latent markers, numbered on from the last id.

        Order: start, end, latent. Markers that are there already keep their ids.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the files that `load_tokenizer`, transformers and mlx_lm read.

        The markers are written as ordinary added tokens, as in the published code.
        """


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding: `gpt2`, or a small one kept in the checkpoint directory.

    pattern: regular expression that cuts text into pieces. ranks: bytes of a token to its id,
    0 to n-1. special_tokens: end-of-text, and the markers once added.
    """

    def __init__(
        self, name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]
    ) -> None:
        self._pattern, self._ranks, self._special_tokens = pattern, ranks, special_tokens
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )
        markers = {m: special_tokens[m] for m in MARKERS if m in special_tokens}
        others = [id_ for token, id_ in special_tokens.items() if token not in markers]
        super().__init__(
            name, special_tokens[END_OF_TEXT], max(len(ranks) - 1, *others) + 1, markers
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(_encodable(text))

    def encode_question(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_filled(self, text: str) -> list[int]:
        return self._encoding.encode(_encodable(text), allowed_special="all")

    def is_control(self, token_id: int) -> bool:
        return token_id in self._special_tokens.values()

    def spelled(self, token_id: int) -> str:
        special = {id_: token for token, id_ in self._special_tokens.items()}
        return special.get(token_id) or self._text([token_id])

    def _is_text(self, token_id: int) -> bool:
        return 0 <= token_id < len(self._ranks)

    def _text(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def token_id(self, token: str) -> int | None:
        return self._ranks.get(token.encode(), self._special_tokens.get(token))

    def with_latents(self) -> Tokenizer:
        special_tokens = dict(self._special_tokens)
        for marker in MARKERS:
            special_tokens.setdefault(
                marker, max(len(self._ranks) - 1, *special_tokens.values()) + 1
            )
        return TiktokenTokenizer(self.name, self._pattern, self._ranks, special_tokens)

    def save(self, directory: Path) -> None:
        by_rank = sorted(self._ranks, key=self._ranks.__getitem__)
        lines = [base64.b64encode(token) + b" %d\n" % self._ranks[token] for token in by_rank]
        (directory / RANKS_FILE).write_bytes(b"".join(lines))
        write_json(
            directory / ENCODING_FILE,
            {"name": self.name, "pat_str": self._pattern, "special_tokens": self._special_tokens},
        )
        self._as_hugging_face().save(str(directory / HF_FILE))
        write_json(
            directory / HF_CONFIG_FILE,
            {
                # The generic class: the architecture's own would put its pattern in place of ours.
                # transformers 5 does so all the same where config.json says qwen2, so a model
                # with one of these encodings is best shaped like GPT-2.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END_OF_TEXT,
                "pad_token": END_OF_TEXT,
                "clean_up_tokenization_spaces": False,
            },
        )

    def _as_hugging_face(self) -> tokenizers.Tokenizer:
        """The same ids from the tokenizers library."""
        spelled = {token: "".join(_BYTE_TO_CHAR[b] for b in token) for token in self._ranks}
        merges = [
            (spelled[left], spelled[right])
            for left, right in (_last_merge(token, self._ranks) for token in self._ranks)
            if right
        ]
        # ignore_merges: like tiktoken, a piece that is itself a token is returned as it is.
        engine = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {spelled[token]: rank for token, rank in self._ranks.items()},
                merges,
                ignore_merges=True,
            )
        )
        engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(self._pattern), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        engine.decoder = tokenizers.decoders.ByteLevel()
        for token in sorted(self._special_tokens, key=self._special_tokens.__getitem__):
            _add_token(engine, token, special=token not in MARKERS)
            if engine.token_to_id(token) != self._special_tokens[token]:
                raise UserError(
                    self.name,
                    f"special token {token} has id {self._special_tokens[token]}; a Hugging Face "
                    f"tokenizer would number it {engine.token_to_id(token)}: number special tokens "
                    "on from the last rank without gaps",
                )
        return engine


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json through the tokenizers library; `companions` are copied on saving."""

    def __init__(
        self, name: str, engine: tokenizers.Tokenizer, eos: str, companions: dict[str, bytes]
    ) -> None:
        self._engine, self._eos, self._companions = engine, eos, companions
        engine.no_padding()
        engine.no_truncation()
        # In memory the markers count as control tokens, so that text cannot spell them either.
        spec = json.loads(engine.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] or token["content"] in MARKERS
        self._strict = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._strict.encode_special_tokens = True
        vocabulary = engine.get_vocab(with_added_tokens=True)
        markers = {m: vocabulary[m] for m in MARKERS if m in vocabulary}
        added = self._strict.get_added_tokens_decoder()
        self._control_ids = {id_ for id_, token in added.items() if token.special}
        self._text_ids = set(vocabulary.values()) - self._control_ids
        vocab_size = max(id_ for token, id_ in vocabulary.items() if token not in markers) + 1
        super().__init__(name, vocabulary[eos], vocab_size, markers)
        self.chat_template, self.special_tokens = _chat_settings(companions)

    def encode(self, text: str) -> list[int]:
        return self._strict.encode(_encodable(text), add_special_tokens=False).ids

    def encode_question(self, text: str) -> list[int]:
        return self._strict.encode(_encodable(text), add_special_tokens=True).ids

    def encode_filled(self, text: str) -> list[int]:
        return self._engine.encode(_encodable(text), add_special_tokens=False).ids

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control_ids

    def spelled(self, token_id: int) -> str:
        return self._engine.id_to_token(token_id) or ""

    def _is_text(self, token_id: int) -> bool:
        return token_id in self._text_ids

    def _text(self, ids: list[int]) -> str:
        return self._strict.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._engine.token_to_id(token)

    def with_latents(self) -> Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        for marker in MARKERS:
            if engine.token_to_id(marker) is None:
                _add_token(engine, marker, special=False)
        return HuggingFaceTokenizer(self.name, engine, self._eos, self._companions)

    def save(self, directory: Path) -> None:
        self._engine.save(str(directory / HF_FILE))
        for name, content in self._companions.items():
            (directory / name).write_bytes(content)


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory, or a built-in one by name: `gpt2`, `prosqa`.

    A directory is read as a tiktoken encoding (encoding.tiktoken, encoding.json) if it holds one,
    else as a Hugging Face tokenizer. Raises UserError.
    """
    directory = Path(path_or_name)
    if directory.is_dir():
        if (directory / RANKS_FILE).exists() or (directory / ENCODING_FILE).exists():
            return _load_tiktoken(directory)
        return _load_hugging_face(directory)
    if str(path_or_name) in ("gpt2", "openai-community/gpt2"):
        return gpt2_encoding()
    if str(path_or_name) == "prosqa":
        return prosqa_encoding()
    if str(path_or_name) == "bytes":
        return bytes_encoding()
    raise UserError(
        str(path_or_name),
        "no such tokenizer: give a directory with tokenizer.json or encoding.tiktoken, "
        "or one of the names gpt2, prosqa, bytes",
    )


def gpt2_encoding() -> Tokenizer:
    """The published GPT-2 encoding, 50,257 tokens; tiktoken fetches it once and caches it."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    # tiktoken raises requests' errors (an OSError) without a network, ValueError on a wrong hash.
    except (OSError, ValueError) as error:
        raise UserError(
            "gpt2",
            f"the GPT-2 vocabulary cannot be fetched ({type(error).__name__}): connect to the "
            "network once, or set TIKTOKEN_CACHE_DIR to a folder with tiktoken's cached files",
        ) from error
    return TiktokenTokenizer(
        "gpt2", encoding._pat_str, encoding._mergeable_ranks, dict(encoding._special_tokens)
    )


def prosqa_encoding() -> Tokenizer:
    """A small encoding for models trained from scratch on ProsQA: one token a statement.

    2,594 tokens: the 256 bytes, a piece for each statement of a question, the pieces that steps,
    questions and answers are made of, end-of-text. A statement as one piece spares a small model
    from learning to bind an object to the subject before it, which is what keeps it on a plateau.
    Text of any other kind costs a token a byte and comes back whole.
    """
    pattern = "|".join(
        (
            # Only statements of a question are followed by a space; steps and answers are not.
            r"(?:Every [a-z]+|[A-Z][a-z]+) is a [a-z]+\. ",
            r"Every [a-z]+",
            # The asked name is the same token as a step's: what is looked up for one, is for both.
            r"Is ",
            r"[A-Z][a-z]+",
            r" is a [a-z]+\.\n?",
            r" a [a-z]+",
            r" or [a-z]+\?\n?",
            r"### ",
            # tiktoken skips what the pattern does not match, so the last branch takes anything.
            r"[\s\S]",
        )
    )
    pieces = ["Is ", *PROSQA_NAMES]
    for concept in PROSQA_CONCEPTS:
        pieces += [f"Every {concept}", f" a {concept}"]
        pieces += [f" is a {concept}.{end}" for end in ("\n", "")]
        pieces += [f" or {concept}?{end}" for end in ("\n", "")]
    pieces.append("### ")
    subjects = [*PROSQA_NAMES, *(f"Every {concept}" for concept in PROSQA_CONCEPTS)]
    pieces += [f"{subject} is a {c}. " for subject in subjects for c in PROSQA_CONCEPTS]
    tokens = [bytes([b]) for b in range(256)] + [piece.encode() for piece in pieces]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return TiktokenTokenizer("prosqa", pattern, ranks, {END_OF_TEXT: len(ranks)})


def bytes_encoding() -> Tokenizer:
    """A token a byte and end-of-text: 257 tokens, for small models on made tasks."""
    ranks = {bytes([b]): b for b in range(256)}
    return TiktokenTokenizer("bytes", r"[\s\S]", ranks, {END_OF_TEXT: len(ranks)})


def _load_tiktoken(directory: Path) -> Tokenizer:
    settings = read_json(directory / ENCODING_FILE)
    name, pattern = settings.get("name"), settings.get("pat_str")
    special_tokens = settings.get("special_tokens")
    where = str(directory / ENCODING_FILE)
    if not isinstance(name, str) or not isinstance(pattern, str):
        raise UserError(where, "name and pat_str must be strings")
    if not isinstance(special_tokens, dict) or not all(
        type(id_) is int for id_ in special_tokens.values()
    ):
        raise UserError(where, "special_tokens must map a token to its id")
    if END_OF_TEXT not in special_tokens:
        raise UserError(where, f"special_tokens must hold {END_OF_TEXT}")
    ranks = _read_ranks(directory / RANKS_FILE)
    ids = list(special_tokens.values())
    if min(ids) < len(ranks) or len(set(ids)) < len(ids) or max(ids) >= 2**31:
        raise UserError(where, f"special tokens need distinct ids from {len(ranks)} on")
    try:
        return TiktokenTokenizer(name, pattern, ranks, special_tokens)
    except ValueError as error:
        raise UserError(where, f"pat_str is no pattern tiktoken can use: {error}") from error


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number}", "expected: base64 of a token, space, rank"
            ) from error
    # tiktoken panics, rather than raises, on a byte without a token or two tokens of one rank.
    if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise UserError(str(path), "ranks must run from 0 without gap or repetition")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(str(path), "each of the 256 bytes needs a token")
    return ranks


def _load_hugging_face(directory: Path) -> Tokenizer:
    path = directory / HF_FILE
    if path.exists():
        try:
            engine = tokenizers.Tokenizer.from_str(read_bytes(path).decode())
        # The tokenizers library raises plain Exception for whatever is wrong in the file.
        except Exception as error:
            raise UserError(str(path), f"not a tokenizer ({error})") from error
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        engine = _engine_from_transformers(directory)
    else:
        raise UserError(
            str(directory),
            f"holds no tokenizer: expected {HF_FILE} or {RANKS_FILE}; name one (key tokenizer)",
        )
    companions = {
        name: read_bytes(directory / name) for name in HF_COMPANIONS if (directory / name).exists()
    }
    eos = _end_of_text(directory, engine)
    return HuggingFaceTokenizer(directory.name, engine, eos, companions)


def _engine_from_transformers(directory: Path) -> tokenizers.Tokenizer:
    """An old-style directory (vocab.json and merges.txt only), converted by transformers."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            str(directory),
            f"holds vocab.json and merges.txt but no {HF_FILE}; to convert them install "
            "transformers, or save the tokenizer anew with a current one",
        ) from error
    try:
        converted = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return tokenizers.Tokenizer.from_str(converted.backend_tokenizer.to_str())
    # Its converters raise whatever the broken file makes them stumble over.
    except Exception as error:
        raise UserError(
            str(directory), f"transformers cannot read the tokenizer: {error}"
        ) from error


def _chat_settings(companions: dict[str, bytes]) -> tuple[str | None, dict[str, str]]:
    """(chat template, special tokens by name) that a tokenizer's companion files hold."""
    tokens, template = {}, None
    for name in ("special_tokens_map.json", HF_CONFIG_FILE):
        settings = _json_object(name, companions.get(name, b"{}"))
        for key, value in settings.items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                tokens[key] = value
        found = settings.get("chat_template", template)
        if isinstance(found, list):  # several by name; the others are for tools and retrieval
            found = {f.get("name"): f.get("template") for f in found}.get("default")
        template = found if isinstance(found, str) else template
    # A file of its own is the newer form and comes first, as in transformers.
    own = companions.get("chat_template.jinja")
    return template if own is None else own.decode(), tokens


def _json_object(name: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(name, f"not JSON, the file is damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(name, f"expected a JSON object, got {type(found).__name__}")
    return found


def _end_of_text(directory: Path, engine: tokenizers.Tokenizer) -> str:
    """The end-of-text token: from the tokenizer's settings, else the model's."""
    for name in (HF_CONFIG_FILE, "special_tokens_map.json"):
        if (directory / name).exists():
            eos = read_json(directory / name).get("eos_token")
            eos = eos.get("content") if isinstance(eos, dict) else eos
            if isinstance(eos, str) and eos not in MARKERS and engine.token_to_id(eos) is not None:
                return eos
    if (directory / "config.json").exists():
        eos_id = read_json(directory / "config.json").get("eos_token_id")
        if type(eos_id) is int and eos_id >= 0 and (eos := engine.id_to_token(eos_id)) is not None:
            return eos
    raise UserError(
        str(directory),
        f"no end-of-text token: set eos_token in {HF_CONFIG_FILE} to a token of the vocabulary",
    )


def _add_token(engine: tokenizers.Tokenizer, token: str, special: bool) -> None:
    added = tokenizers.AddedToken(token, normalized=False, special=special)
    engine.add_special_tokens([added]) if special else engine.add_tokens([added])


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge gives this one; (token, b"") if merges do not lead to it.

    Byte-pair encoding of the token by the lower ranks alone ends in the pair that made it.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        best = min(pairs)
        if best >= ranks[token]:
            return token, b""
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else (token, b"")


def _byte_to_char() -> list[str]:
    """One printable character for each byte, as Hugging Face spells byte-level tokens.

    Printable Latin-1 stands for itself; the other bytes, in order, for the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b if b in printable else 0x100 + hidden.index(b)) for b in range(256)]


_BYTE_TO_CHAR = _byte_to_char()
_SURROGATE = re.compile("[\ud800-\udfff]")


def _encodable(text: str) -> str:
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise UserError(
            "text",
            f"character {found.start()} is a lone surrogate (U+{ord(found.group()):04X}), "
            "which no encoding can keep: repair the text",
        )
    return text
