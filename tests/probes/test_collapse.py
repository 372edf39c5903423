from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pingscope.interp.errors import UserError
from pingscope.probes.collapse import Reference, gap_restored, gap_shrink, label_controls, readings
from pingscope.probes.logistic import LayerProbes
from pingscope.probes.realigned import realign
from pingscope.probes.verdict import READINGS, noise_floor, verdict

AXIS = np.eye(8)[:1]
PROBES = LayerProbes((0,), 2 * AXIS, np.array([1.0]))


def at_final(positions, change):
    """The same arm with ``change`` applied to its activations at the final token."""
    moved = replace(positions["final"], features={0: change(positions["final"].features[0].copy())})
    return {**positions, "final": moved}


def judge(base, arm, updates=(), probes=PROBES):
    reference = Reference(base, probes)
    floor = noise_floor(reference, updates, [0])[0]
    before, after = readings(reference, base, 0), readings(reference, arm, 0)
    return after, floor, verdict(before, after, floor)


def jittered(base, n=6, size=0.02):
    rng = np.random.default_rng(5)
    for _ in range(n):
        yield {
            at: replace(pooled, features={0: pooled.features[0] + size * rng.standard_normal((120, 8))})
            for at, pooled in base.items()
        }


def test_the_same_model_shows_nothing(planted) -> None:
    base = planted(4.0)
    found, floor, verdicts = judge(base, base)
    for position in ("prompt", "instruction", "final"):
        for label in ("harmful", "benign", "lookalike"):
            shift = found["shift"][position][label]
            assert (shift.value, shift.ci) == (0.0, (0.0, 0.0))
        assert found["contrast"][position]["gap_shrink"].value == 0
        assert found["contrast"][position]["gap_shrink"].ci == (0.0, 0.0)
        assert found["placed"][position]["auroc"] == found["placed"][position]["transfer_auroc"]
        assert found["realigned"][position]["gap_shrink"].value == pytest.approx(0, abs=1e-9)
    assert set(verdicts) == set(READINGS)
    assert {row["verdict"] for row in verdicts.values()} == {"absent"}
    assert floor["contrast"]["final"]["gap_shrink"] == {"low": 0.0, "high": 0.0, "n": 0}


def test_readings_by_hand(planted) -> None:
    base = planted(4.0)
    x, labels = base["final"].features[0], np.array(base["final"].labels)
    arm = at_final(base, lambda x: x * np.r_[0.5, np.ones(7)])
    found, _, _ = judge(base, arm)
    z = x[:, 0] + 1  # 2 * (x / 2) + 1
    for label in ("harmful", "benign", "lookalike"):
        assert found["raw"]["final"][label].value == pytest.approx(z[labels == label].mean())
        assert found["shift"]["final"][label].value == pytest.approx(-x[labels == label, 0].mean())
    gap = z[labels == "harmful"].mean() - z[labels == "benign"].mean()
    assert found["contrast"]["final"]["gap"].value == pytest.approx(gap)
    shrink = found["contrast"]["final"]["gap_shrink"]
    assert shrink.value == pytest.approx(0.5) and shrink.ci == pytest.approx((0.5, 0.5))
    assert (
        found["contrast"]["final"]["auroc"].value
        == readings(Reference(base, PROBES), base, 0)["contrast"]["final"]["auroc"].value
    )
    assert found["contrast"]["prompt"]["gap_shrink"].value == 0


def test_a_lost_signal_is_a_collapse_of_every_reading_of_the_signal(planted) -> None:
    base = planted(4.0)
    lost = planted(0.0, seed=3)  # no harmful direction left, nothing to map it back from
    arm = {**base, "final": replace(lost["final"], features={0: lost["final"].features[0] - 3 * AXIS})}
    _, floor, verdicts = judge(base, arm, jittered(base))
    assert {name: row["verdict"] for name, row in verdicts.items()} == dict.fromkeys(READINGS, "collapse")
    assert 0 <= floor["contrast"]["final"]["gap_shrink"]["high"] < 0.1
    assert floor["contrast"]["final"]["gap_shrink"]["n"] == 6
    assert all(row["reason"] for row in verdicts.values())


def test_a_shift_of_both_classes_is_not_a_lost_contrast(planted) -> None:
    base = planted(4.0)
    _, _, verdicts = judge(base, at_final(base, lambda x: x - 4 * AXIS), jittered(base))
    assert verdicts["raw"]["verdict"] == verdicts["shift"]["verdict"] == "collapse"
    assert {verdicts[name]["verdict"] for name in ("contrast", "placed", "transfer", "realigned")} == {"absent"}


def test_a_negative_sign_that_the_base_has_too_is_an_offset_of_the_position(planted) -> None:
    base = planted(4.0)
    low = at_final(base, lambda x: x - 10 * AXIS)
    _, _, verdicts = judge(low, low)
    assert verdicts["raw"]["verdict"] == "absent" and "offset of the position" in verdicts["raw"]["reason"]


