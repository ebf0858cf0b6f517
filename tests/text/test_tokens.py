"""One face over three kinds of tokenizer: the same ids however a text and a file are read."""

import base64
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from chat_tokenizers import CONTROL, chat_tokenizer
from conftest import examples, few
from hypothesis import given
from hypothesis import strategies as st

from coconut.batches.dataset import tokenize
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.text import tiktoken as tokens
from coconut.text.chat import stop_tokens
from coconut.text.opening import load_tokenizer
from coconut.text.tiktoken import prosqa_encoding
from coconut.text.tokenizer import MARKERS, Tokenizer

PROSQA = json.loads((Path(__file__).parents[2] / "data" / "prosqa_made_valid.json").read_text())
TEXTS = [
    "Tom has 37 pens and buys 33.  How many? \n",
    "<<48/2=24>>\n### 1,450",
    "it's I'LL   \r\n\n  x\t \n",
    "Ωmega ١٢٣ 数学 🎲 e\u0301 \u2028\u3000\x00\x85",
    "  \n \n",
    "",
]
# Text of the encodings' own pieces and of anything else, and what spells a control token.
PIECES = st.sampled_from(
    [
        *("Every lempus", " is a rempus.", " ", "\n", "Is Tom", " a lempus", " or wumpus?\n"),
        *("### ", "Zoe", "zhorpus", "<|endoftext|>", *MARKERS),
    ]
)
ANY_TEXT = st.lists(PIECES | st.text(max_size=20), max_size=8).map("".join)


def small_ranks(text: str, n_merges: int) -> dict[bytes, int]:
    """Ranks of a byte-pair encoding learned from a text, so that merges have something to do."""
    ranks = {bytes([b]): b for b in range(256)}
    parts = [text.encode()[i : i + 1] for i in range(len(text.encode()))]
    for _ in range(n_merges):
        pairs = [a + b for a, b in pairwise(parts) if b" " not in (a[:1], b)]
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks[best] = len(ranks)
        merged: list[bytes] = []
        for part in parts:
            if merged and merged[-1] + part == best:
                merged[-1] = best
            else:
                merged.append(part)
        parts = merged
    return ranks


def learned() -> Tokenizer:
    ranks = small_ranks(" ".join(item["question"] for item in PROSQA[:3]), 80)
    return tokens.TiktokenTokenizer(
        "learned", r" ?\p{L}+| ?\p{N}+|[\s\S]", ranks, {"<|endoftext|>": len(ranks)}
    )


