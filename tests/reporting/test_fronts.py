"""Repairs side by side: points at matched accuracy, cost, and paired differences over seeds."""

import csv
import itertools

import numpy as np
import pytest
from etils import epath
from scipy import stats

from configs import clip_scenes
from jax_cl_bd import report, run_folder
from jax_cl_bd.reporting import figures, fronts, groups, html, read

START = {"clean_accuracy": 0.95, "attack_success_rate": 0.9}


def points_of(seed, shift=0.0):
    rng = np.random.default_rng(seed)
    rows = [{"rate": rate, "step": step, "chosen": (rate, step) == (1e-3, 300),
             "validation_accuracy": 0.9, "clean_accuracy": round(0.95 - 0.06 * rng.random(), 3),
             "attack_success_rate": round(shift + 0.4 * rng.random(), 3)}
            for rate in (1e-3, 3e-3) for step in (150, 300, 450)]
    return rows


def row(asr, accuracy=0.94):
    return {"clean_accuracy": accuracy, "attack_success_rate": asr, "intervals": {},
            "n": {"attack_success_rate": 921}}


def victim(folder, seed):
    cfg = clip_scenes.get_config(f"badnets,seed={seed}")
    figures_ = {"zero_shot": {"clean_accuracy": 0.95, "attack_success_rate": 0.9}}
    run_folder.write_config(folder, cfg)
    run_folder.write_json(folder / "results.json", {
        "victim": figures_, "control": {"zero_shot": row(0.05, 0.96)}, "defenses": {}})
    return folder


def defended(folder, of, arg, points=None, verdict=None, **defense):
    """A folder that holds nothing but a defense of another's victim."""
    seed = run_folder.read_config(of).seed
    cfg = clip_scenes.get_config(f"badnets,seed={seed},{arg}")
    cfg.victim = str(of)
    cfg.defense.update_from_flattened_dict(defense)
    name = cfg.defense.name
    run_folder.write_config(folder, cfg)
    run_folder.write_json(folder / "defenses" / name / "settings.json",
                          run_folder.settings_of(cfg, run_folder.DEFEND_GROUPS))
    found = {"verdict": verdict or {"clean_pairs": 2000, "rate": 1e-3}, "seconds": 12.3,
             "zero_shot": row(0.5)}
    if points:
        found["front"] = {"start": START, "points": points, "lowest": {}}
    run_folder.write_json(folder / "results.json", {"defenses": {name: found}})
    return folder


@pytest.fixture
def folders(tmp_path):
    root, out = epath.Path(tmp_path), []
    for seed in (0, 1, 2):
        of = victim(root / f"victim_{seed}", seed)
        rates = {} if seed == 0 else {"rates": (1e-3, 3e-3)}
        out += [of,
                defended(root / f"par_{seed}", of, "defense=par", points_of(seed), **rates),
                defended(root / f"few_{seed}", of, "defense=clean_clip", points_of(10 + seed, 0.3),
                         **rates, pairs=1460 + seed),
                defended(root / f"all_{seed}", of, "defense=clean_clip", points_of(20 + seed, 0.5),
                         **rates)]
    out.append(defended(root / "norm_0", out[0], "defense=norm_only",
                        verdict={"clean_pairs": 2000, "steps": 100, "gradient_steps": 0}))
    return out


def test_the_front_is_what_no_other_point_beats():
    for seed in range(20):
        points = points_of(seed)
        points += points[:1]  # a tie
        kept = fronts.front(points)
        for p in points:
            beaten = any(q["attack_success_rate"] <= p["attack_success_rate"]
                         and q["clean_accuracy"] >= p["clean_accuracy"] and (
                             q["attack_success_rate"] < p["attack_success_rate"]
                             or q["clean_accuracy"] > p["clean_accuracy"]) for q in points)
            assert beaten == (p not in kept)
        assert kept == sorted(kept, key=lambda p: p["attack_success_rate"])
        assert len({id(p) for p in kept}) == len(kept) <= len(points) - 1


def test_repairs_of_seeds_have_one_name_whatever_their_rates(folders):
    repairs = fronts.collect([read.load(f) for f in folders])
    labels = {r.label for r in repairs}
    assert labels == {"par", "clean_clip (pairs=some)", "clean_clip (pairs=all)", "norm_only"}
    assert len(repairs) == 10 and len({r.victim for r in repairs}) == 3
    assert len({r.group for r in repairs}) == 1
    par, *_, norm = repairs
    assert (par.pairs, par.steps, par.seconds) == (2000, 450 * 3, 12.3)
    assert norm.steps == 0 and norm.start == START and len(norm.points) == 1
    assert norm.control == {"clean_accuracy": 0.96, "attack_success_rate": 0.05}
    assert [r.steps for r in repairs if r.seed == 1] == [900] * 3


def test_runs_with_one_thing_changed_are_called_by_that_thing(tmp_path):
    root = epath.Path(tmp_path)
    of = victim(root / "victim", 0)
    changes = [{}, {"preserve": 0.0}, {"scan.top": 1}, {"curate.per_label": 64},
               {"curate.replay": 2.0}, {"scan.evidence": "crop"}, {"in_modality": 1.0}]
    repairs = fronts.collect([read.load(defended(
        root / str(i), of, "defense=oracle_finetune", points_of(i), **change))
        for i, change in enumerate(changes)])
    assert [r.label for r in repairs] == ["oracle_finetune", *(
        f"oracle_finetune ({name}={value})" for change in changes[1:]
        for name, value in change.items())]


