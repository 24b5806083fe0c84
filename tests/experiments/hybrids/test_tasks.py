"""Function classes against closed forms and plain loops; shifts; what a prompt shows."""

from __future__ import annotations

import math
import operator
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.hybrids.regression.tasks import (
    SHIFTS,
    TASKS,
    Prompts,
    Task,
    counted,
    evaluate,
    interleaved,
    named,
    predictions_at,
    sample,
    shifts_for,
    small,
    zero_error,
)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def mean_and_stderr(per_prompt: Tensor) -> tuple[float, float]:
    values = per_prompt.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


# Sizes and moments --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 20),
        ("sparse", 3),
        ("mlp", 50 * 20),
        ("mlp-normalised", 20),
        ("tree", 1),
        ("parity", 1),
        ("parity-batch", 1),
        ("mqar", 1),
        ("classification", 1),
        ("quadratic", 60),
        ("chebyshev", 2.46919),
        ("chebyshev-roots", 0.1544),
    ],
)
def test_zero_errors_are_the_closed_forms(name: str, expected: float) -> None:
    task = TASKS[name]
    assert zero_error(task) == pytest.approx(expected, rel=1e-5)
    prompts = sample(task, 3000, seeded(), points=8)
    mean, stderr = mean_and_stderr(prompts.ys.square().mean((1, 2)))
    assert abs(mean - expected) <= 4 * stderr + 1e-5


def test_the_papers_sizes() -> None:
    sizes = {name: (t.d, t.points, t.y_dim, t.k, t.width, t.depth) for name, t in TASKS.items()}
    assert sizes["linear"] == (20, 41, 1, 0, 0, 0)
    assert sizes["sparse"] == (20, 41, 1, 3, 0, 0)
    assert sizes["mlp"] == sizes["mlp-normalised"] == (20, 101, 1, 0, 100, 0)
    assert sizes["tree"] == (20, 101, 1, 0, 0, 4)
    assert sizes["parity"] == sizes["parity-batch"] == (10, 140, 1, 2, 0, 0)
    assert sizes["mqar"] == (20, 65, 20, 0, 0, 0)  # 64 pairs and the query: 130 tokens


@pytest.mark.parametrize("name", TASKS)
def test_shapes_and_what_is_hidden(name: str) -> None:
    for task in (TASKS[name], small(name)):
        prompts = sample(task, 3, seeded())
        assert prompts.xs.shape == (3, task.points, task.d)
        assert prompts.ys.shape == (3, task.points, task.y_dim)
        assert prompts.xs.dtype == prompts.ys.dtype == torch.float32
        assert prompts.task == name
        assert all(len(v) == 3 for k, v in prompts.hidden.items() if k not in ("noise", "dims"))
        assert torch.equal(evaluate(task, prompts.hidden, prompts.xs), prompts.ys)
        assert torch.equal(prompts.hidden["clean"], prompts.ys)


@pytest.mark.parametrize("name", TASKS)
def test_only_the_generator_decides(name: str) -> None:
    torch.manual_seed(1)
    first = sample(small(name), 4, seeded(7))
    torch.manual_seed(2)
    again, other = sample(small(name), 4, seeded(7)), sample(small(name), 4, seeded(8))
    assert torch.equal(first.xs, again.xs)
    assert torch.equal(first.ys, again.ys)
    assert not torch.equal(first.ys, other.ys)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TASKS)
def test_nothing_loops_over_the_batch_and_all_is_on_the_generators_device(name: str) -> None:
    for shift in shifts_for(name):
        counts = []
        for batch in (2, 40):
            # A tensor made without naming its device would be on "meta", and meet those on the CPU.
            with torch.device("meta"), Operations() as asked:
                prompts = sample(TASKS[name], batch, seeded(), shift=shift)
            counts.append(asked.count)
            made = [prompts.xs, prompts.ys, *prompts.hidden.values(), counted(prompts)]
            assert all(value.device.type == "cpu" for value in made)
        assert counts[0] == counts[1]


