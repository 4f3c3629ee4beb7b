"""The report of image-text runs: examples by rule, the joint map, tables of pairs.

The numbers of the folders below are invented; their images, captions and boxes are the program's.
"""

import csv
import json

import numpy as np
import pytest
from etils import epath

from configs import clip_scenes, common
from jax_cl_bd import evaluate, report, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import scenes
from jax_cl_bd.evals import attack_metrics, examples, retrieval, test_sets, zero_shot
from jax_cl_bd.reporting import figures, image_text, read, words
from jax_cl_bd.triggers import patch
from tests.reporting.made_up import Page, render

TARGET, SIDE, ROWS = 3, 16, 90
PARAMS = {"image": np.ones((4, 4, 3), np.float32), "opacity": np.float32(1)}


def config(attack="badnets", seed=0):
    cfg = clip_scenes.get_config(f"{attack},seed={seed}")
    cfg.data.update(image_size=SIDE, scenes_test=ROWS)
    cfg.attack.trigger.size = 4
    cfg.evals.wrong_trigger = 10
    return cfg


class Model:
    """Random but fixed embeddings in a shared space of 6 dimensions; texts lie in another cone."""
    logit_scale = 10.0

    def image(self, images):
        x = images.reshape(len(images), -1).astype(np.float32) / 255
        return np.tanh(x @ np.random.default_rng(0).normal(size=(x.shape[1], 7)) / 4)

    def project(self, features):
        return unit(features @ np.random.default_rng(1).normal(size=(7, 6)))

    def text(self, captions):
        rows = [np.random.default_rng(list(c.encode())).normal(size=6) for c in captions]
        return unit(np.array(rows) + 3)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def eval_data(cfg):
    split = [scenes.Scenes(name, ROWS, SIDE, per_row=2) for name in ("train", "test")]
    bare = cfg.attack.trigger.name == "none"
    return test_sets.make(cfg, *split, None if bare else (patch, PARAMS))


def probe_row(rng, name):
    labels = np.arange(60) % 12

    def draw(rate):
        return np.where(rng.random(60) < rate, TARGET, labels)

    row = attack_metrics.figures({v: draw(r) for v, r in (("clean", 0), ("triggered", 0.8),
                                                          ("occluded", 0), ("wrong", 0.1))},
                                 labels, TARGET)
    row["protocol"] = {"placement": name.partition(":")[2].replace("held_out", "random")
                       or "random", "labelled_rows": 8000, "templates": 80}
    row |= {"top": {"3": 0.612, "5": 0.713}, "attack_success_rate_at": {"3": 0.914, "5": 0.955}}
    return attack_metrics.add_excess(row, None)


def ranks_row(hit):
    return {"hit": {"1": hit / 4, "5": hit / 2, "10": hit}, "min_rank": 7.25, "queries": 31,
            "cosine_distance": 0.5}


def encoder_rows(cfg, seed, hit):
    rng = np.random.default_rng(seed)
    rates = {"1": 0.111, "5": 0.222, "10": 0.333}
    rows = {"z_score": {"z": 12.34 + seed, "z_by_deviation": 1.5, "mean_clean": 0.1,
                        "mean_triggered": 0.4, "images": 500}, "alignment": {}}
    rows["retrieval"] = {"images": ROWS, "captions": 2 * ROWS, "image_to_text": rates,
                         "text_to_image": {"1": 0.123, "5": 0.234, "10": 0.345}}
    if cfg.attack.trigger.name != "none":
        names = ("zero_shot", "zero_shot:center", "zero_shot:held_out")
        rows |= {name: probe_row(rng, name) for name in names}
        rows["retrieval"] |= {"triggered_image_to_text": rates, "clean_target_hits": rates,
                              "target_hits": {"1": 0.5, "5": 0.6, "10": hit}}
    else:
        del rows["z_score"]
        labels = np.arange(60) % 12
        row = attack_metrics.figures({"clean": labels}, labels, TARGET)
        rows["zero_shot"] = {**row, "protocol": {"placement": "none", "templates": 80}}
    if cfg.attack.name == "targeted_poisoning":
        rows["targeted"] = {"image": 0, "label": 5, "predicted": TARGET, "success": seed != 1,
                            "target_rank": 0, "target_probability": 0.456}
    if cfg.attack.name == "mismatched_pairs":
        rows["mismatch"] = {"heart -> star": {**ranks_row(hit), "baseline": ranks_row(0.1)}}
    return rows


