"""A rate study: the chain's gradient, its parties through the round, the fit of exponents, going on after a stop."""

import csv
import json
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml

from hosl.core.directions import direction, direction_seed
from hosl.core.protocols import FirstOrderServerSide, ZerothOrderClientSide
from hosl.core.rounds import (
    StepInputs,
    hosl_gradient_forward_mode_round,
    hosl_gradient_one_sided_round,
    hosl_gradient_round,
    hosl_round,
)
from hosl.errors import ConfigError, FolderError, NonFiniteError
from hosl.study.config import read_study
from research.convergence_rate import study as rate_study
from research.convergence_rate.__main__ import main
from research.convergence_rate.bert import CutBert
from research.convergence_rate.chain import CutChain, row_noise
from research.convergence_rate.config import (
    BertProblem,
    ChainProblem,
    Middle,
    RateStudy,
    parse_rate_study,
    step_size,
    tuning_cells,
)
from research.convergence_rate.fit import fit_slope, two_terms
from research.convergence_rate.study import CutProblem, chosen_scale, run_rate_study

CHAIN = ChainProblem(
    middle=Middle(steps=8, directions=2, cut=5), scales=(0.5, 1.0), size=12, rows=16, noise=2.0, batch_rows=3,
    steps=(4, 8), directions=(1, 2), cuts=(3, 5), seeds=(0, 1),
)  # fmt: skip
HERE = Path(__file__).parent
ETA, EPSILON, Q = 0.05, 1e-3, 3


def chain(cut=5, seed=1):
    return CutChain(CHAIN, cut, seed, lambda client_size: ETA, "gaussian")


def test_the_parties_are_those_of_the_protocols():
    problem = chain()
    assert isinstance(problem, CutProblem)
    assert isinstance(problem.client, ZerothOrderClientSide)
    assert isinstance(problem.server, FirstOrderServerSide)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_the_full_gradient_is_that_of_finite_differences(cut):
    problem = chain(cut)
    client, server = problem.squares()
    slopes = []
    for half in (problem.client, problem.server):
        of_half = []
        for i in range(len(half.theta)):
            at = half.theta[i]
            half.theta[i] = at + 1e-5
            plus = problem.loss()
            half.theta[i] = at - 1e-5
            of_half.append((plus - problem.loss()) / 2e-5)
            half.theta[i] = at
        slopes.append(float(np.square(of_half).sum()))
    assert [client, server] == pytest.approx(slopes, rel=1e-7)


def test_rows_add_noise_of_the_stated_size_and_no_bias():
    x = row_noise(msgspec.structs.replace(CHAIN, noisy_coordinates=4))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    assert np.square(x).sum(1).mean() == pytest.approx(CHAIN.noise**2)
    assert not x[:, 4:].any()


def _energy(theta, field, x):
    """The mean loss of rows x [rows, d], written as one sum over the whole chain: nothing is cut."""
    energy = sum(1 - np.cos(t - a) for t, a in zip(theta, field, strict=True))
    energy += CHAIN.coupling * sum(1 - np.cos(b - a) for a, b in pairwise(theta))
    return energy + x.mean(0) @ theta


def test_five_rounds_of_the_chain_equal_the_paper_written_out():
    """float64, lines l.1 to l.8 on the uncut chain, the server's gradient by complex steps."""
    problem, cut = chain(), 5
    theta = np.concatenate([problem.client.theta, problem.server.theta])
    field, rows = problem._field, row_noise(CHAIN)
    for step in range(1, 6):
        batch = problem.batch(step)
        seeds = [direction_seed(7, step, q) for q in range(Q)]
        result = hosl_round(
            problem.client,
            problem.server,
            batch,
            StepInputs(step, seeds=seeds, epsilon=EPSILON, learning_rate=ETA),
        )
        x = rows[batch.input_ids[:, 0]]
        u = [np.pad(direction(s, "theta_c", (cut,), "gaussian").astype(float), (0, 12 - cut)) for s in seeds]
        c = [
            (_energy(theta + EPSILON * z, field, x) - _energy(theta - EPSILON * z, field, x)) / (2 * EPSILON)
            for z in u
        ]
        assert result.coefficients == pytest.approx(c, rel=1e-9)
        assert result.loss == pytest.approx(_energy(theta, field, x))
        tiny = 1e-30j * np.eye(12)
        g_s = np.array(
            [0.0] * cut + [_energy(theta + tiny[i], field, x).imag / 1e-30 for i in range(cut, 12)]
        )
        # the client's scales are rounded to float32, as the journal keeps them
        moved = sum(float(np.float32(ETA / Q * c_q)) * z for c_q, z in zip(c, u, strict=True))
        theta = theta - ETA * g_s - moved
    np.testing.assert_allclose(np.concatenate([problem.client.theta, problem.server.theta]), theta, rtol=1e-7)


