"""A folder of small pictures that annotation files can name."""

import json
from pathlib import Path

import pytest
from PIL import Image

PICTURES = ("a.jpg", "b.jpg", "sub/c.jpg")


class DataRoot:
    """A data root: `images/` holds pictures of 40 x 20 pixels."""

    def __init__(self, path: Path):
        self.path = path
        self.add_pictures(*PICTURES)

    def add_pictures(self, *names: str) -> None:
        for name in names:
            file = self.path / "images" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20)).save(file)

    def write(self, name: str, content) -> str:
        """Writes text, JSON lines (a tuple of rows) or JSON; returns `name`."""
        if isinstance(content, tuple):
            content = "\n".join(map(json.dumps, content))
        text = content if isinstance(content, str) else json.dumps(content)
        (self.path / name).write_text(text, encoding="utf-8")
        return name


@pytest.fixture
def data_root(tmp_path):
    return DataRoot(tmp_path)