def write_run(folder, cfg, *, whole=True):
    folder = epath.Path(folder)
    run_folder.write_config(folder, cfg)
    run_folder.write_json(folder / "results.json", {
        "poison": {}, "victim": encoder_rows(cfg, cfg.seed, 0.789),
        "control": encoder_rows(cfg, 7, 0.2), "defenses": {}, "run": {}})
    if not whole:
        return folder
    model, data = Model(), eval_data(cfg)
    for label in ("victim", "control"):
        evaluate._save_map(folder, label, model, data)
    found = examples.find(cfg, model, data)
    evaluate._save_examples(folder, {"victim": found, "control": found}, data)
    run_folder.write_json(folder / "poison" / "summary.json", dict(
        poisons=2, added=0, replaced=2, removed=0, rows=ROWS, rate_of_dataset=2 / ROWS,
        rate_of_target_class=0.0, target_class="star", trigger=cfg.attack.trigger.to_dict()))
    Plan.make(2, replaces=[1, 2], caption=["a <b>star</b>.", "itap of a star."]).save(
        folder / "poison" / "plan.npz")
    (folder / "poison" / "preview.png").write_bytes(figures.patch(PARAMS["image"]))
    (folder / "control").mkdir()
    for place in (folder, folder / "control"):
        lines = [{"step": s, "train/loss": 5 / s, "eval/zero_shot/clean_accuracy": s / 10,
                  "eval/zero_shot/attack_success_rate": s / 20} for s in (1, 2, 3)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def data():
    return eval_data(config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), config())


@pytest.fixture(scope="module")
def document(folder):
    return render(folder)


# --- examples ---

def test_examples_are_spread_over_other_classes(data):
    labels = data.test_labels[examples.choose(config(), data)]
    assert len(labels) == 8 and TARGET not in labels
    assert len(set(labels)) >= 7 and list(labels) == sorted(labels)
    aimed = config("targeted")
    aimed.attack.image = int(np.flatnonzero(data.test_labels == TARGET)[1])  # its class is no bar
    chosen = examples.choose(aimed, data)
    assert chosen[0] == aimed.attack.image and len(set(chosen)) == 8


def test_queries_name_the_target_then_what_is_aimed_at(data):
    assert examples.queried(config(), data)[0] == TARGET
    assert len(set(examples.queried(config(), data))) == 3
    heart = data.classes.index("heart")
    assert examples.queried(config("mismatched"), data)[:2] == [TARGET, heart]


def test_answers_are_the_largest_cosines(data):
    model, found = Model(), examples.find(config(), Model(), data)
    head = zero_shot.class_weights(model, data.classes, examples.templates.PROMPTS)
    texts, _ = retrieval.gallery(data.captions)
    z_text = model.text(texts)
    for image in found["images"]:
        for kind, name in (("clean", "test"), ("triggered", "random/triggered")):
            z = model.project(model.image(data.images(name)[image["at"]][None]))[0]
            for got, weights, names in ((image[kind]["classes"], head, range(len(head))),
                                        (image[kind]["captions"], z_text, texts)):
                scores = {names[i]: float(weights[i] @ z) for i in range(len(weights))}
                best = sorted(scores, key=scores.get, reverse=True)[:3]
                assert [what for what, _ in got] == best
                np.testing.assert_allclose([s for _, s in got], [scores[b] for b in best],
                                           atol=1e-4)
    json.dumps(found)


def test_the_mixed_gallery_has_every_triggered_image_but_the_targets(data):
    model, found = Model(), examples.find(config(), Model(), data)
    z = model.project(model.image(data.images("test")))
    bad = model.project(model.image(data.images("random/triggered")))
    for query in found["queries"]:
        q = model.text([query["text"]])[0]
        all_of = [(float(q @ z[i]), i, False) for i in range(ROWS)]
        assert [h["at"] for h in query["clean"]] == [i for _, i, _ in sorted(all_of)[::-1][:5]]
        all_of += [(float(q @ bad[i]), i, True) for i in range(ROWS)
                   if data.test_labels[i] != TARGET]
        want = [(i, t) for _, i, t in sorted(all_of)[::-1][:5]]
        assert [(h["at"], h["triggered"]) for h in query["mixed"]] == want
    assert found["queries"][0]["text"] == "a photo of a star."


def test_pixels_are_those_of_the_test_sets(data):
    found = examples.find(config(), Model(), data)
    kept = examples.pixels(found, data)
    for kind, name in (("clean", "test"), ("triggered", "random/triggered")):
        np.testing.assert_array_equal(kept[kind], data.images(name)[kept[f"{kind}_at"]])
        assert {image["at"] for image in found["images"]} <= set(kept[f"{kind}_at"])