def test_a_chain_projected_on_dl_dh_measures_the_same_slopes():
    results = []
    for method in (
        hosl_round, hosl_gradient_round, hosl_gradient_one_sided_round, hosl_gradient_forward_mode_round
    ):  # fmt: skip
        problem = chain()
        inputs = StepInputs(1, seeds=[1, 2], epsilon=1e-4, learning_rate=ETA)
        results.append(method(problem.client, problem.server, problem.batch(1), inputs))
    for projected, error in zip(
        results[1:], (1e-5, 1e-2, 1e-5), strict=True
    ):  # one-sided: first order in epsilon
        assert results[0].coefficients == pytest.approx(projected.coefficients, rel=error)


def test_the_transformer_measures_its_own_full_gradient():
    """|grad f|^2 is how fast f falls along -grad f."""
    bert = BertProblem(
        middle=Middle(steps=2, directions=1, cut=1),
        scales=(1.0,),
        batch_rows=4,
        blocks=2,
        rows=12,
        weight_sd=0.5,
    )
    problem = CutBert(bert, 1, 0, lambda client_size: 0.0, "gaussian")
    assert isinstance(problem, CutProblem)
    client, server = problem.squares()
    before = problem.loss()
    parameters = [*problem.client.half.parameters(), *problem.server.half.parameters()]
    problem._full_loss().backward()
    for p in parameters:
        p.data.sub_(1e-6 * p.grad)
    assert (before - problem.loss()) / 1e-6 == pytest.approx(client + server, rel=1e-3)
    hosl_round(
        problem.client,
        problem.server,
        problem.batch(1),
        StepInputs(1, seeds=[3], epsilon=1e-3, learning_rate=1e-3),
    )
    assert problem.squares()[0] != client


def test_a_fit_recovers_a_known_exponent_within_its_interval():
    generator = np.random.Generator(np.random.Philox(0))
    x = np.array([1.0, 2.0, 4.0, 8.0])
    exact = fit_slope(x, np.tile(3 * x**-0.5, (3, 1)))
    assert [exact.value, exact.low, exact.high] == pytest.approx([-0.5] * 3)
    noisy = fit_slope(x, 3 * x**0.5 * np.exp(0.1 * generator.standard_normal((8, 4))))
    assert noisy.low < 0.5 < noisy.high
    assert noisy.high - noisy.low < 0.3


def test_the_two_terms_of_the_bound_are_found_again():
    places = [(t, q, d, 0.1 / t**0.5) for t in (10, 100) for q in (1, 4) for d in (8, 32)]
    lines = [
        {
            "steps": t, "directions": q, "client_size": d, "learning_rate": eta,
            "mean_square": 3 / (eta * t) + 5 * eta * (1 + (d + 1) / q),
        }
        for t, q, d, eta in places
    ]  # fmt: skip
    assert two_terms(lines) == pytest.approx((3, 5, 0), abs=1e-9)


def test_the_step_size_is_that_of_the_theory():
    assert step_size(2.0, 100, 4, 16) == pytest.approx(2 * np.sqrt(4 / (16 * 100)))


def _study(folder):
    return RateStudy(kind="rate", output_dir=str(folder), problems={"chain": CHAIN})


