"""Run folders for tests of reports; every number in them is invented."""

import html.parser
import json

import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import report, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.evals import alignment, attack_metrics
from jax_cl_bd.reporting import figures

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
