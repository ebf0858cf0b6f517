"""The official ProsQA files: their names, where they are published, what is known of them."""

from pathlib import Path

from coconut.files import sha256

AT = (
    "https://raw.githubusercontent.com/facebookresearch/coconut/"
    "27273cb8cca4bb763c041a63b036d0c3b7cbbb48/data"
)
HOW = "python data/download.py prosqa"
PROSQA: dict[str, tuple[int, str | None]] = {
    # Not seen here: its digest is recorded when it is first downloaded.
    "prosqa_train.json": (17_886, None),
    "prosqa_valid.json": (300, "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"),
    "prosqa_test.json": (500, "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680"),
}
"""Name -> (items, sha256; None: not known)."""
MADE_BEFORE = "664d45486e44dc55b2c1d2016afdcd29e57293cab1bbc09056ee311cd59884aa"
"""sha256 of the items that runs once made under the training file's name."""


def absent(path: str | Path | None) -> int:
    """How many items an official file holds that is not there; 0 for any other path."""
    return 0 if path is None or Path(path).exists() else PROSQA.get(Path(path).name, (0,))[0]


def note(path: str | Path) -> str:
    """What is to be said of a path with an official file's name: absent, or another; "" else."""
    if Path(path).name not in PROSQA:
        return ""
    if not Path(path).exists():
        return f"{path}: an official file, not there yet; `{HOW}` fetches it"
    found, known = sha256(Path(path)), PROSQA[Path(path).name][1]
    if known not in (None, found) or found == MADE_BEFORE:
        return f"{path}: bears an official file's name, but is another; `{HOW}` fetches that one"
    return ""
