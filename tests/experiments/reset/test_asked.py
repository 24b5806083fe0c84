"""Of several origins of data, which answers the question?"""

from __future__ import annotations

import pandas as pd

from experiments.reset.result import asked
from tests.experiments.reset import planted


def test_the_origin_that_most_bases_have() -> None:
    rows = planted.ledger(layers=(0, 1), seeds=(0, 1))
    usual = [rows.assign(base=name, origin="reshuffled") for name in ("a", "b", "c")]
    beside = rows.assign(base="a", origin="same")
    kept = asked(pd.concat([*usual, beside], ignore_index=True))
    assert set(kept["origin"]) == {"reshuffled"}
    assert kept["base"].nunique() == 3
    alone = pd.concat([usual[0], beside], ignore_index=True)
    assert set(asked(alone)["origin"]) == {"same"}
    assert set(asked(beside)["origin"]) == {"same"}