# Function by function, against plain Python -------------------------------------------------------
def test_linear_prompts_are_w_times_x() -> None:
    task = Task("linear", d=6, points=5, y_dim=3)  # three outputs, none a sum of the others
    prompts = sample(task, 4, seeded())
    for b in range(4):
        for p in range(5):
            for y in range(3):
                expected = sum(
                    float(prompts.xs[b, p, i] * prompts.hidden["w"][b, i, y]) for i in range(6)
                )
                assert float(prompts.ys[b, p, y]) == pytest.approx(expected, abs=1e-5)


def test_supports_are_k_different_coordinates_each_as_often() -> None:
    prompts = sample(TASKS["sparse"], 4000, seeded(), points=1)
    w, support = prompts.hidden["w"][..., 0], prompts.hidden["support"]
    assert ((w != 0).sum(1) == 3).all()
    assert torch.equal(w.ne(0).nonzero()[:, 1].reshape(-1, 3), support)  # ascending, too
    counts = torch.bincount(support.flatten(), minlength=20).double()
    assert float((counts - 600).abs().max()) < 4.5 * math.sqrt(4000 * 0.15 * 0.85)


def test_network_against_a_loop_over_units() -> None:
    task = small("mlp")
    prompts = sample(task, 3, seeded())
    first, second = prompts.hidden["W_1"].mT.tolist(), prompts.hidden["W_2"][..., 0].tolist()
    for b, points in enumerate(prompts.xs.tolist()):
        for p, x in enumerate(points):
            units = [max(0.0, sum(map(operator.mul, x, unit))) for unit in first[b]]
            expected = sum(map(operator.mul, units, second[b]))
            assert float(prompts.ys[b, p, 0]) == pytest.approx(expected, abs=1e-4)
    raw, normalised = (sample(small(n), 3, seeded()) for n in ("mlp", "mlp-normalised"))
    torch.testing.assert_close(normalised.ys, raw.ys * math.sqrt(2 / 20))


@pytest.mark.parametrize(
    ("task", "dims"),
    [(TASKS["tree"], 20), (TASKS["tree"], 15), (Task("tree", d=3, points=9, depth=1, y_dim=2), 3)],
)
def test_trees_against_a_plain_walk(task: Task, dims: int) -> None:
    prompts = sample(task, 16, seeded(), dims=dims)  # what is switched off is 0, and so not > 0
    coordinate, leaf = prompts.hidden["coordinate"].tolist(), prompts.hidden["leaf"].tolist()
    inner = 2**task.depth - 1
    leaves_met = set()
    for b, points in enumerate(prompts.xs.tolist()):
        for p, x in enumerate(points):
            node = 0
            while node < inner:
                node = 2 * node + (2 if x[coordinate[b][node]] > 0 else 1)
            leaves_met.add(node - inner)
            assert prompts.ys[b, p].tolist() == leaf[b][node - inner]
    assert leaves_met == set(range(2**task.depth))


def test_trees_ask_for_every_coordinate_even_under_a_curriculum() -> None:
    prompts = sample(TASKS["tree"], 500, seeded(), dims=5)
    assert set(prompts.hidden["coordinate"].flatten().tolist()) == set(range(20))


def test_parity_is_the_product_of_its_support() -> None:
    prompts = sample(TASKS["parity"], 30, seeded())
    assert set(prompts.xs.unique().tolist()) == {-1.0, 1.0}
    for b, (i, j) in enumerate(prompts.hidden["support"].tolist()):
        assert torch.equal(prompts.ys[b, :, 0], prompts.xs[b, :, i] * prompts.xs[b, :, j])


def test_parity_draws_one_support_a_prompt_or_one_a_batch() -> None:
    each = sample(TASKS["parity"], 2000, seeded(), points=2).hidden["support"]
    assert {tuple(s) for s in each.tolist()} == set(combinations(range(10), 2))
    batches = [
        sample(TASKS["parity-batch"], 50, seeded(s), points=2).hidden["support"] for s in range(9)
    ]
    assert all(len({tuple(s) for s in batch.tolist()}) == 1 for batch in batches)
    assert len({tuple(batch[0].tolist()) for batch in batches}) > 1
    # The points differ all the same.
    assert not sample(TASKS["parity-batch"], 2, seeded()).xs.diff(dim=0).eq(0).all()