def test_a_moved_basis_is_told_from_a_lost_signal(planted) -> None:
    base = planted(6.0, n=240)
    swapped = at_final(base, lambda x: np.roll(x, 3, axis=1))  # the signal now lies on axis 3
    found, _, verdicts = judge(base, swapped)
    assert verdicts["contrast"]["verdict"] == verdicts["transfer"]["verdict"] == "collapse"
    assert verdicts["placed"]["verdict"] == "absent"  # still linearly there
    realigned = found["realigned"]["final"]
    assert realigned["map"] == "low_rank" and realigned["explained"] > 0.9
    assert realigned["gap_shrink"].value < 0.2 < 0.8 < found["contrast"]["final"]["gap_shrink"].value


def test_the_map_is_chosen_by_reconstruction(planted) -> None:
    x = planted(4.0)["final"].features[0]
    assert realign(x + 5, x).family == "offset"
    np.testing.assert_allclose(realign(x + 5, x).features, x)
    x = planted(4.0, d=40)["final"].features[0]  # wider than the rank of the low-rank map
    stretched = realign(x * np.linspace(0.5, 2, 40), x)
    assert stretched.family == "diagonal" and stretched.explained > 0.95
    assert realign(x[:1], x[:1]) is None


def test_a_change_within_the_floor_is_absent(planted) -> None:
    base = planted(4.0)
    arm = at_final(base, lambda x: x * np.r_[0.9, np.ones(7)])
    assert judge(base, arm)[2]["contrast"]["verdict"] == "collapse"
    noisy = [at_final(base, lambda x: x * np.r_[0.8, np.ones(7)])]
    assert judge(base, arm, noisy)[2]["contrast"]["verdict"] == "absent"


def test_no_gap_in_the_base_is_nothing_to_lose(planted) -> None:
    base = planted(0.0)
    _, _, verdicts = judge(base, at_final(base, lambda x: -x))
    assert verdicts["contrast"]["verdict"] == "absent" and "no harmful-benign gap" in verdicts["contrast"]["reason"]
    down = gap_shrink(np.array([1.0, 2.0]), np.array([0.0, 1.0]), np.array([True, False]))
    assert np.isnan(down.value)


def test_shuffled_labels_show_chance(planted) -> None:
    base = planted(4.0, n=240)
    reference = Reference(base, PROBES)
    labels = np.random.default_rng(0).permutation(np.arange(240) % 2)
    shuffled = LayerProbes.fit(base["final"].features, labels)
    found = label_controls(reference, base, [shuffled], 0)
    assert abs(found["placed_auroc"].value - 0.5) < 0.12
    assert found["auroc"].n == 160


def test_prompts_are_matched_by_id_and_missing_tokens_stay_missing(planted) -> None:
    base = planted(4.0)
    order = np.random.default_rng(0).permutation(120)
    reference = Reference(base, PROBES)
    mixed = {at: pooled.take(order) for at, pooled in base.items()}
    assert readings(reference, mixed, 0) == readings(reference, base, 0)
    with pytest.raises(UserError, match="'p7' is missing"):
        readings(reference, {at: pooled.take(np.arange(120) != 7) for at, pooled in base.items()}, 0)
    x, counts = base["instruction"].features[0].copy(), base["instruction"].counts.copy()
    x[:3], counts[:3] = np.nan, 0
    holes = {**base, "instruction": replace(base["instruction"], features={0: x}, counts=counts)}
    found = readings(Reference(holes, PROBES), holes, 0)
    assert found["raw"]["instruction"]["harmful"].n_missing == 1
    assert found["contrast"]["instruction"]["auroc"].n == 78
    assert found["placed"]["instruction"]["auroc"].n == 78


def test_groups_are_never_split(planted) -> None:
    base = planted(4.0)
    grouped = Reference(base, PROBES, groups=[f"pair{i // 3}" for i in range(120)])
    cross = grouped.placed["final", 0]
    clusters = grouped.within(grouped.contrasted)
    assert all(not set(clusters[train]) & set(clusters[test]) for train, test in cross.splits)
    assert readings(grouped, base, 0)["contrast"]["final"]["auroc"].value > 0.95


@pytest.mark.parametrize(("kept", "back"), [(0.25, 0.625), (0.25, 1.0), (0.25, 0.25), (0.5, 0.0), (0.0, 1.5)])
def test_the_share_of_the_gap_that_comes_back_is_that_of_the_scaling(planted, kept, back) -> None:
    base = planted(4.0)
    agent, arm = (at_final(base, lambda x, by=by: x * np.r_[by, np.ones(7)]) for by in (kept, back))
    found = gap_restored(Reference(base, PROBES), agent, arm, 0)
    wanted = (back - kept) / (1 - kept)
    assert found.value == pytest.approx(wanted) and found.ci == pytest.approx((wanted, wanted))
    assert found.n == 80 and found.n_missing == 0


def test_where_no_gap_was_lost_nothing_can_come_back(planted) -> None:
    base = planted(4.0)
    wider = at_final(base, lambda x: x * np.r_[2.0, np.ones(7)])
    assert np.isnan(gap_restored(Reference(base, PROBES), wider, base, 0).value)
    assert np.isnan(gap_restored(Reference(base, PROBES), base, wider, 0).value)