@pytest.mark.parametrize("kept_bytes", [0, 700, 2000])
def test_a_study_cut_off_anywhere_goes_on_to_the_same_files(tmp_path, kept_bytes):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = run_rate_study(_study(whole))
    # 4 points along T, Q and d_c and 1 more at constant Q T, two seeds, and the other scale; the middle is shared
    assert done["finished"]
    assert done["made"] == 2 * 5 + 1
    cells = (whole / "cells.jsonl").read_bytes()
    resumed.mkdir()
    (resumed / "cells.jsonl").write_bytes(cells[:kept_bytes])
    run_rate_study(_study(resumed))
    for name in ("cells.jsonl", "rate.csv", "rate.md"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert run_rate_study(_study(resumed))["made"] == 0


@pytest.mark.parametrize("garbled", [b"{\n", b"[1]\n", b'{"problem": "chain"}\n', b"\xff\n"])
def test_a_garbled_line_among_the_cells_is_named(tmp_path, capsys, garbled):
    run_rate_study(_study(tmp_path))
    cells = tmp_path / "cells.jsonl"
    first, *others = cells.read_bytes().splitlines(keepends=True)
    cells.write_bytes(b"".join([first, garbled, *others]))
    with pytest.raises(FolderError, match=r"cells\.jsonl, line 2 is no measured cell: .*; delete the line"):
        run_rate_study(_study(tmp_path))
    cells.write_bytes(b"".join([first, *others]))
    assert run_rate_study(_study(tmp_path))["made"] == 0


def test_the_table_names_the_scale_that_the_grid_was_measured_at_also_of_equals(tmp_path, monkeypatch):
    measured = rate_study.measure

    def measured_alike(study, cell, stopped):
        line = measured(study, cell, stopped)
        assert line is not None
        return line | {"mean_square": 1.0} if cell.steps == 8 else line

    monkeypatch.setattr(rate_study, "measure", measured_alike)
    falling = msgspec.structs.replace(CHAIN, scales=(1.0, 0.5))
    run_rate_study(RateStudy(kind="rate", output_dir=str(tmp_path), problems={"chain": falling}))
    assert "c = 1, tuned once" in (tmp_path / "rate.md").read_text()
    with (tmp_path / "rate.csv").open(newline="") as file:
        assert {row["scale"] for row in csv.DictReader(file)} == {"1.0"}


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    made = run_rate_study(_study(tmp_path))["made"]
    louder = msgspec.structs.replace(CHAIN, noise=3.0)
    again = RateStudy(kind="rate", output_dir=str(tmp_path), problems={"chain": louder})
    assert run_rate_study(again)["made"] == made


def test_a_problem_of_which_every_scale_diverged_is_named(tmp_path):
    study = _study(tmp_path)
    diverged = {cell: {"mean_square": None, "scale": cell.scale} for cell in tuning_cells(study, "chain")}
    with pytest.raises(NonFiniteError, match=r"problems\.chain"):
        chosen_scale(study, "chain", diverged)


def test_hosl_study_recognises_a_rate_study(tmp_path, capsys):
    file = tmp_path / "rate.yaml"
    content = msgspec.to_builtins(_study(tmp_path / "out"))
    file.write_text(yaml.safe_dump(content))
    assert main([str(file), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cells": 11, "problems": "chain"}
    assert main([str(file)]) == 0
    said = capsys.readouterr()
    assert "| chain | T | 4 to 8 | -0.5 |" in said.out
    assert re.search(r"^study .*  work (\d+)/\1  cells left 0 ", said.err, re.MULTILINE)


def test_the_shipped_study_is_valid_and_impossible_ones_are_refused(tmp_path):
    shipped = parse_rate_study(read_study(HERE / "rate.yaml"), where="rate.yaml")
    assert set(shipped.problems) == {"chain", "chain-even", "bert"}
    for change, named in (
        ({"steps": (4,)}, "steps"),
        ({"cuts": (5, 12)}, "cut 12"),
        ({"directions": (2, 3)}, "Q T"),
    ):
        with pytest.raises(ConfigError, match=named):
            msgspec.structs.replace(CHAIN, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measure_every": 100}, r"measure_every must lie in 1\.\.4, the fewest steps of a cell, got 100"),
        (
            {"measure_every": 5, "steps": (), "directions": (2, 8), "middle": {"steps": 16, "directions": 2}},
            "measure_every must lie in 1..4, the fewest steps of a cell, got 5",
        ),
        ({"measure_every": 0}, "measure_every must lie in 1..4"),
        ({"middle": {"steps": 0}}, "middle.steps must be >= 1, got 0"),
        ({"middle": {"directions": 0}}, "middle.directions must be >= 1, got 0"),
        ({"batch_rows": 0}, "batch_rows must be >= 1, got 0"),
        ({"scales": [0.0]}, "scales must be different positive numbers"),
        ({"scales": [-1.0, 0.5]}, "scales must be different positive numbers"),
        ({"scales": [0.5, 0.5]}, "scales must be different positive numbers"),
        ({"scales": [float("nan")]}, "scales must be different positive numbers"),
        ({"seeds": [-1]}, r"seeds must be different whole numbers from 0 to 2\^63 - 1, got \[-1\]"),
        ({"seeds": [0, 0]}, "seeds must be different whole numbers"),
        ({"rows": 1}, "rows must be >= 2, got 1"),
        ({"noise": -1.0}, "noise must be >= 0"),
        ({"noisy_coordinates": 0}, "noisy_coordinates must lie in 1..12 or be null, got 0"),
    ],
)
def test_settings_that_could_only_crash_later_are_refused_with_their_place(tmp_path, change, said):
    content = msgspec.to_builtins(_study(tmp_path))
    chain = content["problems"]["chain"]
    chain |= change | {"middle": chain["middle"] | change.get("middle", {})}
    with pytest.raises(ConfigError, match=rf"study rate\.yaml: {said}.* - at `\$\.problems"):
        parse_rate_study(content, where="rate.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"width": 7}, "width must be even, got 7"), ({"rows": 0}, "rows must be >= 1, got 0")],
)
def test_a_transformer_that_cannot_be_built_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        BertProblem(middle=Middle(steps=2, directions=1, cut=1), scales=(1.0,), batch_rows=4, **change)
