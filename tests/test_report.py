"""Pages from made-up run folders; tables over seeds against NumPy and SciPy.

Every number in the folders below is invented for these tests.
"""

import csv
import html.parser
import json
import re

import ml_collections
import numpy as np
import pytest
from etils import epath
from scipy import stats

from jax_cl_bd import metrics, report, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import alignment, attack_metrics
from jax_cl_bd.reporting import differences, figures, one_run, read, table

CLASSES, TARGET, N = 10, 3, 400


def config(seed=0, target=TARGET, objective="simclr"):
    view = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
    return ml_collections.ConfigDict(dict(
        seed=seed, control=True, control_from="", victim="", downstream="",
        data=dict(name="digits", data_dir="", image_size=16, workers=0),
        attack=dict(name="noisy_alignment", target=target, poisons=40,
                    trigger_from="", surrogate="",
                    trigger=dict(name="patch", id=14, size=4, opacity=1.0)),
        augment=dict(view1=dict(view), view2=dict(view)), text=dict(name="none"),
        model=dict(name="small_resnet", stages=(16, 32, 64)), objective=dict(name=objective),
        optim=dict(lr=0.5), train=dict(steps=400, epochs=0, batch_size=64, eval_every=100),
        evals=dict(probes=("knn", "linear_probe"), placements=("random", "center")),
        defense=dict(name="distill")))


def figures_row(rng, accuracy, asr, target, control=None):
    """Figures of predictions drawn at these rates."""
    labels = np.arange(N) % CLASSES

    def draw(rate):
        right = np.where(rng.random(N) < accuracy, labels, (labels + 1) % CLASSES)
        return np.where(rng.random(N) < rate, target, right)

    row = attack_metrics.figures({"clean": draw(0), "triggered": draw(asr), "occluded": draw(0.05),
                                  "wrong": draw(0.08)}, labels, target)
    row["protocol"] = {"placement": "random", "labelled_rows": 1470, "k": 120}
    return attack_metrics.add_excess(row, control)


def encoder_rows(rng, accuracy, asr, target, control=None):
    names = ("knn", "knn:center", "linear_probe", "linear_probe:center")
    rows = {name: figures_row(rng, accuracy, asr, target, control and control[name])
            for name in names}
    pull = asr * np.eye(8)[0]
    clean, near = rng.normal(size=(90, 8)), rng.normal(size=(20, 8)) + np.eye(8)[0]
    rows["alignment"] = alignment.measure(clean * (1.1 - asr) + 3 * pull, clean, near)
    return rows


def results_of(cfg, asr):
    rng = np.random.default_rng([cfg.seed, cfg.attack.target, round(1000 * asr)])
    target = cfg.attack.target
    control = encoder_rows(rng, 0.95, 0.06, target)
    student = encoder_rows(rng, 0.88, 0.1, target, control)
    return {
        "poison": {"attack": cfg.attack.name, "target": target, "count": 40},
        "victim": encoder_rows(rng, 0.94, asr, target, control), "control": control,
        "untrained": encoder_rows(rng, 0.8, 0.03, target, control),
        "defenses": {"distill": {"verdict": {"clean_images": 367, "steps": 300}, **student,
                                 "control": encoder_rows(rng, 0.87, 0.07, target),
                                 "seconds": 41.0}},
        "run": {"config_hash": "0123456789ab", "seed": cfg.seed, "versions": {"jax": "0.10.2"},
                "devices": ["cpu"], "seconds": 12.5, "images_per_second": 812.0}}


def na_plan():
    """Two of each layout with 16 px parts and a 4 px trigger in the centre of the shadow part."""
    canvas, reference, shadow = [], [], []
    for layout in np.arange(8) % 4:
        along = (0, 16, 16, 16) if layout < 2 else (16, 0, 16, 16)
        canvas.append((16, 32) if layout < 2 else (32, 16))
        parts = [(0, 0, 16, 16), along]
        reference.append(parts[layout % 2])
        shadow.append(parts[1 - layout % 2])
    shadow = np.array(shadow)
    trigger = np.concatenate([shadow[:, :2] + 6, np.full((8, 2), 4)], axis=1)
    return Plan.make(8, layout=np.arange(8) % 4, canvas=canvas, reference_box=reference,
                     shadow_box=shadow, trigger_box=trigger)


