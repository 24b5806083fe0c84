"""The page carries everything, fetches nothing, and escapes what it is given."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.report import Report, numbers, page

VOID = {"meta", "img", "br", "hr", "link", "input"}
CONFIG = {"study": "prune", "options": {"model": "a<b", "fractions": [0.0, 0.5], "limit": None}}
ENVIRONMENT = {"command": "ablate prune --model 'a<b'", "cpus": 2, "versions": {"torch": "2.13.0"}}


class Reader(HTMLParser):
    """Tags in order, with their nesting checked, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


def image() -> bytes:
    made = io.BytesIO()
    Figure(figsize=(2, 1), dpi=100).savefig(made, format="png")
    return made.getvalue()


def made(**parts) -> str:
    report = Report(title="Which heads?", **parts)
    return page(report, "14 of 24 & more", {"accuracy": image()}, CONFIG, ENVIRONMENT)


def test_everything_given_is_on_the_page():
    table = pd.DataFrame({"head": ["L0H1"], "drop": [0.112], "tested": [True]})
    reader = Reader(
        made(
            question="First `code`.\n\nSecond.",
            findings=["a finding"],
            captions={"accuracy": 'a "caption"'},
            tables={"critical heads": table},
            caveats=["a caveat"],
        )
    )
    for words in (
        "Which heads?",
        "14 of 24 & more",
        "First code.",
        "Second.",
        "a finding",
        "a caveat",
        'a "caption"',
        "critical heads",
        "L0H1",
        "0.112",
        "True",
        "ablate prune --model 'a<b'",
        "0.0, 0.5",
        "none",
        "2.13.0",
    ):
        assert words in reader.text
    assert reader.attributes("img", "alt") == ['a "caption"']
    assert [attributes["width"] for tag, attributes in reader.tags if tag == "img"] == ["120"]
    assert reader.text.count("First") == 1


def test_images_are_inside_and_nothing_is_fetched_or_run():
    html = made()
    source = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert source is not None
    assert base64.b64decode(source[1]) == image()
    reader = Reader(html)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "iframe"}
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in html


def test_hostile_text_stays_text():
    evil = "<script>alert(1)</script>"
    html = made(
        question=evil,
        findings=[evil],
        captions={"accuracy": f'"{evil}'},
        tables={evil: pd.DataFrame({evil: [evil]})},
        caveats=[f"`{evil}`"],
    )
    assert "<script" not in html
    assert Reader(html).text.count(evil) == 7


def test_sections_without_content_are_left_out():
    headings = re.findall("<h2>(.*?)</h2>", made())
    assert headings == ["How to get it again"]


def test_long_tables_scroll():
    assert '<figure class="table long">' in made(tables={"t": pd.DataFrame({"x": range(25)})})
    assert '<figure class="table">' in made(tables={"t": pd.DataFrame({"x": range(24)})})


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ([0.5, 0.6929], ["0.5000", "0.6929"]),
        ([0.0, 0.1, 0.9], ["0.0", "0.1", "0.9"]),
        ([0, 1, 2], ["0", "1", "2"]),
        ([12345.0, -3.0], ["12\u202f345", "−3"]),
        ([0.123456, 10.5], ["0.12", "10.50"]),
        ([0.5, 1e-9], ["0.5", "1e−09"]),
        ([float("nan"), 0.25], ["–", "0.25"]),
        ([float("inf"), float("nan")], ["inf", "–"]),
        ([0.0, 0.0], ["0", "0"]),
        ([], []),
    ],
)
def test_numbers_of_a_column_are_alike(column: list[float], shown: list[str]):
    assert numbers(column) == shown


def test_numbers_missing_from_a_nullable_column_are_dashes():
    frame = pd.DataFrame({"n": pd.array([1, None], dtype="Int64"), "f": [0.5, math.nan]})
    assert Reader(made(tables={"t": frame})).text.count("–") == 2