def test_mqar_keys_values_and_query() -> None:
    task = TASKS["mqar"]
    prompts = sample(task, 200, seeded())
    for vectors in (prompts.xs, prompts.ys):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.full((200, 65), math.sqrt(20)))
    for b, index in enumerate(prompts.hidden["index"].tolist()):
        assert torch.equal(prompts.xs[b, -1], prompts.xs[b, index])
        assert torch.equal(prompts.ys[b, -1], prompts.ys[b, index])
    assert float(prompts.hidden["index"].double().mean()) == pytest.approx(31.5, abs=5)
    # Uniform on the sphere: mean 0 and covariance I.
    flat = prompts.xs[:, :-1].reshape(-1, 20).double()
    torch.testing.assert_close(
        flat.mT @ flat / len(flat), torch.eye(20).double(), atol=0.06, rtol=0
    )
    assert prompts.scored == "last"


def test_classification_and_quadratic() -> None:
    prompts = sample(TASKS["classification"], 20, seeded())
    assert torch.equal(prompts.ys, torch.sign(prompts.xs @ prompts.hidden["w"]))
    prompts = sample(TASKS["quadratic"], 20, seeded())
    torch.testing.assert_close(prompts.ys, prompts.xs**2 @ prompts.hidden["w"])


def test_chebyshev_series_by_the_recurrence() -> None:
    prompts = sample(TASKS["chebyshev"], 500, seeded(), points=6)
    x = prompts.xs[..., 0].double()
    t = [torch.ones_like(x), x]
    while len(t) < 12:
        t.append(2 * x * t[-1] - t[-2])
    c = prompts.hidden["coefficients"].double()
    expected = sum(c[:, n - 3, None] * t[n] for n in range(3, 12))
    torch.testing.assert_close(prompts.ys[..., 0].double(), expected, atol=2e-4, rtol=1e-4)
    degree = prompts.hidden["degree"]
    assert set(degree.tolist()) == set(range(3, 12))
    assert torch.equal(degree, (c != 0).sum(1) + 2)  # coefficients up to the top degree, then 0


def test_chebyshev_roots_are_near_and_the_largest_value_is_one() -> None:
    task = TASKS["chebyshev-roots"]
    prompts = sample(task, 200, seeded())
    ideal = torch.cos(math.pi * (torch.arange(5) + 0.5) / 5)
    assert 0.19 < float((prompts.hidden["roots"] - ideal).abs().max()) <= 0.2 + 1e-6
    at_roots = evaluate(task, prompts.hidden, prompts.hidden["roots"][..., None])
    assert float(at_roots.abs().max()) < 1e-5
    grid = torch.linspace(-1, 1, 2001)[None, :, None].expand(200, -1, 1)
    peaks = evaluate(task, prompts.hidden, grid).abs().amax((1, 2))
    torch.testing.assert_close(peaks, torch.ones(200), atol=2e-3, rtol=0)
    assert 60 < int((prompts.hidden["factor"] > 0).sum()) < 140


# Curriculum ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.d > 1])
def test_curriculum_keeps_the_first_coordinates(name: str) -> None:
    task = TASKS[name]
    cut, whole = (sample(task, 5, seeded(), dims=dims) for dims in (4, None))
    assert (cut.xs[..., 4:] == 0).all()
    assert (cut.xs[..., :4] != 0).all()
    if name != "mqar":  # there the length is fixed
        assert torch.equal(cut.xs[..., :4], whole.xs[..., :4])
    assert int(cut.hidden["dims"]) == 4
    for weights in (cut.hidden[w] for w in ("w", "W_1") if w in cut.hidden):
        assert (weights[:, 4:] == 0).all()  # what no prompt could tell
    assert torch.equal(evaluate(task, cut.hidden, cut.xs), cut.ys)
    assert sample(task, 5, seeded(), points=3).ys.shape[1] == 3


