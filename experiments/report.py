"""What would a reader want of a run, on one page that needs nothing else?

`page` makes a single HTML file: question, headline, figures and tables, what it does not show, and
how to get it again. Images are inside it, nothing is fetched (its content policy forbids it), no
script runs but those of the report's own widgets, named by their hashes; it follows the reader's
light or dark setting and prints.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

LONG_TABLE = 24
"""Rows beyond which a table scrolls in a box of its own."""


@dataclass(frozen=True)
class Report:
    """What a study says about its own result. Text may carry `code` between backticks."""

    title: str
    question: str = ""
    """What was asked and how it was measured; blank lines part paragraphs."""
    findings: Sequence[str] = ()
    """Sentences with numbers, most important first."""
    captions: Mapping[str, str] = field(default_factory=dict)
    """A caption for each figure, by the figure's name."""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Tables by caption, in order; the index is not shown."""
    caveats: Sequence[str] = ()
    """What the numbers do not show."""
    widgets: Mapping[str, str] = field(default_factory=dict)
    """HTML by heading, shown behind the figures as it is: trusted, with what it was made of escaped
    by its maker. Its inline `<script>`s run, without attributes; nothing of it is fetched."""


def page(
    report: Report,
    headline: str,
    images: Mapping[str, bytes],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    """The report as one HTML document.

    `images` are PNG bytes by figure name, shown in order; `config` and `environment` are the run
    folder's records (`config["study"]`, `config["options"]`; `environment["command"]` and facts).
    """
    sections = [
        _section("Findings", _list(report.findings)),
        *(_figure(name, data, report.captions.get(name, "")) for name, data in images.items()),
        *(_section(heading, html) for heading, html in report.widgets.items()),
        *(_table(caption, frame) for caption, frame in report.tables.items()),
        _section("What this does not show", _list(report.caveats)),
        _section("How to get it again", _provenance(config, environment)),
    ]
    study = escape(str(config.get("study", "")))
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'{_script_policy(report.widgets.values())}\">\n"
        f"<title>{escape(report.title)}</title>\n<style>{STYLESHEET}</style></head>\n<body>\n"
        f'<header><p class="kicker">ablate <span>{study}</span></p>\n'
        f'<h1>{_inline(report.title)}</h1>\n<p class="headline">{_inline(headline)}</p>\n'
        f"{_paragraphs(report.question)}</header>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body></html>\n"
    )


