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

from jax_cl_bd import report, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import alignment, attack_metrics
from jax_cl_bd.reporting import figures, one_run, read

CLASSES, TARGET, N = 10, 3, 400


def config(seed=0, target=TARGET, objective="simclr"):
    view = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
    return ml_collections.ConfigDict(dict(
        seed=seed, control=True, control_from="", victim="", downstream="",
        data=dict(name="digits", data_dir="", image_size=16, workers=0),
        attack=dict(name="noisy_alignment", target=target, poisons=40,
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
                   "eval/alignment/noise_norm": 0.9 - rate * s / 600}
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
    assert len(page.images) == len(pictures) == 10  # preview, layout, 5 curves, rates, 2 maps
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
    for words in ("knn · trigger at the centre", "linear probe", "control (clean twin)",
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


def table(out):
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
    rows = table(out)
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
    row = pick(table(epath.Path(tmp_path / "out")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    x = [run_folder.read_json(f / "results.json")["victim"]["knn"]["attack_success_rate"]
         for f in folders]
    seeds = np.reshape(x, (2, 2)).mean(1)
    assert (row["unit"], row["n"]) == ("seeds", "2")
    np.testing.assert_allclose([float(row["mean"]), float(row["std"])],
                               [seeds.mean(), seeds.std(ddof=1)], rtol=1e-12)
    assert len(row["points"].split()) == 4

    report.compare(folders[:2], epath.Path(tmp_path / "one"))  # one seed: over targets
    row = pick(table(epath.Path(tmp_path / "one")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    assert (row["unit"], row["n"]) == ("targets", "2")
    np.testing.assert_allclose(float(row["std"]), np.std(x[:2], ddof=1), rtol=1e-12)


def test_single_run_has_no_deviation(tmp_path):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.5})
    text = report.compare(folders, epath.Path(tmp_path / "out"))
    assert "±" not in text.replace(report.many_runs.NOTE, "").replace("mean ± deviation", "")
    row = pick(table(epath.Path(tmp_path / "out")), encoder="victim", probe="knn",
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


def test_many_folders_need_a_place(tmp_path):
    with pytest.raises(UserError, match="--out"):
        report.main([str(tmp_path), str(tmp_path)])
