"""Pages of single runs, from made-up run folders."""

import re

import numpy as np
import pytest
from etils import epath
from scipy import stats

from jax_cl_bd import metrics, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.evals import attack_metrics
from jax_cl_bd.reporting import differences, figures, one_run, read, table
from tests.reporting.made_up import TARGET, Page, config, figures_row, render, results_of, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), config())


@pytest.fixture(scope="module")
def document(folder):
    return render(folder)


def test_page_is_self_contained(folder, document):
    page = Page(document)
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", document)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", without_data)
    pictures = sorted((folder / "report").glob("*.png"))
    assert len(page.images) == len(pictures) == 11  # preview, layout, 6 curves, rates, 2 maps
    for image in page.images:
        assert image["src"].startswith("data:image/png;base64,iVBOR")
        assert len(image["alt"]) > 20
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert '<meta name="viewport"' in document and "@media print" in document


def test_page_tells_the_results(folder, document):
    row = run_folder.read_json(folder / "results.json")["victim"]["knn"]
    text = Page(document).text.replace("\N{NO-BREAK SPACE}", " ")
    low, high = row["intervals"]["attack_success_rate"]
    assert (f"The backdoor works: {100 * row['attack_success_rate']:.1f} % ({100 * low:.1f} to "
            f"{100 * high:.1f}) of 360 triggered test images of other classes are taken for “3”, "
            f"an excess of +{100 * row['excess']:.1f} points") in text
    for words in ("knn · trigger at the centre", "linear probe", "the victim's clean twin",
                  "untrained", "victim after distill", "control after distill",
                  "40 poisons", "0123456789ab", "train.batch_size"):
        assert words in text, words


def test_no_backdoor_is_claimed_without_excess(tmp_path):
    text = Page(render(write_run(tmp_path / "r", config(), asr=0.05))).text
    assert "No backdoor is shown" in text and "The backdoor works" not in text


def test_pair_probability_is_the_solvers(document):
    # docs/papers.md, Noisy Alignment: 2L x L, t/L = 0.25, scale (0.2, 1), continuous law: 0.0294
    found = re.search(r"Predicted pair probability: (0\.\d+)", document)
    assert found
    np.testing.assert_allclose(float(found[1]), 0.0294, rtol=0.01)


def test_curves_have_what_they_are_read_against(document, monkeypatch):
    page, drawn = Page(document), {}
    for words in ("at the end: victim 0.88 (0.1 without trigger), control",
                  "at the end: victim 0.333 (0.95 without trigger), control"):
        assert words in page.text, words
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.update(figure=figure))
    lines = {"victim": (np.arange(3), np.ones(3)), "control": (np.arange(3), np.zeros(3))}
    figures.curves(lines, ylabel="noise norm", clean=lines)
    figure = drawn["figure"]
    told = {text.get_text() for text in figure.legends[0].get_texts()}
    assert told == {"victim, triggered", "victim, no trigger", "control, triggered",
                    "control, no trigger"}
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles["victim, triggered"] == "-" and styles["victim, no trigger"] == "--"
    figures.curves(lines, ylabel="spread ratio", level=("as without trigger", 1.0))
    assert "as without trigger" in [t.get_text() for t in drawn["figure"].legends[0].get_texts()]


def test_page_and_terminal_say_differences_with_newcombes_interval(folder, document):
    """Against SciPy's Wilson intervals, joined as Newcombe's (1998) equation does."""
    results = run_folder.read_json(folder / "results.json")
    text = Page(document).text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    student = results["defenses"]["distill"]
    said = table.text(results)
    for (name, one), (other, two) in ((("victim", results["victim"]),
                                       ("control", results["control"])),
                                      (("after distill", student),
                                       ("control after distill", student["control"]))):
        rates = [(r["knn"]["hits"]["attack_success_rate"], r["knn"]["n"]["attack_success_rate"])
                 for r in (one, two)]
        d, low, high = newcombe_by_scipy(*rates)
        assert f"{name} - {other} " in text
        assert f"{100 * d:+.1f} % {100 * low:+.1f} to {100 * high:+.1f}" in text
        pair = f"{name.removeprefix('after ')} - " + ("distill of control" if "distill" in name
                                                      else "control")
        assert f"ASR, {pair}: {d:+.3f} [{low:+.3f}, {high:+.3f}]" in said


def test_the_terminal_has_rows_of_a_defense_alone(folder):
    """A head of its own is measured under a name that the victim has no row of."""
    results = run_folder.read_json(folder / "results.json")
    assert "own_head" not in table.text(results)
    results["defenses"]["distill"]["own_head"] = {"clean_accuracy": 0.125}
    lines = table.text(results).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("own_head"))
    assert lines[at + 1].split()[:2] == ["distill", "0.125"]


def newcombe_by_scipy(one, other):
    """Hits and totals of two rates -> difference, low, high."""
    (p, q), found = [h / n for h, n in (one, other)], []
    for h, n in (one, other):
        found.append(stats.binomtest(h, n).proportion_ci(0.95, method="wilson"))
    low = p - q - ((p - found[0].low) ** 2 + (found[1].high - q) ** 2) ** 0.5
    return p - q, low, p - q + ((found[0].high - p) ** 2 + (q - found[1].low) ** 2) ** 0.5