def chosen(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Some columns under other names, for a table of the page."""
    if frame.empty:
        return frame
    return frame.reindex(columns=list(columns)).set_axis(list(columns.values()), axis="columns")


def minus(sentence: str) -> str:
    """The sentence with a true minus before every negative number.

    >>> minus("S = -0.3 (-1.2e-05 to 1), GPT-2")
    'S = −0.3 (−1.2e-05 to 1), GPT-2'
    """
    return re.sub(r"(?<![\w.)\]])-(?=\d)", "−", sentence)


def numbers(column: Sequence[float]) -> list[str]:
    """A table column's numbers, alike: as many decimals as four digits of the largest one need.

    Decimals that are 0 throughout go; a column in which one value would vanish (0.5 beside 1e-9)
    keeps three digits of each instead. True minus, thin spaces between thousands, – for nan.

    >>> numbers([0.5, 0.6929]), numbers([0.0, 0.1]), numbers([12345, -3])
    (['0.5000', '0.6929'], ['0.0', '0.1'], ['12\u202f345', '−3'])
    """
    present = [abs(float(v)) for v in column if math.isfinite(v)]
    largest = max(present, default=0.0)
    most = min(max(3 - math.floor(math.log10(largest)), 0), 9) if largest else 0
    decimals = next(d for d in range(most + 1) if d == most or _all_round(present, d, most))
    vanishing = any(0 < v < 0.5 * 10.0**-decimals for v in present)

    def text(value: float) -> str:
        if not math.isfinite(value):
            return "–" if math.isnan(value) else f"{value}"
        return f"{value:.3g}" if vanishing else f"{value + 0.0:,.{decimals}f}"

    return [text(float(v)).replace("-", "−").replace(",", "\u202f") for v in column]


def _all_round(values: Sequence[float], decimals: int, most: int) -> bool:
    """Whether no value loses anything that `most` decimals show when it is cut to `decimals`."""
    return all(round(round(v, most) - round(v, decimals), most + 1) == 0 for v in values)


def _figure(name: str, data: bytes, caption: str) -> str:
    source = b64encode(data).decode()
    alt = escape(caption or name.replace("_", " "), quote=True)
    width = int.from_bytes(data[16:20]) * 3 // 5  # PNG's own; figures are made for dense screens
    text = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
    image = f'<img width="{width}" src="data:image/png;base64,{source}" alt="{alt}">'
    return f"<figure>{image}{text}</figure>"


def _table(caption: str, frame: pd.DataFrame) -> str:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    columns, classes = [], []
    for name in frame.columns:
        values = frame[name]
        right = is_numeric_dtype(values.dtype) and not is_bool_dtype(values.dtype)
        columns.append(
            numbers(values.to_numpy(float, na_value=math.nan).tolist())
            if right
            else [str(v) for v in values]
        )
        classes.append(" class=n" if right else "")

    def row(tag: str, cells: Iterable[Any]) -> str:
        made = zip(cells, classes, strict=True)
        return f"<tr>{''.join(f'<{tag}{c}>{escape(str(v))}</{tag}>' for v, c in made)}</tr>"

    body = "\n".join(row("td", cells) for cells in zip(*columns, strict=True))
    box = "table long" if len(frame) > LONG_TABLE else "table"
    return (
        f'<figure class="{box}"><figcaption>{_inline(caption)}</figcaption>'
        f'<div class="scroll" tabindex="0"><table><thead>{row("th", frame.columns)}</thead>\n'
        f"<tbody>{body}</tbody></table></div></figure>"
    )


def _provenance(config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    command = environment.get("command") or f"ablate {config.get('study', '')}"
    facts = {k: v for k, v in environment.items() if k not in ("command", "argv", "versions")}
    groups = {
        "Options": config.get("options", {}),
        "Inputs": config.get("inputs", {}),
        "Machine": facts,
        "Versions": environment.get("versions", {}),
    }
    blocks = "".join(
        f"<section><h3>{title}</h3><dl>{_definitions(items)}</dl></section>"
        for title, items in groups.items()
        if items
    )
    shown = f'<pre class="command"><code>{escape(command)}</code></pre>'
    return f'{shown}<div class="facts">{blocks}</div>'


def _definitions(items: Mapping[str, Any]) -> str:
    return "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(_value(value))}</dd></div>"
        for key, value in items.items()
    )


def _script_policy(widgets: Iterable[str]) -> str:
    """Lets the scripts of widgets run, and no other: each by the hash of what it is."""
    scripts = [s for html in widgets for s in re.findall(r"<script>(.*?)</script>", html, re.S)]
    digests = (b64encode(sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in dict.fromkeys(digests))
    return f"; script-src {hashes}" if hashes else ""


def _value(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "none"
    if isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, list):
        return str(len(value))
    return json.dumps(value, ensure_ascii=False)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{_inline(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _paragraphs(text: str) -> str:
    parts = re.split(r"\n\s*\n", text.strip())
    return "".join(f"<p>{_inline(' '.join(part.split()))}</p>" for part in parts if part)


def _inline(text: str) -> str:
    """Escaped text in which `…` is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


STYLESHEET = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6773; --rule: #dfe4e8;
  --paper: #fcfcfa; --card: #ffffff; --accent: #0072b2; --code: #f0f3f5;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype", Cambria, Georgia,
    serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ea; --soft: #9aa5af; --rule: #333b43;
  --paper: #14181c; --card: #1b2025; --accent: #6cb8e6; --code: #22292f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 4.5rem 1.5rem 6rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 1.0625rem/1.62 var(--serif); text-rendering: optimizeLegibility;
  hanging-punctuation: first; }