@pytest.mark.parametrize("name", ["linear", "sparse", "mlp", "mlp-normalised", "quadratic"])
def test_zero_error_follows_the_curriculum(name: str) -> None:
    prompts = sample(TASKS[name], 4000, seeded(), dims=5, points=4)
    mean, stderr = mean_and_stderr(prompts.ys.square().mean((1, 2)))
    assert abs(mean - zero_error(TASKS[name], 5)) < 4 * stderr


@pytest.mark.parametrize("name", ["sparse", "parity"])
def test_supports_are_drawn_among_the_coordinates_switched_on(name: str) -> None:
    support = sample(TASKS[name], 500, seeded(), dims=4).hidden["support"]
    assert set(support.flatten().tolist()) == {0, 1, 2, 3}


# Shifts -------------------------------------------------------------------------------------------
EVERY = [(name, shift) for name in TASKS for shift in shifts_for(name)]


@pytest.mark.parametrize(("name", "shift"), EVERY)
def test_every_shift_keeps_the_curriculum_and_says_what_it_did(name: str, shift: str) -> None:
    task = small(name)
    dims = max(1, task.d - 1)
    prompts = sample(task, 6, seeded(), dims=dims, shift=shift)
    again = sample(replace(task, shift=shift), 6, seeded(), dims=dims)  # the same in training
    assert torch.equal(prompts.xs, again.xs)
    assert torch.equal(prompts.ys, again.ys)
    assert (prompts.xs[..., dims:] == 0).all()
    assert prompts.xs.isfinite().all()
    assert prompts.ys.isfinite().all()
    asked = prompts.hidden.get("clean_xs", prompts.xs)
    if "outlier" not in prompts.hidden:
        torch.testing.assert_close(evaluate(task, prompts.hidden, asked), prompts.hidden["clean"])
    if "outlier" not in shift and shift != "noisy":
        assert torch.equal(prompts.ys, prompts.hidden["clean"])
    assert int(counted(prompts).sum()) > 0


def test_label_noise_has_a_twentieth_of_the_zero_error() -> None:
    prompts = sample(TASKS["linear"], 2000, seeded(), shift="noisy")
    noise = prompts.ys - prompts.hidden["clean"]
    assert float(prompts.hidden["noise"]) == pytest.approx(1.0)  # Garg et al.'s σ
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    both = sample(replace(TASKS["linear"], shift="noisy"), 9, seeded(), shift="noisy:0.15")
    assert float(both.hidden["noise"]) == pytest.approx(2.0)  # variances add: 1 + 3


def test_skewed_eigenvalues_fall_as_the_square() -> None:
    task = Task("linear", d=4, points=20_000)
    for xs in sample(task, 3, seeded(), shift="skewed").xs.double():
        eigenvalues = torch.linalg.eigvalsh(xs.mT @ xs / len(xs)).flip(0)
        expected = torch.tensor([1, 1 / 4, 1 / 9, 1 / 16], dtype=torch.float64)
        torch.testing.assert_close(eigenvalues, expected * 4 / expected.sum(), rtol=0.05, atol=0)
    bases = sample(task, 2, seeded(), shift="skewed", points=500).xs
    assert not torch.allclose(*(b.mT @ b / 500 for b in bases), atol=0.3)  # one a prompt


def test_half_subspace_has_half_the_rank_and_the_same_length() -> None:
    xs = sample(TASKS["linear"], 300, seeded(), shift="half-subspace").xs
    assert (torch.linalg.matrix_rank(xs, tol=1e-3) == 10).all()
    assert float(xs.square().sum(-1).mean()) == pytest.approx(20, rel=0.03)


