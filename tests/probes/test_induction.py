"""The scan: heads whose scores are known, equality with plain loops, every family, bad input."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ablate import Head, HookedModel, Mask, Mixer
from ablate.pruning import ranked
from probes.circuits import output_weights
from probes.induction import head_scores, induction_scan, summary
from probes.observed import distance_bins
from probes.repeats import drawn
from probes.rows import CHUNK
from tests.families import ENCODERS, FAMILIES, TWO_STACKS, output_of, tiny
from tests.induction_model import (
    POSITION,
    POSITIONS,
    PREDICTION,
    TOKEN,
    _copy,
    _match,
    induction_opt,
)

SCORES = (
    "prefix_matching",
    "duplicate_token",
    "previous_token",
    "first_position",
    "copying",
    "attribution",
    "prefix_matching_control",
    "prefix_matching_shuffled",
)
EVEN = ("prefix_matching", "prefix_matching_control", "prefix_matching_shuffled", "duplicate_token")


def means(model: HookedModel, length: int = 6, **options: object) -> pd.DataFrame:
    frame = induction_scan(model, lengths=(length,), repeats=4, seeds=range(3), **options)
    return summary(frame).set_index("component")


def test_the_hand_written_circuit():
    table = means(HookedModel(induction_opt()))
    # The planted head matches; where copies 2, 3, 4 have 1, 2, 3 earlier ones it finds them all.
    assert table.loc["L1H1", "prefix_matching"] == pytest.approx(1, abs=1e-3)
    assert table.loc["L0H0", "previous_token"] == pytest.approx(1, abs=1e-3)
    # Heads without weights attend evenly: c earlier copies of q + 1 positions.
    queries = range(7, 25)
    even = sum(((q - 1) // 6) / (q + 1) for q in queries) / 18
    assert table.loc["L1H1", "prefix_matching_shuffled"] < 1e-3
    for name in ("L0H1", "L0H2", "L1H0", "L1H2"):
        for score in EVEN:
            assert table.loc[name, score] == pytest.approx(even, abs=1e-6)
        first = sum(1 / (q + 1) for q in range(1, 25)) / 24
        assert table.loc[name, "first_position"] == pytest.approx(first, abs=1e-6)
        assert table.loc[name, "previous_token"] == pytest.approx(first, abs=1e-6)
        assert table.loc[name, "copying"] == -1  # writes nothing
    assert table.loc["L0H0", "copying"] == -1  # writes where nobody reads the logits


def planted(offset: int) -> HookedModel:
    """L0H1 attends to itself and writes its token; L0H2 attends `offset` back, writes nothing."""
    model = induction_opt()
    first = model.model.decoder.layers[0].self_attn
    with torch.no_grad():
        _match(first, 1, POSITION, POSITION, torch.eye(POSITIONS), 60.0)
        _copy(first, 1, TOKEN, PREDICTION)
        _match(first, 2, POSITION, POSITION, torch.eye(POSITIONS).roll(offset, dims=0), 60.0)
    return HookedModel(model)


def test_a_copier_that_does_not_match_and_a_matcher_that_does_not_copy():
    table = means(planted(5))
    assert table.loc["L0H1", "copying"] == pytest.approx(1, abs=1e-5)
    assert table.loc["L0H1", "prefix_matching"] < 1e-3
    assert table.loc["L0H2", "prefix_matching"] == pytest.approx(1, abs=1e-3)
    assert table.loc["L0H2", "copying"] == -1


def test_a_fixed_offset_finds_no_copies_at_varying_distances():
    table = means(planted(3), length=4, spacing="varied")
    assert table.loc["L1H1", "prefix_matching"] == pytest.approx(1, abs=1e-3)
    assert table.loc["L0H2", "prefix_matching"] < 0.5


def test_a_fixed_offset_is_told_by_the_control_and_by_other_lengths():
    model = planted(5)
    table = means(model)
    assert table.loc["L0H2", "prefix_matching_control"] == pytest.approx(1, abs=1e-3)
    assert table.loc["L1H1", "prefix_matching_control"] < 0.2
    assert means(model, length=5).loc["L0H2", "prefix_matching"] < 1e-3


@pytest.mark.parametrize(
    "family", ["opt", "gpt2", "llama", "bloom", "gemma2", "jamba", "falcon_h1"]
)
def test_scores_equal_loops_over_eager_patterns(family: str):
    lengths, seeds, repeats = (5, 7), (3, 4), 3
    frame = induction_scan(HookedModel(tiny(family)), lengths=lengths, seeds=seeds, repeats=repeats)
    eager = HookedModel(tiny(family, attention="eager"))
    sites = [s for s in eager.sites if s.kind == "head"]
    names = [s.name.replace("hook_z", "hook_pattern") for s in sites] + [s.name for s in sites]
    checked = 0
    for rows in drawn(eager, lengths, repeats, seeds, 1):
        cells = frame[(frame["length"] == rows.length) & (frame["seed"] == rows.seeds[0])]
        cells = cells.set_index(["component", "score"])["value"]
        found = []
        for tokens in (rows.repeated[""], rows.distinct[""]):
            with eager.capture(names) as cache:
                output_of(eager.model, {"input_ids": tokens})
            found.append(dict(cache))
        repeated, distinct = (rows.repeated[""][0].tolist(), rows.distinct[""][0].tolist())
        n = len(repeated)
        for site in sites:
            name = site.name.replace("hook_z", "hook_pattern")
            for h, component in enumerate(site.components):
                a, b = found[0][name][0, h].tolist(), found[1][name][0, h].tolist()
                after, control, same, other = [], [], [], []
                shuffled = rows.shuffled[""][0].tolist()
                for q in range(n):
                    earlier = [k for k in range(q) if repeated[k] == repeated[q]]
                    if earlier:
                        after.append(sum(a[q][k + 1] for k in earlier))
                        control.append(sum(b[q][k + 1] for k in earlier))
                        same.append(sum(a[q][k] for k in earlier))
                        other.append(sum(a[q][k] for k in shuffled[q] if k >= 0))
                expected = {
                    "prefix_matching": sum(after) / len(after),
                    "prefix_matching_control": sum(control) / len(control),
                    "prefix_matching_shuffled": sum(other) / len(other),
                    "duplicate_token": sum(same) / len(same),
                    "previous_token": sum(a[q][q - 1] for q in range(1, n)) / (n - 1),
                    "first_position": sum(a[q][0] for q in range(1, n)) / (n - 1),
                    "copying": copying_by_loops(eager, site, h, found[1], distinct, b),
                    "attribution": attribution_by_removal(eager, site, h, rows.repeated[""], a),
                }
                assert set(expected) == set(SCORES)
                for score, value in expected.items():
                    wide = 2e-3 if score == "attribution" else 1e-5
                    assert cells[str(component), score] == pytest.approx(value, abs=wide), score
                    checked += 1
    assert checked == len(frame)


def copying_by_loops(model, site, h, cache, ids, pattern) -> float:
    w_o, _ = output_weights(model, site)
    written = cache[site.name][0, :, h] @ w_o[h]
    logits = (written @ model.model.get_output_embeddings().weight.detach().T).tolist()
    shares = []
    for j in range(1, len(ids)):
        seen = [logits[j][ids[k]] for k in range(j + 1)]
        raised = [max(x - sum(seen) / len(seen), 0) for x in seen]
        most = max(range(j + 1), key=lambda k: pattern[j][k])
        shares.append(raised[most] / sum(raised) if sum(raised) else 0)
    return 2 * sum(shares) / len(shares) - 1


def attribution_by_removal(model, site, h, tokens, pattern) -> float:
    """What taking W_O z_h out of the stream that the last norm reads takes from the logits, the
    norm's scale held as it was: by the model's own norm and head, in plain loops."""
    stack = model.anatomy.stacks[0]
    norm = model.model.base_model.get_submodule(stack.final_norm)
    given: list = []
    handle = norm.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    with model.capture(site.name) as cache:
        output_of(model.model, {"input_ids": tokens})
    handle.remove()
    ids, resid = tokens[0].tolist(), given[0][0].double()
    w_o, _ = output_weights(model, site)
    written = (cache[site.name][0, :, h] @ w_o[h]).double()
    is_layer_norm = type(norm).__name__ == "LayerNorm"
    centre = (lambda x: x - x.mean(-1, keepdim=True)) if is_layer_norm else (lambda x: x)
    eps = next(getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n))
    scale = (centre(resid).square().mean(-1, keepdim=True) + eps).rsqrt()
    gains = norm.weight.detach().double() + (1 if "Gemma" in type(norm).__name__ else 0)
    w_u = model.model.get_output_embeddings().weight.detach().double()
    logits = ((scale * centre(written) * gains) @ w_u.T).tolist()
    values = []
    for j in range(len(ids)):
        if ids[j] not in ids[:j]:
            continue
        most = max(range(j + 1), key=lambda k: pattern[j][k])
        mean = sum(logits[j][ids[k]] for k in range(j + 1)) / (j + 1)
        values.append(logits[j][ids[most]] - mean)
    return sum(values) / len(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scanned_or_refused_by_name(family: str):
    model = HookedModel(tiny(family))
    if "mamba" in family:
        with pytest.raises(ValueError, match=f"{model.name} has no attention"):
            induction_scan(model)
    frame = induction_scan(model, seeds=(0,), mixers=True)
    scored = [*model.heads, *(c for c in model.components if isinstance(c, Mixer))]
    assert set(frame["component"]) == {str(component) for component in scored}
    assert set(frame["kind"]) == {type(component).__name__ for component in scored}
    unread = {"copying", "attribution"} if family in ENCODERS or not model.heads else set()
    assert set(frame["score"]) == set(SCORES) - unread
    written = frame["score"].isin(["copying", "attribution"])
    assert frame[~written]["value"].between(0, 1 + 1e-5).all()
    assert frame[frame["score"] == "copying"]["value"].between(-1, 1 + 1e-5).all()
    assert not frame[written]["component"].str.contains("cross|M").any()


@pytest.mark.parametrize("family", TWO_STACKS)
def test_cross_attention_equals_loops_over_eager_patterns(family: str):
    options = {"lengths": (5,), "seeds": (2,), "repeats": 3}
    frame = induction_scan(HookedModel(tiny(family)), **options)
    cells = frame.set_index(["component", "score"])["value"]
    eager = HookedModel(tiny(family, attention="eager"))
    (rows,) = drawn(eager, (5,), 3, (2,), 8)
    sites = [s for s in eager.sites if s.stack == "cross"]
    patterns = []
    for tokens in (rows.repeated, rows.distinct):
        names = [s.name.replace("hook_z", "hook_pattern") for s in sites]
        with eager.capture(names) as cache:
            eager.model(input_ids=tokens["encoder"], decoder_input_ids=tokens["decoder"])
        patterns.append(dict(cache))
    keys, queries = (rows.repeated[stack][0].tolist() for stack in ("encoder", "decoder"))
    ours, theirs = (rows.distinct[stack][0, -15:].tolist() for stack in ("encoder", "decoder"))
    assert sorted(ours) == sorted(theirs)
    assert ours != theirs
    for site in sites:
        name = site.name.replace("hook_z", "hook_pattern")
        for h, component in enumerate(site.components):
            a, b = (p[name][0, h].tolist() for p in patterns)
            totals = {"prefix_matching": [], "prefix_matching_control": [], "duplicate_token": []}
            for q in range(1, len(queries)):
                same = [k for k in range(len(keys)) if keys[k] == queries[q]]
                behind = [k + 1 for k in same if k + 1 < len(keys)]
                if behind:
                    totals["prefix_matching"].append(sum(a[q][k] for k in behind))
                    totals["prefix_matching_control"].append(sum(b[q][k] for k in behind))
                totals["duplicate_token"].append(sum(a[q][k] for k in same))
            for score, values in totals.items():
                mean = sum(values) / len(values)
                assert cells[str(component), score] == pytest.approx(mean, abs=1e-5)
            assert (str(component), "previous_token") not in cells.index


def test_entropy_and_distances_equal_loops():
    for family in ("llama", "bert"):
        options = {"lengths": (7,), "seeds": (3,), "repeats": 3}
        frame = induction_scan(HookedModel(tiny(family)), scores=("entropy", "distance"), **options)
        cells = frame.set_index(["component", "score"])["value"]
        eager = HookedModel(tiny(family, attention="eager"))
        (rows,) = drawn(eager, (7,), 3, (3,), 8)
        site = next(s for s in eager.sites if s.kind == "head")
        name = site.name.replace("hook_z", "hook_pattern")
        with eager.capture([name]) as cache:
            output_of(eager.model, {"input_ids": rows.repeated[""]})
        pattern = cache[name][0, 1].double()
        n = len(pattern)
        entropy = -(pattern * pattern.clamp(min=1e-300).log()).sum() / n
        assert cells["L0H1", "entropy"] == pytest.approx(float(entropy), abs=1e-5)
        total = 0.0
        for score, low, high in distance_bins(n):
            mass = sum(
                float(pattern[q, q - d]) for q in range(n) for d in range(low, high + 1) if d <= q
            )
            assert cells["L0H1", score] == pytest.approx(mass / n, abs=1e-5)
            total += mass / n
        assert cells["L0H1", "later"] == pytest.approx(1 - total, abs=1e-5)
        assert (cells["L0H1", "later"] > 0.1) == (family == "bert")


def test_distances_are_means_over_the_same_rows():
    model = HookedModel(tiny("llama"))
    frame = induction_scan(model, lengths=(3, 9), seeds=(0, 1), scores=("distance",))
    bins = frame[frame["score"].str.startswith("distance_")]
    assert bins.groupby("score").size().nunique() == 1
    assert (bins[(bins["score"] == "distance_32_63") & (bins["length"] == 3)]["value"] == 0).all()
    whole = summary(frame).set_index("component")
    names = [name for name in whole if name.startswith("distance_") and "stderr" not in name]
    assert whole[names].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)


def test_only_the_scores_asked_for():
    model = HookedModel(tiny("opt"))
    options = {"lengths": (5,), "seeds": (0, 1)}
    whole = induction_scan(model, **options).set_index(["component", "seed", "score"])["value"]
    for score in SCORES:
        frame = induction_scan(model, scores=(score,), **options)
        assert set(frame["score"]) == {score}
        one = frame.set_index(["component", "seed", "score"])["value"]
        assert (one - whole[one.index]).abs().max() < 1e-6
    reference = induction_scan(model, scores=("copying_reference",), **options)
    assert set(reference["score"]) == {"copying_reference"}


def test_lengths_dealt_to_seeds():
    model = HookedModel(tiny("llama"))
    frame = induction_scan(model, lengths=(4, 6), seeds=range(5), dealt=True)
    dealt = frame.groupby("seed")["length"].unique().map(list).to_dict()
    assert dealt == {0: [4], 1: [6], 2: [4], 3: [6], 4: [4]}


def test_seeds_and_batches():
    model = HookedModel(tiny("llama"))
    whole = induction_scan(model, seeds=range(5), lengths=(4, 9))
    keys = ["component", "seed", "length", "score"]
    again = induction_scan(model, seeds=range(5), lengths=(4, 9), batch=2)
    assert set(map(tuple, whole[keys].values)) == set(map(tuple, again[keys].values))
    ours = whole.set_index(keys)["value"]
    assert (again.set_index(keys)["value"] - ours).abs().max() < 1e-6
    alone = induction_scan(model, seeds=(3,), lengths=(4, 9)).set_index(keys)["value"]
    assert (alone - ours[alone.index]).abs().max() < 1e-6
    other = induction_scan(model, seeds=(7,), lengths=(4, 9))
    assert other["value"].tolist() != alone.tolist()
    pd.testing.assert_frame_equal(whole, induction_scan(model, seeds=range(5), lengths=(4, 9)))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_few_rows_at_a_time_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch):
    model = HookedModel(tiny(family))
    whole = induction_scan(model, lengths=(6,), seeds=range(2))
    monkeypatch.setitem(CHUNK, "cpu", 2 * 4 * 25 * 3)  # three queries
    pieces = induction_scan(model, lengths=(6,), seeds=range(2))
    pd.testing.assert_frame_equal(pieces, whole, atol=1e-5)


def test_offload_and_half_precision(tmp_path):
    from accelerate import disk_offload

    options = {"seeds": range(2), "lengths": (6,)}
    whole = induction_scan(HookedModel(tiny("llama")), **options)
    offloaded = tiny("llama")
    disk_offload(offloaded, tmp_path)
    pd.testing.assert_frame_equal(induction_scan(HookedModel(offloaded), **options), whole)
    half = induction_scan(HookedModel(tiny("llama", dtype=torch.bfloat16)), **options)
    masses = ~whole["score"].isin(["copying", "attribution"])
    assert (half["value"] - whole["value"])[masses].abs().max() < 2e-2


def test_masks_in_force_count():
    model = HookedModel(induction_opt())
    with model.ablated(Mask([Head(0, 0)])):
        blind = means(model)
    assert blind.loc["L1H1", "prefix_matching"] < 0.2
    assert means(model).loc["L1H1", "prefix_matching"] > 0.99


def test_summary_and_rankings():
    model = HookedModel(induction_opt())
    frame = induction_scan(model, lengths=(4, 6), seeds=range(3))
    table = summary(frame)
    assert list(table["component"]) == [str(head) for head in model.heads]
    cell = frame[(frame["component"] == "L1H1") & (frame["score"] == "copying")]
    by_seed = cell.groupby("seed")["value"].mean()
    row = table.set_index("component").loc["L1H1"]
    assert row["copying"] == pytest.approx(by_seed.mean())
    assert row["copying_stderr"] == pytest.approx(by_seed.sem())
    scores = head_scores(frame, "prefix_matching")
    assert list(scores) == list(model.heads)
    assert ranked(scores)[-1] == Head(1, 1)
    assert scores[Head(1, 1)] == pytest.approx(row["prefix_matching"])
    with pytest.raises(
        ValueError, match="no score 'matching' in this scan: it has prefix_matching"
    ):
        head_scores(frame, "matching")


def test_bad_input_is_one_clear_line():
    model = HookedModel(tiny("opt"))
    for options, message in (
        (
            {"lengths": (16,)},
            "4 copies of 16 tokens asked for: .* 64 tokens; give lengths up to 15",
        ),
        (
            {"lengths": (14,), "vocabulary": torch.arange(5, 60)},
            "4 · 14 distinct tokens.* up to 13",
        ),
        ({"repeats": 1}, "at least 2"),
        ({"seeds": ()}, "at least one seed"),
        ({"lengths": (0,)}, "1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            induction_scan(model, **options)
    model.model.train()
    with pytest.raises(ValueError, match="training mode"):
        induction_scan(model)
    roberta = HookedModel(tiny("roberta", max_position_embeddings=34))
    with pytest.raises(ValueError, match="33 tokens"):
        induction_scan(roberta, lengths=(11,), repeats=3)
    induction_scan(roberta, lengths=(10,), repeats=3)


def test_tokens_come_from_the_tokenizer(tokenizer):
    model = HookedModel(tiny("opt", vocab_size=320), tokenizer)
    (rows,) = drawn(model, (5,), 4, (0, 1), 8)
    assert (rows.repeated[""][:, 0] == tokenizer.bos_token_id).all()
    special = set(tokenizer.all_special_ids)
    assert not special & set(rows.distinct[""][:, 1:].flatten().tolist())
    assert all(len(set(row.tolist())) == 21 for row in rows.distinct[""])
    (rows,) = drawn(model, (5,), 4, (0,), 8, bos=None)
    assert rows.repeated[""].shape == (1, 20)


def test_the_scan_is_a_name_of_the_room():
    import probes

    assert probes.induction_scan is induction_scan
    with pytest.raises(AttributeError, match="'probes' has no attribute 'nothing'"):
        _ = probes.nothing