def test_matched_accuracy_is_the_lowest_point_within_the_loss(folders):
    repairs = fronts.collect([read.load(f) for f in folders])
    for r, loss in itertools.product(repairs[:9], fronts.LOSSES):
        within = [p["attack_success_rate"] for p in [*r.points, START]
                  if p["clean_accuracy"] >= 0.95 - float(loss)]
        assert r.at(loss)["attack_success_rate"] == min(within)
        assert r.at("choice")["rate"] == 1e-3 and r.at("choice")["step"] == 300
    norm = repairs[-1]
    assert norm.at("choice")["attack_success_rate"] == norm.at("0.01")["attack_success_rate"] == .5
    lost = fronts.Repair(**{**vars(norm), "points": [{**norm.points[0], "clean_accuracy": 0.9}]})
    assert lost.at("0.03") == START  # it is no worse to leave the suspect as it is


def test_differences_are_paired_by_seed(folders, tmp_path):
    out = epath.Path(tmp_path / "out")
    text = report.compare(folders, out)
    lines = [line for line in csv.DictReader((out / "table.csv").read_text().splitlines())
             if line["probe"] == "front"]
    repairs = fronts.collect([read.load(f) for f in folders])
    for figure, at, of in fronts.COMPARED:
        values = {label: np.array([r.at(at)[of] for r in repairs if r.label == label])
                  for label in ("par", "clean_clip (pairs=some)")}
        found = next(line for line in lines if line["figure"] == figure
                     and line["encoder"] == "par - clean_clip (pairs=some)")
        paired = stats.ttest_rel(*values.values()).confidence_interval()
        expected = (np.subtract(*values.values()).mean(), paired.low, paired.high)
        np.testing.assert_allclose([float(found[n]) for n in ("mean", "low", "high")], expected,
                                   rtol=1e-9)
        assert found["n"] == "3" and found["unit"] == "seeds"
    one = [line for line in lines if line["encoder"].endswith("- norm_only")]
    assert one and all(line["n"] == "1" and line["low"] == "" for line in one)
    assert "| par - clean_clip (pairs=some) |" in text and "(3 seeds)" in text
    # Whoever leaves least comes first, and the others are set against it alone.
    least = {line["encoder"]: float(line["mean"]) for line in lines if line["n"] == "3"
             and " - " not in line["encoder"] and line["figure"] == fronts.RANKED_BY}
    assert list(least.values()) == sorted(least.values()) and min(least, key=least.get) == "par"
    assert "| clean_clip" in text and "| clean_clip (pairs=some) - " not in text
    assert any(line["encoder"].startswith("clean_clip (pairs=some) - ") for line in lines)
    assert "Repairs of victim_0, seed 0" in text and "| norm_only | 2,000 | 0 | 12 | 1 |" in text
    page = (out / "index.html").read_text()
    assert page.count('alt="Attack success rate and clean accuracy at') == 3
    assert (out / "fronts_2.png").read_bytes().startswith(b"\x89PNG")


def test_folders_with_nothing_but_repairs_are_enough(folders, tmp_path):
    alone = [f for f in folders if "victim" not in f.name]
    text = report.compare(alone, epath.Path(tmp_path / "out"))
    assert "Incomplete" not in text and "### Repairs of victim_1, seed 1" in text
    assert "<h1>10 repairs</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_a_repair_without_a_text_tower_answers_by_its_own_head(folders):
    of = folders[0]
    folder = defended(of.parent / "supervised", of, "defense=supervised", points_of(5))
    results = run_folder.read_json(folder / "results.json")
    found = results["defenses"]["supervised"]
    found["own_head"] = found.pop("zero_shot")
    run_folder.write_json(folder / "results.json", results)
    *_, last = fronts.collect([read.load(f) for f in [*folders, folder]])
    assert last.label == "supervised (own head)" and len(last.points) == 6


@pytest.mark.parametrize("verdict, settings, expected", [
    ({"training_pairs": 7, "gradient_steps": 9, "clean_pairs": 8}, {}, (7, 9)),
    ({"compact_set_pairs": 0, "rate": None}, {}, (0, 0)),
    ({"compact_set_pairs": 1467, "rate": 1e-3}, {"defense.rates": [1, 2], "defense.steps": 5},
     (1467, 10)),
    ({"clean_images": 3, "steps": 4}, {"defense.steps": 4}, (3, None)), ({}, {}, (None, None))])
def test_costs_of_older_runs_are_read_from_what_they_say(verdict, settings, expected):
    assert fronts.cost(verdict, settings) == expected


def test_what_lies_far_below_is_counted_and_not_drawn():
    points = [{"clean_accuracy": a, "attack_success_rate": .5, "chosen": i == 0}
              for i, a in enumerate((.94, .84, .82, .3))]
    for names in (("a", "b"), ("a" * 60, "b")):
        lines = [(name, points, fronts.front(points)) for name in names]
        png, hidden = figures.fronts(lines, START, None)
        assert png.startswith(b"\x89PNG") and hidden == 4
    assert html.number(figures.FAR) == "12.0"


def test_what_an_older_run_lacks_is_what_it_was_before_there_was_a_choice():
    old, new = groups.completed([{"defense.pairs": 5}, {"defense.preserve": 10.0}])
    assert old == {"defense.pairs": 5, "defense.preserve": 0.0}
    assert new == {"defense.pairs": "", "defense.preserve": 10.0}