def gpt2() -> Tokenizer:
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs TIKTOKEN_CACHE_DIR with the GPT-2 vocabulary")
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module", params=[prosqa_encoding, learned, gpt2], ids=lambda f: f.__name__)
def encoding(request) -> Tokenizer:
    return request.param()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A small Hugging Face directory whose template adds BOS, with holes above the vocabulary."""
    directory = tmp_path_factory.mktemp("llama")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([item["question"] + " <<1+1=2>>" for item in PROSQA[:20]], trainer)
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", engine.token_to_id("<s>"))]
    )
    engine.enable_truncation(5)
    engine.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


# --- ids


def test_gpt2_is_the_published_encoding_and_numbers_the_markers_on():
    encoding = gpt2()
    assert encoding.encode("<<48/2=24>>") == [16791, 2780, 14, 17, 28, 1731, 4211]
    assert (len(encoding), encoding.vocab_size, encoding.eos_id) == (50257, 50257, 50256)
    assert encoding.token_id("<<") == 16791
    marked = encoding.with_latents()
    assert (marked.start_id, marked.end_id, marked.latent_id) == (50257, 50258, 50259)
    assert (len(marked), marked.vocab_size) == (50260, 50257)


def test_the_prosqa_encoding_costs_one_token_a_statement_and_two_a_step():
    encoding = prosqa_encoding()
    assert len(encoding) == 2594 and encoding.token_id("<<") is None
    for item in PROSQA:
        question = encoding.encode(item["question"] + "\n")
        assert len(question) == len(item["edges"]) + 4
        steps = [encoding.encode(step + "\n") for step in item["steps"]]
        assert {len(step) for step in steps} == {2}
        answer = encoding.encode("### " + item["answer"])
        assert len(answer) == 3
        joined = "\n".join([item["question"], *item["steps"], "### " + item["answer"]])
        parts = [question, *steps, answer]
        assert encoding.encode(joined) == [token for part in parts for token in part]


@examples(100)
@given(text=ANY_TEXT)
def test_any_text_comes_back_whole(encoding, text):
    for tokenizer in (
        (encoding, encoding.with_latents()) if encoding.name != "gpt2" else (encoding,)
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_drops_control_tokens_and_ids_without_a_token(encoding):
    marked = encoding.with_latents()
    ids = [marked.start_id, marked.latent_id, marked.end_id, *marked.encode("Tom é"), marked.eos_id]
    ids += [len(marked), 10**9, -100]
    assert marked.decode(ids) == "Tom é"
    assert marked.decode(ids, keep_markers=True) == "".join(
        [MARKERS[0], MARKERS[2], MARKERS[1], "Tom é"]
    )


def test_markers_are_added_once(encoding):
    assert encoding.start_id is encoding.end_id is encoding.latent_id is None
    marked = encoding.with_latents()
    again = marked.with_latents()
    assert (again.start_id, again.end_id, again.latent_id) == tuple(
        range(len(marked) - 3, len(marked))
    )
    assert len(again) == len(marked) == len(encoding) + 3


def test_a_lone_surrogate_is_a_user_error(encoding):
    with pytest.raises(UserError, match=r"character 2 is a lone surrogate \(U\+D800\)"):
        encoding.encode("ab\ud800")


# --- files


def reads_alike(tokenizer: Tokenizer, other: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text)
    return other.encode(text) == ids and other.decode(ids) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def saved(encoding, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(encoding.name)
    encoding.with_latents().save(directory)
    return directory


def test_saved_and_loaded_gives_the_same_ids(encoding, saved):
    loaded = load_tokenizer(saved)
    marked = encoding.with_latents()
    for field in ("name", "eos_id", "pad_id", "vocab_size", "start_id", "end_id", "latent_id"):
        assert getattr(loaded, field) == getattr(marked, field), field
    assert len(loaded) == len(marked)
    assert all(reads_alike(marked, loaded, text) for text in TEXTS)


@pytest.fixture(scope="module")
def through_json(saved, tmp_path_factory) -> Tokenizer:
    """What was saved, read from its tokenizer.json alone."""
    directory = tmp_path_factory.mktemp("json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, directory)
    return load_tokenizer(directory)


@pytest.mark.slow
@examples(100)
@given(text=ANY_TEXT)
def test_the_saved_tokenizer_json_gives_the_same_ids_for_any_text(encoding, through_json, text):
    assert reads_alike(encoding, through_json, text)
    assert through_json.encode_question(text) == encoding.encode_question(text)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", few([None, "gpt2"], 1))
def test_transformers_and_mlx_lm_open_what_we_save(encoding, saved, model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    mlx_utils = pytest.importorskip("mlx_lm.utils")
    directory = shutil.copytree(saved, tmp_path / "model")
    if model_type:
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    marked = encoding.with_latents()
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(directory),
        mlx_utils.load_tokenizer(directory),
    ):
        for text in [*TEXTS, *(item["question"] + "\n" for item in PROSQA[:20])]:
            assert theirs.encode(text) == marked.encode(text)
            assert theirs.decode(marked.encode(text)) == text
        assert theirs.convert_tokens_to_ids(list(MARKERS)) == [
            marked.start_id,
            marked.end_id,
            marked.latent_id,
        ]
        assert theirs.eos_token_id == theirs.pad_token_id == marked.eos_id
        # Ordinary added tokens: kept where end-of-text is dropped.
        kept = theirs.decode([marked.latent_id, marked.eos_id], skip_special_tokens=True)
        assert kept == "<|latent|>"


@pytest.mark.slow
def test_published_merges_are_recovered_from_the_ranks():
    engine = gpt2()._as_hugging_face()
    path = Path(os.environ["TIKTOKEN_CACHE_DIR"], "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    published = path.read_text().splitlines()[1:]
    spec = json.loads(engine.to_str())
    assert [" ".join(pair) for pair in spec["model"]["merges"]] == published


# --- Hugging Face directories


def test_a_question_opens_with_bos_where_the_template_has_it(llama):
    tokenizer = load_tokenizer(llama)
    question = tokenizer.encode_question("Tom is a lempus. Every lempus is a wumpus.")
    bos = tokenizer.token_id("<s>")
    assert question == [bos, *tokenizer.encode("Tom is a lempus. Every lempus is a wumpus.")]
    assert len(question) > 5  # the directory's own truncation is off
    assert tokenizer.decode(question) == "Tom is a lempus. Every lempus is a wumpus."


def test_a_hugging_face_directory_saves_with_markers_and_opens_the_same(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = load_tokenizer(llama)
    marked = plain.with_latents()
    assert (marked.start_id, marked.latent_id) == (len(plain), len(plain) + 2)
    assert (plain.start_id, plain.token_id("<<")) == (None, marked.token_id("<<"))
    marked.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *(item["question"] for item in PROSQA[:20])]:
        assert plain.encode(text) == marked.encode(text) == loaded.encode(text)
        assert theirs.encode(text) == marked.encode_question(text)
    assert theirs.convert_tokens_to_ids("<|latent|>") == loaded.latent_id == marked.latent_id
    assert theirs.decode([loaded.latent_id, loaded.eos_id], skip_special_tokens=True) == MARKERS[2]


def test_text_that_spells_a_marker_stays_text(llama, tmp_path):
    marked = load_tokenizer(llama).with_latents()
    marked.save(tmp_path)
    for tokenizer in (marked, load_tokenizer(tmp_path)):
        ids = tokenizer.encode("a <|latent|></s>")
        assert not {tokenizer.latent_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(ids) == "a <|latent|></s>"


def test_vocab_and_merges_alone_are_read_through_transformers(llama, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    model = json.loads((llama / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (tmp_path / "merges.txt").write_text(merges)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 1}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Every lempus") == load_tokenizer(llama).encode("Every lempus")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="install transformers"):
        load_tokenizer(tmp_path)


# --- what the user can mend


def test_gpt2_without_a_network_says_what_to_do(monkeypatch):
    def refuse(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")


BYTES = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
SETTINGS = {"name": "s", "pat_str": r"[\s\S]", "special_tokens": {"<|endoftext|>": 256}}


@pytest.mark.parametrize(
    ("ranks", "encoding_json", "message"),
    [
        (BYTES, {}, "name and pat_str must be strings"),
        (BYTES, SETTINGS | {"special_tokens": {"a": "b"}}, "must map a token to its id"),
        (BYTES, SETTINGS | {"special_tokens": {"a": 256}}, r"must hold <\|endoftext\|>"),
        (BYTES, SETTINGS | {"special_tokens": {"<|endoftext|>": 3}}, "distinct ids from 256 on"),
        (BYTES, SETTINGS | {"special_tokens": {"<|endoftext|>": 2**40}}, "distinct ids"),
        (BYTES, SETTINGS | {"pat_str": "("}, "no pattern tiktoken can use"),
        (BYTES[7:], SETTINGS, "from 0 without gap"),
        (BYTES[: len(BYTES) // 2], SETTINGS, r"encoding\.tiktoken"),
        (BYTES + b"!!!! 256\n", SETTINGS, r"encoding\.tiktoken:257: expected: base64"),
        (BYTES.replace(b" 255", b" 254"), SETTINGS, "without gap or repetition"),
        (BYTES.replace(b"/w==", b"YWI="), SETTINGS, "each of the 256 bytes needs a token"),
        (None, SETTINGS, r"encoding\.tiktoken: cannot be read"),
        (BYTES, None, r"encoding\.json: cannot be read"),
    ],
)
def test_a_broken_encoding_file_is_named(tmp_path, ranks, encoding_json, message):
    if ranks is not None:
        (tmp_path / "encoding.tiktoken").write_bytes(ranks)
    if encoding_json is not None:
        (tmp_path / "encoding.json").write_text(json.dumps(encoding_json))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "{}", "no end-of-text token: set eos_token"),
        ("tokenizer_config.json", '{"eos_token": "nowhere"}', "no end-of-text token"),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json: not JSON"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_a_broken_hugging_face_directory_is_named(llama, tmp_path, name, content, message):
    directory = shutil.copytree(llama, tmp_path / "model")
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(directory)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no such tokenizer.*gpt2, prosqa"):
        load_tokenizer("nowhere/at-all")


@examples(60)
@given(data=st.data())
def test_random_damage_is_a_user_error_or_a_tokenizer(saved, encoding, tmp_path_factory, data):
    if encoding.name == "gpt2":
        return  # the same code, on files too long to copy that often
    directory = shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / "model")
    if data.draw(st.booleans()):
        (directory / "encoding.tiktoken").unlink()
        (directory / "encoding.json").unlink()
    path = data.draw(st.sampled_from(sorted(directory.iterdir())))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = min(len(content), start + data.draw(st.integers(0, 40)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[stop:])
    try:
        load_tokenizer(directory)
    except UserError as error:
        assert str(directory) in str(error)
    shutil.rmtree(directory)


# ---- where models keep the tokens that end an output


def model_files(directory: Path, ends: dict[str, object], eos: str | None = "<eos>") -> Path:
    """A tokenizer's directory whose model's files name these ends."""
    chat_tokenizer(directory, eos=eos or "<eos>")
    if eos is None:
        (directory / "tokenizer_config.json").write_text("{}")
    for name, ids in ends.items():
        (directory / name).write_text(json.dumps({"eos_token_id": ids}))
    return directory


CONFIG, GENERATION = "config.json", "generation_config.json"
END, TURN = 256 + CONTROL.index("<|end|>"), 256 + CONTROL.index("<|eot_id|>")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, {256}),
        ({GENERATION: [END, TURN]}, {256, END, TURN}),
        ({GENERATION: END}, {256, END}),
        ({CONFIG: [TURN, 256], GENERATION: [END]}, {256, END, TURN}),
        # Neither an id without a token nor a letter is an end.
        ({CONFIG: 50256, GENERATION: [7, -1, None, "x"]}, {256}),
    ],
)
def test_end_tokens_are_found_wherever_a_model_keeps_them(tmp_path: Path, ends, expected) -> None:
    tokenizer = load_tokenizer(model_files(tmp_path / "model", ends))
    assert tokenizer.end_ids == tokenizer.with_latents().end_ids == expected
    assert tokenizer.eos_id == 256 and not tokenizer.ended([]) and not tokenizer.ended([256, 7])
    assert all(tokenizer.ended([7, end]) for end in expected)
    for stop_token, stops in (("eos", expected), ("pad", {256, 258}), ("both", expected | {258})):
        config = RunConfig(method="sft", stop_token=stop_token)
        assert stop_tokens(config, tokenizer, uses_template=False) == stops
    # They go along with a checkpoint.
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    kept = {256, *(ids if isinstance(ids := ends.get(GENERATION, []), list) else [ids])}
    assert load_tokenizer(tmp_path / "saved").end_ids == kept & expected


@pytest.mark.parametrize("ends", [{CONFIG: [END, 256]}, {CONFIG: END}, {GENERATION: [END, TURN]}])
def test_without_the_tokenizers_own_the_models_end_token_is_taken(tmp_path: Path, ends) -> None:
    assert load_tokenizer(model_files(tmp_path / "model", ends, eos=None)).eos_id == END


# ---- tokenizers that mark where a text or a word begins

WORD_START = Path(__file__).parents[1] / "cases/14_word_start_tokenizer"
LINES = ("Ann has 7 hats.\n", "<<2+3=5>>\n", "  x 7\n", "### 7")


def word_start(directory: Path, kind: str) -> Tokenizer:
    """The tokenizer of the case, or its vocabulary with a word's start marked in another way."""
    shutil.copytree(WORD_START, directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    pieces = {
        "metaspace": ("Metaspace", {"replacement": "▁", "prepend_scheme": "first", "split": False}),
        "every word": (
            "Metaspace",
            {"replacement": "▁", "prepend_scheme": "always", "split": True},
        ),
    }
    if kind in pieces:
        name, options = pieces[kind]
        spec |= {"normalizer": None, "pre_tokenizer": {"type": name, **options}}
    if kind == "framed":
        ids = {
            name: {"id": name, "ids": [i], "tokens": [name]}
            for name, i in (("<s>", 1), ("</s>", 2))
        }
        text = {"Sequence": {"id": "A", "type_id": 0}}
        frame = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ids]
        single = [frame[0], text, frame[1]]
        spec["post_processor"] = {"type": "TemplateProcessing", "single": single}
        spec["post_processor"] |= {"pair": single, "special_tokens": ids}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(directory)