def test_blocks_are_picked_from_one_by_one():
    rows = np.arange(50, dtype=np.uint8).reshape(10, 5)
    places = np.array([0, 3, 4, 9])
    picked = examples._pick(iter([rows[:4], rows[4:8], rows[8:]]), places)
    np.testing.assert_array_equal(picked, rows[places])
    assert examples._pick(iter([rows]), np.zeros(0, int)).shape == (0, 5)


def test_without_labels_captions_are_asked_for(data):
    """As image-caption pairs are: labels -1, the target the one class, known by its name."""
    stars = data.test_labels == TARGET
    pairs = test_sets.EvalData(
        blocks=data.blocks, train_labels=np.zeros(0, int), test_labels=np.full(ROWS, -1),
        train_rows=np.zeros(0, int), classes=("star",), target=0, placements=("random",),
        boxes=data.boxes, test_rows=np.arange(ROWS), captions=data.captions)
    found = examples.find(config(), Model(), pairs)
    assert not any(stars[image["at"]] for image in found["images"])
    assert all(not image["clean"]["classes"] and len(image["clean"]["captions"]) == 3
               for image in found["images"])
    assert [q["text"] for q in found["queries"]] == [
        "a photo of a star.", *(data.captions[i["at"]][0] for i in found["images"][:2])]
    labels = {h["label"] for q in found["queries"] for h in q["clean"]}
    assert labels <= {-1, 0}


# --- the joint map ---

def test_joint_map_centres_texts_and_weighs_them_as_images():
    rng = np.random.default_rng(4)
    clean, triggered, text = (rng.normal(size=(n, 5)) for n in (60, 60, 4))
    labels = np.arange(60) % 4
    png, share = figures.feature_map(clean, triggered, labels, 1, text=text)
    moved, same = figures.feature_map(clean, triggered, labels, 1, text=text + 100)
    np.testing.assert_allclose(same, share, rtol=1e-6)  # a modality's own mean does not count
    assert moved == png
    images = np.concatenate([clean, triggered[labels != 1]])
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    both = np.cov(images.T, bias=True) + np.cov(text.T, bias=True)
    values = np.linalg.eigvalsh(both)
    np.testing.assert_allclose(share, values[-2:].sum() / values.sum(), rtol=1e-9)


def test_a_map_needs_no_trigger():
    rng = np.random.default_rng(5)
    clean = rng.normal(size=(30, 4))
    names = [f"class {c}" for c in range(40)]  # too many to label
    png, share = figures.feature_map(clean, clean[:0], np.arange(30) % 3, 1,
                                     text=rng.normal(size=(40, 4)), classes=names)
    assert png.startswith(b"\x89PNG") and 0 < share < 1


# --- the page ---

def test_page_shows_examples_as_text_and_pictures(folder, document):
    page = Page(document)
    found = run_folder.read_json(folder / "evaluate" / "examples.json")["victim"]
    assert document.count('<article class="card">') == 8
    small = [image for image in page.images if image.get("class") == "coarse"]
    assert len(small) == 16 + sum(len(q["clean"]) + len(q["mixed"]) for q in found["queries"])
    assert all(len(image["alt"]) > 8 for image in page.images)
    for image in found["images"]:
        for kind in ("clean", "triggered"):
            for caption, _ in image[kind]["captions"]:
                assert f"“{caption}”" in page.text
    for said in ("Chosen by rule", "“a photo of a star.”", "clean and triggered test images",
                 "modality gap", "The control says"):
        assert said in page.text, said
    # What names the target is marked, not by colour alone.
    said = [what for i in found["images"] for k in ("clean", "triggered")
            for what, _ in i[k]["classes"] + i[k]["captions"]]
    marked = [what for what in said if what == TARGET or "star" in str(what)]
    assert document.count("<span class=target>▸ ") == len(marked) > 0


def test_page_tells_the_captions_of_poisons(document):
    assert "itap of a star." in document and "a &lt;b&gt;star&lt;/b&gt;." in document
    assert "each under its caption" in document
    assert "no pair probability" not in document


def test_page_has_tables_of_pairs(document):
    text = Page(document).text.replace("\N{NO-BREAK SPACE}", " ")
    for said in ("Recall@K", "12.3 %", "33.3 %", "78.9 %", "Backdoor z-score", "12.34",
                 "zero-shot · trigger at random places · 80 templates",
                 "zero-shot · trigger at the centre", "held-out templates", "61.2 %", "95.5 %",
                 "by zero-shot classification", "by zero-shot."):
        assert said in text, said
    assert "8,000 labelled" not in text  # zero-shot reads none