def test_orthogonal_points_make_least_squares_useless_until_the_basis_is_full() -> None:
    task = Task("linear", d=4, points=10)
    prompts = sample(task, 2000, seeded(), shift="orthogonal")
    gram = prompts.xs @ prompts.xs.mT
    for start in (0, 4, 8):
        block = gram[:, start : start + 4, start : start + 4]
        off = block - torch.diag_embed(block.diagonal(dim1=1, dim2=2))
        assert float(off.abs().max()) < 1e-4
    assert float(gram[:, 0, 5].abs().max()) > 1  # frames are not orthogonal to each other
    assert float(prompts.xs.square().sum(-1).mean()) == pytest.approx(4, rel=0.03)
    w = torch.linalg.lstsq(prompts.xs[:, :3], prompts.ys[:, :3], driver="gelsd").solution
    assert float((prompts.xs[:, 3:4] @ w).abs().max()) < 1e-3
    # A frame has no preferred direction.
    directions = torch.nn.functional.normalize(prompts.xs[:, 3], dim=-1)
    torch.testing.assert_close(
        directions.mT @ directions / 2000, torch.eye(4) / 4, atol=0.03, rtol=0
    )
    torch.testing.assert_close(directions.mean(0), torch.zeros(4), atol=0.05, rtol=0)


def test_corners() -> None:
    xs = sample(TASKS["linear"], 50, seeded(), shift="quadrant").xs
    assert (xs[:, :-1].sign() == xs[:, :1].sign()).all()
    assert not (xs[:, -1].sign() == xs[:, 0].sign()).all(1).any()
    prompts = sample(TASKS["linear"], 50, seeded(), shift="opposite-quadrant")
    assert (prompts.xs[:, -1].sign() == -prompts.xs[:, 0].sign()).all()
    assert counted(prompts).sum(1).tolist() == [1] * 50
    assert counted(prompts)[:, -1].all()


def test_the_last_point_may_be_one_seen() -> None:
    prompts = sample(TASKS["tree"], 50, seeded(), shift="seen")
    matches = (prompts.xs[:, :-1] == prompts.xs[:, -1:]).all(-1)
    assert (matches.sum(1) == 1).all()
    torch.testing.assert_close(prompts.ys[:, :-1][matches], prompts.ys[:, -1])


def test_scales() -> None:
    plain, x, y = (
        sample(TASKS["mlp"], 5, seeded(), shift=s) for s in ("none", "scaled-x:2", "scaled-y:0.5")
    )
    torch.testing.assert_close(x.xs, 2 * plain.xs)
    torch.testing.assert_close(x.ys, 2 * plain.ys)  # ReLU networks without bias are homogeneous
    torch.testing.assert_close(y.ys, plain.ys / 2)
    torch.testing.assert_close(y.hidden["W_2"], plain.hidden["W_2"] / 2)


