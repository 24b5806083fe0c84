"""Where does a head look from here? One row of tokens on a page; pointing at one shades the others.

`pattern_viewer` makes a piece of HTML for `Report.widgets`. A reader points at a token, taps it, or
goes there with the arrow keys; every key is shaded by the chosen head's attention to it from there,
and the strongest are written out. It holds all it needs, a script without a library among it;
where scripts are off it says so and shows the text.

    byte = round(255 A[q, k])     the lower triangle row by row where no head looks ahead, base64

so a shade is within 1/510 of the attention, and what is below that is blank. Tokens are shown with
line ends as ↵, tabs as ⇥, other control characters as ␀, and none of them as HTML.

Where it misleads: one row of tokens is an example, not a measurement, and attention says where a
head looks, not what it does with it.
"""

from __future__ import annotations

import json
import unicodedata
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LARGEST = 1_500_000
"""Characters of patterns that a page should carry."""
ASSETS = Path(__file__).parent


def pattern_viewer(
    tokens: Sequence[str],
    patterns: Mapping[str, Float[Tensor, "query key"]],
    *,
    notes: Mapping[str, str] | None = None,
    targets: Sequence[Sequence[int]] = (),
    about_targets: str = "what followed an earlier copy of this token",
    start: int | None = None,
) -> str:
    """The viewer as HTML.

    Args:
        tokens: the row, as text.
        patterns: each head's pattern on this row, by the head's name; the first is shown first.
        notes: what stands behind a head's name in the list, such as its score.
        targets: keys to underline for every query, such as those that prefix matching counts.
        about_targets: what is underlined, in words.
        start: the query shown first; by default the last one that has a target.

    Raises ValueError for patterns of another size than the row and for more than a page holds.
    """
    size = len(tokens)
    if not patterns or not size:
        raise ValueError("an empty pattern viewer asked for: give tokens and a pattern")
    for name, pattern in patterns.items():
        if tuple(pattern.shape) != (size, size):
            raise ValueError(
                f"pattern of {name} is {' × '.join(map(str, pattern.shape))} on {size} tokens: "
                "give a pattern of every token to every token"
            )
    if targets and len(targets) != size:
        raise ValueError(f"targets of {len(targets)} queries on {size} tokens: give one list each")
    causal = all(not pattern.triu(1).any() for pattern in patterns.values())
    data = {name: quantised(pattern, causal=causal) for name, pattern in patterns.items()}
    if (total := sum(map(len, data.values()))) > LARGEST:
        raise ValueError(
            f"{len(data)} heads on {size} tokens are {total:,} characters of a page: "
            f"give fewer of either, for at most {LARGEST:,}"
        )
    with_target = [query for query, keys in enumerate(targets) if keys]
    stored = {
        "size": size,
        "causal": causal,
        "patterns": list(data.values()),
        "targets": [list(map(int, keys)) for keys in targets],
        "start": (with_target[-1] if with_target else size - 1) if start is None else start,
    }
    text = json.dumps(stored, separators=(",", ":"))
    return _page(tokens, list(data), notes or {}, text, about_targets if targets else "")


def quantised(pattern: Float[Tensor, "query key"], *, causal: bool) -> str:
    """A pattern in a byte an entry, base64: row by row, of row q only keys 0 … q if `causal`."""
    values = (255 * pattern.detach().float().cpu().clamp(0, 1)).round().int().tolist()
    rows = (row[: query + 1] if causal else row for query, row in enumerate(values))
    return b64encode(bytes(value for row in rows for value in row)).decode()


def _page(
    tokens: Sequence[str],
    names: Sequence[str],
    notes: Mapping[str, str],
    stored: str,
    about_targets: str,
) -> str:
    options = "".join(
        f"<option value={i}>{escape(name)}{escape(f' · {notes[name]}' if name in notes else '')}"
        "</option>"
        for i, name in enumerate(names)
    )
    strip = "".join(
        f'<span class="token" data-i="{i}" tabindex="-1">{text.replace("↵", "↵<br>")}</span>'
        for i, text in enumerate(map(shown, tokens))
    )
    scale = "".join(
        f'<span class="token{" high" if a > 0.8 else " mid" if a > 0.6 else ""}" '
        f'style="--a: {a}">{a:g}</span>'
        for a in (0, 0.25, 0.5, 0.75, 1)
    )
    if about_targets:
        about_targets = f' · <span class="target">underlined</span>: {escape(about_targets)}'
    return (
        f'<div class="attention-viewer"><style>{(ASSETS / "viewer.css").read_text()}</style>\n'
        f'<p class="bar"><label>Head <select>{options}</select></label> <output></output></p>\n'
        f'<p class="strip" role="group" aria-label="tokens, by arrow keys too">{strip}</p>\n'
        f'<p class="legend">attention {scale} · <span class="token query">outlined</span>: '
        f"the token that looks{about_targets}</p>\n"
        f"<noscript><p>Attention of {escape(', '.join(names))} over these tokens shows on hover "
        "where scripts may run; here they may not.</p></noscript>\n"
        f'<script type="application/json">{stored}</script>\n'
        f"<script>{(ASSETS / 'viewer.js').read_text()}</script></div>"
    )


def shown(token: str) -> str:
    """A token as escaped text in which everything can be seen."""
    named = {"\n": "↵", "\t": "⇥"}
    visible = (
        named.get(c, "␀" if unicodedata.category(c)[0] == "C" else c)  # bidi marks among them
        for c in token
    )
    return escape("".join(visible)) or "∅"
