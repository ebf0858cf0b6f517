"""The official ProsQA files: their names, where they are published, what is known of them."""

from dataclasses import dataclass
from pathlib import Path

from coconut.files import sha256

AT = (
    "https://raw.githubusercontent.com/facebookresearch/coconut/"
    "27273cb8cca4bb763c041a63b036d0c3b7cbbb48/data"
)
HOW = "python data/download.py prosqa"


@dataclass(frozen=True)
class Official:
    """An official file: how many items it holds, its sha256 (None: not known yet).

    made_before: sha256 of the file that runs once made under this name.
    """

    items: int
    sha256: str | None
    made_before: str | None = None


PROSQA = {
    # Too large to have been looked at here: its digest is recorded when it is first downloaded.
    "prosqa_train.json": Official(
        17_886, None, "664d45486e44dc55b2c1d2016afdcd29e57293cab1bbc09056ee311cd59884aa"
    ),
    "prosqa_valid.json": Official(
        300, "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"
    ),
    "prosqa_test.json": Official(
        500, "82ddc0afe6ee30eb31bb16fa208e293e55278a20fa987098d48519cae7e12680"
    ),
}


def absent(path: str | Path | None) -> Official | None:
    """What is known of an official file that is not there; None for any other path."""
    if path is None or Path(path).exists():
        return None
    return PROSQA.get(Path(path).name)


def note(path: str | Path) -> str:
    """What is to be said of a path with an official file's name: absent, or another; "" else."""
    official = PROSQA.get(Path(path).name)
    if official is None:
        return ""
    if not Path(path).exists():
        return f"{path}: an official file, not there yet; `{HOW}` fetches it"
    found = sha256(Path(path))
    if official.sha256 not in (None, found) or found == official.made_before:
        return f"{path}: bears an official file's name, but is another; `{HOW}` fetches that one"
    return ""
