"""Builds with the files that ship: copied into the package, so that they are checked in once."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from coconut.files import shipped_names  # noqa: E402


class WithShipped(build_py):
    """build_py that fills `coconut/shipped/` of a wheel, and names its files for the sdist."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has them where they are
            return
        for name in shipped_names(ROOT):
            target = Path(self.build_lib, "coconut", "shipped", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / name), str(target))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *shipped_names(ROOT)]


setup(cmdclass={"build_py": WithShipped})