@pytest.mark.parametrize("one,other,low,high", [  # Newcombe (1998), table II, method 10
    ((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090),
    ((6, 7), (2, 7), 0.0582, 0.8062), ((5, 56), (0, 29), -0.0381, 0.1926)])
def test_newcombes_published_intervals(one, other, low, high):
    rows = [{"rate": h / n, "intervals": {"rate": attack_metrics.wilson(h, n)}}
            for h, n in (one, other)]
    found = differences.newcombe(*rows, "rate")
    np.testing.assert_allclose(found[1:], [low, high], atol=5e-5)
    np.testing.assert_allclose(found, newcombe_by_scipy(one, other), rtol=1e-9)


def test_control_of_another_run_is_named(tmp_path):
    """By the name and seed in results.json; its curves are read from there, if they can be."""
    clean = write_run(tmp_path / "clean_5", config(5))
    settings = run_folder.settings_of(config(5), run_folder.PRETRAIN_GROUPS)
    run_folder.begin(clean / "control" / "pretrain", settings)
    run_folder.finish(clean / "control" / "pretrain", settings)
    cfg = config()
    cfg.control_from = str(clean)
    folder = write_run(tmp_path / "r", cfg)
    (folder / "control" / "metrics.jsonl").unlink()
    results = results_of(cfg, 0.85)
    results["run"]["control"] = {"folder": "clean_5", "seed": 5}
    run_folder.write_json(folder / "results.json", results)
    assert "control: clean_5, seed 5" in table.text(results)
    text = Page(render(folder)).text
    assert "another run's clean encoder: clean_5, seed 5" in text
    assert "twin" not in text and "No control was trained" not in text
    own, theirs = read.load(folder), metrics.read_lines(clean / "control" / "metrics.jsonl")
    assert own.metrics["control"] == theirs and own.same_trigger

    other = config(5)
    other.attack.trigger.id = 11  # what its own trigger did is not this run's attack
    run_folder.write_config(clean, other)
    run = read.load(folder)
    watched = {key for line in run.metrics["control"] for key in line if key.startswith("eval/")}
    assert watched == {"eval/knn/clean_accuracy"}
    assert "only its loss and clean accuracy are drawn" in Page(render(folder)).text

    cfg.control_from = str(tmp_path / "gone" / "clean_5")
    run_folder.write_config(folder, cfg)
    text = Page(render(folder)).text
    assert "cannot be read from here" in text and "clean_5, seed 5" in text
    assert "twin" not in text and "No control was trained" not in text


def test_missing_parts_are_said(tmp_path):
    cfg = config()
    empty = epath.Path(tmp_path / "empty")
    run_folder.write_config(empty, cfg)
    text = Page(render(empty)).text
    for words in ("not evaluated yet", "poison stage has not run", "no metrics.jsonl",
                  "evaluate stage has not run", "No defense was run"):
        assert words in text, words

    part = write_run(tmp_path / "part", cfg)
    results = results_of(cfg, 0.85)
    for name in ("control", "defenses"):
        del results[name]
    rng = np.random.default_rng(0)
    results["victim"] = {"knn": figures_row(rng, 0.9, 0.8, TARGET), "alignment": {}}
    run_folder.write_json(part / "results.json", results)
    (part / "control" / "metrics.jsonl").unlink()
    (part / "evaluate" / "map_control.npz").unlink()
    lines = [line for line in (part / "metrics.jsonl").read_text().splitlines()
             if "eval/" not in line]
    (part / "metrics.jsonl").write_text("\n".join(lines))
    text = Page(render(part)).text
    for words in ("No control was trained", "Nothing was measured while training",
                  "No defense was run", "any encoder"):
        assert words in text, words


def test_clean_run_and_poison_without_layout(tmp_path):
    folder = write_run(tmp_path / "r", config())
    run_folder.write_json(folder / "poison" / "summary.json", {"poisons": 0, "target_class": "3"})
    assert "No image is poisoned" in render(folder)
    summary = dict(poisons=2, added=0, replaced=2, removed=0, rows=9, rate_of_dataset=0.2,
                   rate_of_target_class=0.5, target_class="<b>", trigger=dict(
                       name="patch", id=14, size=4, opacity=1.0))
    run_folder.write_json(folder / "poison" / "summary.json", summary)
    Plan.make(2, replaces=[1, 2]).save(folder / "poison" / "plan.npz")
    document = render(folder)
    assert "no pair probability" in document
    assert "&lt;b&gt;" in document and "“<b>" not in document  # class names are not markup


def test_a_defense_of_another_folders_victim_shows_its_poison(tmp_path, folder):
    cfg = config()
    cfg.victim = str(folder)
    other = write_run(tmp_path / "r", cfg, whole=False)
    run = read.load(other)
    assert run.summary["poisons"] == 40 and run.metrics.keys() == {"victim", "control"}
    one_run.build(run, None)


def test_map_shares_of_variance_match_an_eigendecomposition():
    rng = np.random.default_rng(4)
    clean, triggered = rng.normal(size=(60, 5)), rng.normal(size=(60, 5)) + 1
    labels = np.arange(60) % 3
    _, share = figures.feature_map(clean, triggered, labels, 1)
    both = np.concatenate([clean, triggered[labels != 1]])
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(both.T))
    np.testing.assert_allclose(share, values[-2:].sum() / values.sum(), rtol=1e-9)
