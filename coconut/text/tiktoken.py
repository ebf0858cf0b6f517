"""Text to token ids and back: one face over tiktoken and Hugging Face tokenizers.

Text never makes a control token: `<|latent|>` or an end-of-text written in a question is encoded as
the characters it is made of, so that no data file can move the latents. Control tokens are put in
by id (`start_id`, `latent_id`, `end_id`, `eos_id`).
"""

import base64
import binascii
from pathlib import Path

import tiktoken
import tokenizers

from coconut.errors import UserError
from coconut.files import library_writes, read_bytes, read_json, write_json
from coconut.tasks.words import CONCEPTS, NAMES
from coconut.text.tokenizer import (
    _BYTE_TO_CHAR,
    _FAILS,
    ENCODING_FILE,
    END_OF_TEXT,
    HF_CONFIG_FILE,
    HF_FILE,
    MARKERS,
    RANKS_FILE,
    Tokenizer,
    _add_token,
    _encodable,
    _last_merge,
    _library,
)


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
        with _library(self.name, _FAILS):
            return self._encoding.encode_ordinary(_encodable(text))

    def encode_question(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_filled(self, text: str) -> list[int]:
        with _library(self.name, _FAILS):
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
        with library_writes(directory / HF_FILE, Exception):
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
    pieces = ["Is ", *NAMES]
    for concept in CONCEPTS:
        pieces += [f"Every {concept}", f" a {concept}"]
        pieces += [f" is a {concept}.{end}" for end in ("\n", "")]
        pieces += [f" or {concept}?{end}" for end in ("\n", "")]
    pieces.append("### ")
    subjects = [*NAMES, *(f"Every {concept}" for concept in CONCEPTS)]
    pieces += [f"{subject} is a {c}. " for subject in subjects for c in CONCEPTS]
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
    with _library(where, "pat_str is no pattern tiktoken can use"):
        return TiktokenTokenizer(name, pattern, ranks, special_tokens)


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