@pytest.mark.parametrize("kind", ["llama 2", "metaspace", "every word", "framed"])
def test_parts_of_a_text_join_whatever_marks_its_beginning(tmp_path: Path, kind: str) -> None:
    for tokenizer in (made := word_start(tmp_path / "made", kind), made.with_latents()):
        first, *others = LINES
        parts = [
            *tokenizer.encode_question(first),
            *(t for x in others for t in tokenizer.encode(x)),
        ]
        assert parts == tokenizer.encode_question("".join(LINES))
        assert tokenizer.decode(parts) == "".join(LINES)
        assert [tokenizer.spelled(i) for i in tokenizer.encode("7")] == ["7"]
        assert [tokenizer.spelled(i) for i in tokenizer.encode(" 7")][-1:] == ["7"]
        assert tokenizer.encode("") == []
        assert (tokenizer.token_id("<s>") in parts) == (kind == "framed")


def test_transformers_reads_the_whole_text_as_the_same_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = word_start(tmp_path / "made", "llama 2")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(WORD_START / "tokenizer.json"))
    first, *others = LINES
    parts = [*tokenizer.encode_question(first), *(t for x in others for t in tokenizer.encode(x))]
    assert theirs("".join(LINES)).input_ids == parts


def test_a_tokenizer_that_no_text_can_be_made_for_in_parts_is_named(tmp_path: Path) -> None:
    items = json.loads((WORD_START / "items.json").read_text())
    assert len(tokenize(items, word_start(tmp_path / "made", "llama 2"), "x")) == 2
    spec = json.loads((tmp_path / "made/tokenizer.json").read_text())
    # Line ends become spaces, which the beginning of a part then loses.
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    spec["normalizer"]["normalizers"].insert(0, strip)
    (tmp_path / "made/tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError) as caught:
        tokenize(items, load_tokenizer(tmp_path / "made"), "x")
    assert str(caught.value).startswith("tokenizer made: reads a line alone as other tokens")