def test_outliers_are_marked_and_not_scored() -> None:
    prompts = sample(TASKS["linear"], 400, seeded(), shift="outlier:0.3")
    chosen = prompts.hidden["outlier"]
    assert float(chosen.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert (prompts.xs[chosen] == 1).all()
    assert (prompts.ys[chosen] == 1).all()
    assert torch.equal(prompts.ys[~chosen], prompts.hidden["clean"][~chosen])
    assert torch.equal(counted(prompts), ~chosen)
    odd = sample(TASKS["linear"], 400, seeded(), shift="orthogonal-outlier")
    chosen, w = odd.hidden["outlier"], odd.hidden["w"]
    assert float((odd.xs @ w)[chosen].abs().max()) < 1e-4
    torch.testing.assert_close(
        odd.xs[chosen].norm(dim=-1), torch.full((int(chosen.sum()),), math.sqrt(20))
    )
    first = odd.xs[0][chosen[0]]
    assert (first == first[0]).all()  # one vector a prompt
    assert torch.equal(odd.ys[chosen], odd.xs[chosen][:, :1])


# What a model is shown ----------------------------------------------------------------------------
def test_interleaved_and_back() -> None:
    xs = torch.arange(12.0).reshape(1, 2, 6)
    prompts = Prompts(xs, torch.tensor([[[100.0, 101.0], [200.0, 201.0]]]), "linear", {})
    tokens = interleaved(prompts)
    assert tokens.tolist() == [
        [
            [0, 1, 2, 3, 4, 5],
            [100, 101, 0, 0, 0, 0],
            [6, 7, 8, 9, 10, 11],
            [200, 201, 0, 0, 0, 0],
        ]
    ]
    assert torch.equal(predictions_at(tokens), xs)  # an answer stands where its x stands


# Small sizes can be learnt ------------------------------------------------------------------------
def test_small_parity_is_known_after_a_few_examples() -> None:
    """Bayes over the 15 supports: the mean of y over those that no example contradicts."""
    prompts = sample(small("parity"), 300, seeded())
    values = torch.stack(
        [prompts.xs[..., list(s)].prod(-1) for s in combinations(range(6), 2)], dim=-1
    )
    wrong = (values != prompts.ys).cumsum(1)
    alive = torch.cat([torch.ones(300, 1, 15), (wrong[:, :-1] == 0).double()], dim=1)
    means = (alive * values).sum(-1) / alive.sum(-1)
    error = (means - prompts.ys[..., 0]).square().mean(0)
    assert float(error[0]) > 0.9
    assert float(error[12:].max()) < 0.01


def test_small_mqar_keys_can_be_told_apart() -> None:
    prompts = sample(small("mqar"), 1000, seeded())
    keys, query = prompts.xs[:, :-1], prompts.xs[:, -1:]
    likeness = (keys * query).sum(-1)
    assert torch.equal(likeness.argmax(1), prompts.hidden["index"])
    others = likeness.scatter(1, prompts.hidden["index"][:, None], -9.0).amax(1) / 8
    assert float(others.mean()) == pytest.approx(0.59, abs=0.02)


# Bad input ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Task("linear", d=3, y_dim=4), "y of 4 coordinates beside x of 3"),
        (lambda: Task("sparse", d=8, k=9), "9 relevant coordinates of 8"),
        (lambda: Task("parity", d=8), "0 relevant coordinates of 8"),
        (lambda: Task("mlp"), "0 hidden units"),
        (lambda: Task("tree"), "tree of depth 0"),
        (lambda: Task("chebyshev", d=2, depth=5), "one coordinate"),
        (lambda: Task("parity", k=2, y_dim=2), "it has one"),
        (lambda: Task("mqar", points=1), "at least one pair"),
        (lambda: Task("linear", points=0), "points 0"),
        (lambda: Task("lines"), "no task 'lines': take one of linear, sparse"),
        (lambda: named("lines"), "no task 'lines'"),
        (lambda: small("lines"), "no task 'lines'"),
        (lambda: Task("linear", shift="noise"), "no shift 'noise': take one of none, noisy"),
        (
            lambda: Task("parity", k=2, shift="skewed"),
            "shift skewed has no meaning for task parity",
        ),
        (lambda: Task("linear", shift="noisy:much"), "'much' is no number"),
        (lambda: Task("linear", shift="outlier:2"), "not within"),
        (lambda: Task("linear", shift="noisy:0"), "not within"),
        (lambda: Task("linear", shift="orthogonal:2"), "has no strength"),
        (lambda: sample(TASKS["linear"], 1, seeded(), dims=21), "21 of 20 coordinates"),
        (lambda: sample(TASKS["linear"], 1, seeded(), dims=0), "0 of 20 coordinates"),
        (lambda: sample(TASKS["linear"], 0, seeded()), "0 prompts"),
        (lambda: sample(TASKS["mqar"], 1, seeded(), points=1), "1 points of task mqar"),
        (lambda: sample(TASKS["sparse"], 1, seeded(), dims=2), "start the curriculum at dims ≥ 3"),
        (lambda: sample(TASKS["linear"], 1, seeded(), points=1, shift="seen"), "points ≥ 2"),
        (lambda: zero_error(Task("chebyshev-roots", d=1, depth=7)), "no closed form"),
        (
            lambda: sample(Task("linear", d=2, y_dim=2), 1, seeded(), shift="orthogonal-outlier"),
            "nothing is orthogonal",
        ),
        (
            lambda: interleaved(Prompts(torch.zeros(1, 2, 1), torch.zeros(1, 2, 3), "x", {})),
            "y of 3 coordinates beside x of 1",
        ),
    ],
)
def test_bad_input_is_one_clear_line(make, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_tables_need_no_torch() -> None:
    code = (
        "import sys; from experiments.hybrids.regression import shift_table, task_table; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_shift_has_a_task() -> None:
    assert {shift for _, shift in EVERY} == set(SHIFTS)