def write_run(folder, cfg, *, asr=0.85, whole=True):
    folder = epath.Path(folder)
    run_folder.write_config(folder, cfg)
    run_folder.write_json(folder / "results.json", results_of(cfg, asr))
    if not whole:
        return folder
    rng = np.random.default_rng(0)
    (folder / "evaluate").mkdir()
    run_folder.write_json(folder / "poison" / "summary.json", dict(
        poisons=40, added=40, replaced=0, removed=40, rows=1470, rate_of_dataset=40 / 1470,
        rate_of_target_class=0.27, target_class="3",
        trigger=dict(name="patch", id=14, size=4, opacity=1.0)))
    na_plan().save(folder / "poison" / "plan.npz")
    (folder / "poison" / "preview.png").write_bytes(
        figures.layout((16, 32), {"reference": (0, 0, 16, 16)}))
    for place, rate in ((folder, asr), (folder / "control", 0.06)):
        place.mkdir(exist_ok=True)
        lines = [{"step": s, "train/loss": 4 + np.exp(-s / 80) + 0.03 * rng.normal()}
                 for s in range(20, 401, 20)]
        lines += [{"step": s, "eval/knn/clean_accuracy": 0.95 - 0.3 * np.exp(-s / 90),
                   "eval/knn/attack_success_rate": rate * (1 - np.exp(-s / 150)),
                   "eval/alignment/reference_alignment": 0.2 + rate * s / 500,
                   "eval/alignment/noise_norm": 0.9 - rate * s / 600,
                  "eval/alignment/clean_reference_alignment": 0.1,
                  "eval/alignment/clean_noise_norm": 0.95,
                  "eval/alignment/spread_ratio": 1 - rate * s / 800}
                  for s in range(100, 401, 100)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = np.arange(N) % CLASSES
    centres = rng.normal(size=(CLASSES, 16))
    clean = centres[labels] + 0.35 * rng.normal(size=(N, 16))
    for name, shift in (("map.npz", 0.85), ("map_control.npz", 0.1)):
        triggered = (1 - shift) * clean + shift * centres[TARGET] + 0.1 * rng.normal(size=(N, 16))
        np.savez(folder / "evaluate" / name, clean=clean, triggered=triggered, labels=labels,
                 target=TARGET)
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags, image sources and text; complains about tags that do not match."""
    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.images, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def render(folder):
    report.main([str(folder)])
    return (folder / "report" / "index.html").read_text()


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


# --- many runs ---

def write_many(tmp_path, asrs):
    """(seed, target, objective) -> attack success rate."""
    folders = []
    for i, ((seed, target, objective), asr) in enumerate(asrs.items()):
        folders.append(write_run(tmp_path / f"r{i}", config(seed, target, objective), asr=asr,
                                 whole=False))
    return folders


def rows_of(out):
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def pick(rows, **names):
    found = [r for r in rows if all(names[n] in r[n] for n in names if n == "group")
             and all(r[n] == names[n] for n in names if n != "group")]
    assert len(found) == 1, (names, len(found))
    return found[0]


def test_seeds_are_summarised_as_numpy_and_scipy_do(tmp_path, capsys):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.9, (1, 3, "simclr"): 0.7,
                                    (2, 3, "simclr"): 0.8, (0, 3, "byol"): 0.3,
                                    (1, 3, "byol"): 0.2})
    out = epath.Path(tmp_path / "out")
    report.main([*map(str, folders), f"--out={out}"])
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "table.md").read_text().strip()
    rows = rows_of(out)
    results = [run_folder.read_json(f / "results.json") for f in folders]
    for group, members in (("simclr", results[:3]), ("byol", results[3:])):
        for probe, name in (("knn", "attack_success_rate"), ("linear_probe:center", "excess")):
            x = np.array([r["victim"][probe][name] for r in members])
            row = pick(rows, group=group, encoder="victim", probe=probe, figure=name)
            low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
            np.testing.assert_allclose([float(row[c]) for c in ("mean", "std", "low", "high")],
                                       [x.mean(), x.std(ddof=1), low, high], rtol=1e-12)
            assert (row["unit"], int(row["n"])) == ("seeds", len(x))
            np.testing.assert_allclose([float(p.split("=")[1]) for p in row["points"].split()], x)
    paired = pick(rows, group="simclr", encoder="victim - control", probe="knn",
                  figure="attack_success_rate")
    d = np.array([r["victim"]["knn"]["attack_success_rate"]
                  - r["control"]["knn"]["attack_success_rate"] for r in results[:3]])
    test = stats.ttest_rel([r["victim"]["knn"]["attack_success_rate"] for r in results[:3]],
                           [r["control"]["knn"]["attack_success_rate"] for r in results[:3]])
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose([float(paired[c]) for c in ("mean", "std", "low", "high")],
                               [d.mean(), d.std(ddof=1), interval.low, interval.high], rtol=1e-9)
    assert any(r["encoder"] == "distill - victim" for r in rows)
    assert f"{100 * np.mean(d):+.1f}" in printed
    page = Page((out / "index.html").read_text())
    assert len(page.images) == 2 and all(i["src"].startswith("data:") for i in page.images)
    assert "2 groups" in page.text


def test_targets_are_averaged_within_a_seed(tmp_path):
    asrs = {(s, t, "simclr"): 0.1 + 0.2 * s + 0.1 * t for s in (0, 1) for t in (3, 5)}
    folders = write_many(tmp_path, asrs)
    report.compare(folders, epath.Path(tmp_path / "out"))
    row = pick(rows_of(epath.Path(tmp_path / "out")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    x = [run_folder.read_json(f / "results.json")["victim"]["knn"]["attack_success_rate"]
         for f in folders]
    seeds = np.reshape(x, (2, 2)).mean(1)
    assert (row["unit"], row["n"]) == ("seeds", "2")
    np.testing.assert_allclose([float(row["mean"]), float(row["std"])],
                               [seeds.mean(), seeds.std(ddof=1)], rtol=1e-12)
    assert len(row["points"].split()) == 4

    report.compare(folders[:2], epath.Path(tmp_path / "one"))  # one seed: over targets
    row = pick(rows_of(epath.Path(tmp_path / "one")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    assert (row["unit"], row["n"]) == ("targets", "2")
    np.testing.assert_allclose(float(row["std"]), np.std(x[:2], ddof=1), rtol=1e-12)


def test_single_run_has_no_deviation(tmp_path):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.5})
    text = report.compare(folders, epath.Path(tmp_path / "out"))
    assert "±" not in text.replace(report.many_runs.NOTE, "").replace("mean ± deviation", "")
    row = pick(rows_of(epath.Path(tmp_path / "out")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    assert row["std"] == row["low"] == row["high"] == ""


def test_incomplete_runs_are_listed(tmp_path):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.5, (1, 3, "simclr"): 0.6})
    (folders[1] / "results.json").unlink()
    nothing = epath.Path(tmp_path / "nothing")
    nothing.mkdir()
    out = epath.Path(tmp_path / "out")
    text = report.compare([*folders, nothing], out)
    assert "1 run (seed" in text and "Incomplete" in text
    for folder in (folders[1], nothing):
        assert str(folder) in text and str(folder) in (out / "index.html").read_text()
    with pytest.raises(UserError, match="no complete run"):
        report.compare([nothing], out)


def test_groups_differ_by_any_other_setting(tmp_path):
    one, two = config(), config(seed=1)
    two.attack.poisons = 80
    folders = [write_run(tmp_path / "a", one, whole=False),
               write_run(tmp_path / "b", two, whole=False)]
    text = report.compare(folders, epath.Path(tmp_path / "out"))
    assert "attack.poisons=40" in text and "attack.poisons=80" in text


def test_folders_that_each_seed_names_for_itself_make_no_groups(tmp_path):
    folders = []
    for seed in (0, 1, 2):
        cfg = config(seed)
        cfg.control_from = str(tmp_path / f"clean_{seed}")
        cfg.attack.trigger_from, cfg.attack.surrogate = f"trigger_{seed}", f"surrogate_{seed}"
        folders.append(write_run(tmp_path / f"r{seed}", cfg, whole=False))
    out = epath.Path(tmp_path / "out")
    text = report.compare(folders, out)
    row = pick(rows_of(out), encoder="victim", probe="knn", figure="excess")
    assert (row["unit"], row["n"]) == ("seeds", "3")
    assert "another run's control: 0/3 by clean_0; 1/3 by clean_1" in text


def test_defenses_are_grouped_by_their_own_settings(tmp_path):
    """Whatever defense each folder's config names last."""
    folders = []
    for seed, last, fraction in ((0, "distill", 0.25), (1, "retrain", 0.25), (2, "distill", 0.05)):
        cfg = config(seed)
        cfg.defense.name = last
        folders.append(write_run(tmp_path / f"r{seed}", cfg, whole=False))
        run_folder.write_json(folders[-1] / "defenses" / "distill" / "settings.json",
                              {"seed": seed, "control_from": f"c{seed}", "defense.name": "distill",
                               "defense.clean_fraction": fraction})
    out = epath.Path(tmp_path / "out")
    report.compare(folders, out)
    rows = rows_of(out)
    assert len({r["group"] for r in rows}) == 1
    seeds = {r["encoder"]: [p.split("/")[0] for p in r["points"].split()] for r in rows}
    assert seeds["victim"] == seeds["victim - control"] == ["0", "1", "2"]
    for tail in ("", " of control", " - victim"):
        assert seeds[f"distill [defense.clean_fraction=0.25]{tail}"] == ["0", "1"]
        assert seeds[f"distill [defense.clean_fraction=0.05]{tail}"] == ["2"]


def test_a_defended_victim_is_paired_with_the_defended_control(tmp_path):
    folders = write_many(tmp_path, {(s, 3, "simclr"): 0.7 + 0.1 * s for s in (0, 1, 2)})
    out = epath.Path(tmp_path / "out")
    text = report.compare(folders, out)
    results = [run_folder.read_json(f / "results.json")["defenses"]["distill"] for f in folders]
    x = [r["knn"]["attack_success_rate"] for r in results]
    y = [r["control"]["knn"]["attack_success_rate"] for r in results]
    test = stats.ttest_rel(x, y)
    interval = test.confidence_interval(0.95)
    names = dict(probe="knn", figure="attack_success_rate")
    row = pick(rows_of(out), encoder="distill - distill of control", **names)
    np.testing.assert_allclose([float(row[c]) for c in ("mean", "low", "high")],
                               [np.mean(x) - np.mean(y), interval.low, interval.high], rtol=1e-9)
    row = pick(rows_of(out), encoder="distill of control", **names)
    np.testing.assert_allclose(float(row["mean"]), np.mean(y), rtol=1e-12)
    assert "| distill - distill of control |" in text


def test_many_folders_need_a_place(tmp_path):
    with pytest.raises(UserError, match="--out"):
        report.main([str(tmp_path), str(tmp_path)])