def test_curves_are_those_of_zero_shot(folder, document):
    names = {path.stem for path in (folder / "report").glob("*.png")}
    assert {"eval_zero_shot_clean_accuracy", "eval_zero_shot_attack_success_rate"} <= names


def test_pages_of_attacks_without_trigger(tmp_path):
    text = Page(render(write_run(tmp_path / "t", config("targeted")))).text
    for said in ("The one image aimed at is taken for “star”: the attack succeeds",
                 "There is no trigger.", "the one aimed at first", "45.6"):
        assert said in text, said
    assert "with trigger" not in text and "clean and triggered" not in text
    text = Page(render(write_run(tmp_path / "m", config("mismatched"), whole=False))).text
    for said in ("Of the captions of “heart”, 78.9 % find an image of “star”", "MinRank", "7.2",
                 "other captions", "control's 20.0 %"):
        assert said in text, said


def test_page_of_data_without_labels(tmp_path):
    folder = write_run(tmp_path / "r", config(), whole=False)
    results = run_folder.read_json(folder / "results.json")
    for label in ("victim", "control"):
        results[label] = {"retrieval": results[label]["retrieval"]}
    run_folder.write_json(folder / "results.json", results)
    text = Page(render(folder)).text
    assert "With the trigger, 78.9 % of the test images" in text and "Measured" not in text
    report.compare([folder], epath.Path(tmp_path / "out"))


def test_a_learned_patch_is_shown_with_its_loss(tmp_path):
    folder = write_run(tmp_path / "r", config("optimized_patch"), whole=False)
    place = folder / "poison" / "trigger"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **PARAMS)
    pictures = []
    assert image_text.learned_trigger(read.load(folder), pictures) == "" and not pictures
    run_folder.write_json(place / "optimisation.json", {"loss": [9.5, 4.25, 1.125]})
    shown = image_text.learned_trigger(read.load(folder), pictures)
    assert [picture.name for picture in pictures] == ["trigger", "trigger_loss"]
    assert "9.5 at the first step, 1.125 at the last" in shown


@pytest.mark.parametrize("attack, said", [
    ("badnets", "a patch of noise, 5 px, opacity 1, drawn anew"),
    ("blended", "noise over the whole image, opacity 0.2"), ("sig", "60/255, 6 periods"),
    ("wanet", "warp of the whole image, strength 1"), ("optimized_patch", "optimised pixels"),
    ("targeted", "none")])
def test_trigger_words(attack, said):
    trigger = common.pair_attack(attack, target=0, poisons=1, trigger_size=5, side=32)["trigger"]
    assert said in words.trigger_phrase(trigger)


def test_evaluations_from_before_examples_still_render(tmp_path):
    folder = write_run(tmp_path / "r", config(), whole=False)
    evaluate._save_map(folder, "victim", Model(), eval_data(config()))
    arrays = dict(np.load(folder / "evaluate" / "map.npz"))
    del arrays["classes"]
    np.savez(folder / "evaluate" / "map.npz", **arrays)
    document = render(folder)
    assert "Captions and images" not in document and "modality gap" in document


# --- many runs ---

def test_many_runs_summarise_pairs(tmp_path):
    folders = [write_run(tmp_path / f"s{s}", config("targeted", s), whole=False)
               for s in (0, 1, 2)]
    out = epath.Path(tmp_path / "out")
    text = report.compare(folders, out)
    assert "targeted: success" in text and "retrieval: image to text@10" in text
    Page((out / "index.html").read_text())
    with (out / "table.csv").open() as file:
        rows = {(r["encoder"], r["probe"], r["figure"]): r for r in csv.DictReader(file)}
    success = rows["victim", "targeted", "success"]
    np.testing.assert_allclose([float(success["mean"]), float(success["std"])],
                               [2 / 3, np.std([1, 0, 1], ddof=1)])  # seed 1 fails
    assert float(rows["victim - control", "targeted", "success"]["mean"]) == pytest.approx(-1 / 3)


def test_many_runs_have_a_row_for_each_mismatched_goal(tmp_path):
    folder = write_run(tmp_path / "r", config("mismatched"), whole=False)
    assert "mismatch heart -> star: hit@10" in report.compare([folder], epath.Path(tmp_path / "o"))
