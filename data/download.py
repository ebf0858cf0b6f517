"""Download the public files the builders read: checked by sha256, resumed where they stopped.

    python data/download.py gsm8k-train gsm8k-test
    python data/download.py prosqa
    python data/download.py --repo OWNER/NAME --file PATH [--revision COMMIT] [--sha256 HEX]

The second form takes any file of a data set on the Hugging Face hub (HF_ENDPOINT and HF_TOKEN
count), named by a commit or by its checksum: what a branch holds may change. A transfer that is cut
leaves `NAME.part`; the next run asks the server for the rest only.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if not __package__:  # run as `python data/download.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut.errors import UserError
from coconut.files import sha256
from coconut.tasks import official
from coconut.tasks.files import command

_TRIES = 5  # without a byte of progress
_TIMEOUT = 30  # seconds of silence


@dataclass(frozen=True)
class Source:
    """A file to fetch: its address, name here, sha256 (None: not known) and licence."""

    url: str
    name: str
    sha256: str | None
    licence: str = ""
    is_hub: bool = False
    folder: str = "data/cache"


_GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
)
_ICOT = "da03/Internalize_CoT_Step_by_Step/c2e3891d8d577beeaff03fa3b076d1e4db96cfe8/data/gsm8k"

# The hub's own copy of GSM8K is parquet, which would need one more dependency: these are the files
# of the original repositories, pinned to a commit.
SOURCES = {
    "gsm8k-train": Source(
        f"{_GSM8K}/train.jsonl",
        "gsm8k_train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "MIT",
    ),
    "gsm8k-test": Source(
        f"{_GSM8K}/test.jsonl",
        "gsm8k_test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "MIT",
    ),
    "gsm8k-icot-valid": Source(
        f"https://raw.githubusercontent.com/{_ICOT}/valid.txt",
        "gsm8k_icot_valid.txt",
        "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87",
        "MIT",
    ),
    "gsm8k-icot-test": Source(
        f"https://raw.githubusercontent.com/{_ICOT}/test.txt",
        "gsm8k_icot_test.txt",
        "e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8",
        "MIT",
    ),
    # In Git LFS: its content has another host. 385,620 lines, 88 MB.
    "gsm8k-aug-train": Source(
        f"https://media.githubusercontent.com/media/{_ICOT}/train.txt",
        "gsm8k_aug_train.txt",
        "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c",
        "MIT",
    ),
    # Where the published YAML files look for them.
    **{
        name.removesuffix(".json").replace("_", "-"): Source(
            f"{official.AT}/{name}", name, known, "MIT", folder="data"
        )
        for name, (_, known) in official.PROSQA.items()
    },
}
GROUPS = {"prosqa": ("prosqa-train", "prosqa-valid", "prosqa-test")}
"""Several files by one name."""


def hub_source(repo: str, file: str, revision: str = "main", sha256: str | None = None) -> Source:
    """The source of a file in a data set repository on the Hugging Face hub."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError("--repo", f"expected OWNER/NAME, got {repo!r}") from None
    url = hf_hub_url(repo, file, repo_type="dataset", revision=revision)
    return Source(url, Path(file).name, sha256, is_hub=True)


def fetch(source: Source, directory: Path | str) -> Path:
    """Download one file unless it is there already; return its path.

    The file appears under its name only when its checksum is right. Raises UserError, in one line,
    for a file that does not exist, no network, a transfer cut too often, or a wrong checksum.
    """
    path = Path(directory) / source.name
    record = path.with_name(path.name + ".sha256")
    if source.sha256 is None and record.exists():
        source = replace(source, sha256=record.read_text().strip())
    if path.exists():
        if source.sha256 and sha256(path) != source.sha256:
            raise UserError(
                str(path), "exists with another checksum than published; remove it or rename it"
            )
        return path
    part = path.with_name(path.name + ".part")
    # A run killed just before the rename left a whole part: nothing is missing, the server would
    # refuse to continue it.
    if not (source.sha256 and part.exists() and sha256(part) == source.sha256):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _transfer(source, part)
        except OSError as error:  # among them the hub package's errors for HTTP statuses
            raise _failure(source, error) from None
    actual = sha256(part)
    if source.sha256 and actual != source.sha256:
        part.unlink()
        raise UserError(
            str(path),
            f"checksum mismatch from {source.url}: expected sha256 {source.sha256}, got {actual}; "
            "nothing kept, try again",
        )
    part.replace(path)
    if source.sha256 is None and not source.is_hub:
        record.write_text(f"{actual}\n")
        print(f"{path}: its sha256 was not known before; recorded in {record}")
    return path


def _transfer(source: Source, part: Path) -> None:
    """Fill up `part` to the whole file; after a cut, go on from there while data keep coming."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(source.name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    tries = _TRIES
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        while True:
            before = _size(part)
            try:
                return _stream(source, part, partial(progress.update, task))
            except Exception as error:
                # The hub package's HTTP library changes with its version, so it is known by name.
                if type(error).__module__.split(".")[0] not in ("httpx", "httpx2"):
                    raise
                tries = _TRIES if _size(part) > before else tries - 1
                if not tries:
                    raise ConnectionError(str(error)) from error
                time.sleep(1)


def _stream(source: Source, part: Path, update: Callable[..., None]) -> None:
    from huggingface_hub import get_session, get_token
    from huggingface_hub.utils import hf_raise_for_status

    begin = _size(part)
    # Compressed on the way, a range would count other bytes than the file's.
    headers = {"Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    if source.is_hub and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"
    with get_session().stream(
        "GET", source.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the server sends the whole file whatever was asked
            begin = 0
        length = response.headers.get("Content-Length")
        update(completed=begin, total=begin + int(length) if length else None)
        with part.open("ab" if begin else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                update(advance=len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _failure(source: Source, error: OSError) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 416:  # the part is as long as the file or longer: it cannot be continued
        return UserError(source.url, f"{source.name}.part does not fit; remove it and try again")
    if status in (401, 403, 404):
        return UserError(
            source.url, f"no such file there, or no access (HTTP {status}); check the name"
        )
    reason = f"HTTP {status}" if status else (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        source.url, f"download failed ({reason}); check the network and run again to resume"
    )


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        prog="data/download.py", description="Download public data files, checked and resumable."
    )
    names = ", ".join([*GROUPS, *SOURCES])
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--repo", metavar="OWNER/NAME", help="a data set on the Hugging Face hub")
    parser.add_argument("--file", metavar="PATH", help="a file of that repository")
    parser.add_argument("--revision", default="main", help="a commit; with --sha256 a branch too")
    parser.add_argument("--sha256", metavar="HEX", help="what its checksum must be")
    help = "(data/cache; ProsQA: data)"
    parser.add_argument("--out-dir", metavar="DIR", help=help)
    args = parser.parse_args()
    if bool(args.repo) != bool(args.file) or not (args.names or args.repo):
        parser.error("give one or more NAMEs, or --repo with --file")
    if args.repo and not args.sha256 and not re.fullmatch("[0-9a-f]{40}", args.revision):
        parser.error("--repo needs --revision COMMIT (40 digits), or --sha256: a branch may change")
    wanted = [one for name in args.names for one in GROUPS.get(name, (name,))]
    unknown = [name for name in wanted if name not in SOURCES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {names}")
    sources = [SOURCES[name] for name in wanted]
    if args.repo:
        sources.append(hub_source(args.repo, args.file, args.revision, args.sha256))
    for source in sources:
        path = fetch(source, args.out_dir or source.folder)
        print(f"have {path} | {path.stat().st_size:,} bytes | sha256 {sha256(path)}")


if __name__ == "__main__":
    command(main)