header > *, section, figcaption { max-width: 41rem; }
header > h1 { max-width: 52rem; }
header { margin-bottom: 3rem; }
.kicker { margin: 0 0 1rem; font: 600 .8rem/1 var(--sans); letter-spacing: .09em;
  text-transform: uppercase; color: var(--soft); }
.kicker span { color: var(--accent); margin-left: .6em; }
h1 { margin: 0 0 1.1rem; font-size: 2.3rem; line-height: 1.16; font-weight: 700;
  letter-spacing: -.012em; text-wrap: balance; }
.headline { margin: 0 0 1.6rem; padding-left: 1.1rem; border-left: 3px solid var(--accent);
  font-size: 1.28rem; line-height: 1.45; text-wrap: pretty; }
h2 { margin: 3.2rem 0 .7rem; font-size: 1.32rem; line-height: 1.3; }
h3 { margin: 0 0 .5rem; font: 600 .78rem/1.4 var(--sans); letter-spacing: .07em;
  text-transform: uppercase; color: var(--soft); }
p { margin: 0 0 1em; text-wrap: pretty; }
ul { margin: 0; padding-left: 1.15em; }
li { margin-bottom: .45em; padding-left: .2em; }
li::marker { color: var(--accent); }
code { font: .87em/1.5 var(--mono); background: var(--code); padding: .1em .32em;
  border-radius: 4px; overflow-wrap: anywhere; }
figure { margin: 2.8rem 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure:not(.table) { padding: 1.2rem; background: #fff; border: 1px solid var(--rule);
  border-radius: 10px; }
figure:not(.table) figcaption { margin: 1rem auto 0; padding-top: .9rem; color: #414c57;
  border-top: 1px solid #e4e8ec; max-width: none; }
figure:not(.table) figcaption code { background: #f0f3f5; color: #1f2933; }
figcaption { font: .9rem/1.5 var(--sans); color: var(--soft); }
figure.table figcaption { margin-bottom: .7rem; font-weight: 600; color: var(--ink); }
.scroll { width: fit-content; max-width: 100%; overflow-x: auto;
  border-block: 1.5px solid var(--ink); }
.long .scroll { max-height: 31rem; overflow-y: auto; padding-right: .9rem; }
table { border-collapse: collapse; min-width: 22rem; font: .88rem/1.35 var(--sans);
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .85rem; text-align: left; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: .2rem; }
th:last-child, td:last-child { padding-right: .2rem; }
th { font-weight: 600; background: var(--paper); white-space: nowrap; position: sticky; top: 0;
  box-shadow: inset 0 -1px var(--soft); }
tbody tr + tr td { border-top: 1px solid var(--rule); }
.n { text-align: right; white-space: nowrap; }
pre.command { margin: 0 0 2rem; padding: .95rem 1.15rem; background: var(--code);
  border-radius: 8px; white-space: pre-wrap; }
pre.command code { padding: 0; background: none; font-size: .92rem; }
pre.command code::before { content: "$ "; color: var(--soft); }
section:has(.facts) { max-width: none; }
.facts { columns: 3 16rem; column-gap: 3rem; }
.facts section { break-inside: avoid; margin-bottom: 2rem; }
dl { margin: 0; font: .85rem/1.45 var(--sans); }
dl div { display: flex; justify-content: space-between; gap: 1.5rem; padding: .24rem 0;
  border-bottom: 1px solid var(--rule); }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) { body { padding-top: 2rem; font-size: 1rem; } h1 { font-size: 1.75rem; }
  .headline { font-size: 1.12rem; } figure:not(.table) { padding: .5rem; } }
@media print { body { padding: 0; max-width: none; } figure { break-inside: avoid; }
  .long .scroll { max-height: none; } }
"""
