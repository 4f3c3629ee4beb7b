"""Zero-shot heads, rates at k and retrieval on embeddings made by hand."""

import ml_collections
import numpy as np
import pytest

from jax_cl_bd.data import templates
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import mismatch, retrieval, targeted, z_score, zero_shot

CLASSES = ("red", "green", "blue", "grey")


class Hand:
    """Embeds captions by the class they name; features are embeddings already."""
    logit_scale = 10.0

    def __init__(self, classes=CLASSES):
        self.classes = classes

    def text(self, captions):
        z = np.zeros((len(captions), len(self.classes)), np.float32)
        for row, caption in zip(z, captions):
            for j, name in enumerate(self.classes):
                row[j] = name in caption.replace(".", " ").replace("!", " ").split()
        return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)

    def project(self, features):
        return np.asarray(features, np.float32)


class Data:
    classes, target, placements = CLASSES, 0, ("random",)
    variant_names = ("triggered",)
    test_labels = np.array([0, 1, 2, 3])
    train_labels, of_target, own, other = test_labels, test_labels == target, None, None
    test_rows = np.array([10, 11, 12, 13])
    captions = [["a red one"], ["a green one", "a photo of green"], ["blue"],
                ["grey", "a grey one"]]
    sets = {"test": np.array([[.9, .1, 0, 0], [.1, .9, 0, 0], [0, .6, .5, .1], [0, 0, .2, .9]]),
            # Of the three others one goes to the target, one has it second, one last.
            "random/triggered": np.array([[.9, 0, 0, 0], [.9, .5, 0, 0], [.4, .3, .5, 0],
                                          [.1, .2, .3, .9]])}

    def features(self, encoder, name):
        return self.sets[name]


def test_weights_are_the_mean_of_unit_prompts_at_unit_length():
    class Noisy(Hand):
        def text(self, captions):
            rng = np.random.default_rng(len(captions))
            z = rng.normal(size=(len(captions), 5)).astype(np.float32)
            self.seen = captions
            return z / np.linalg.norm(z, axis=1, keepdims=True)

    encoder = Noisy()
    head = zero_shot.class_weights(encoder, CLASSES, templates.PROMPTS)
    z = np.random.default_rng(320).normal(size=(320, 5)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    for c, name in enumerate(CLASSES):
        mean = np.mean([z[i] for i, text in enumerate(encoder.seen)
                        if text in {t.format(name) for t in templates.PROMPTS}], axis=0)
        np.testing.assert_allclose(head[c], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-7)


def test_rates_by_hand():
    rows = zero_shot.run(None, Hand(), Data())
    row = rows["zero_shot"]
    assert row["clean_accuracy"] == 0.75  # the blue image goes to green
    assert row["attack_success_rate"] == 1 / 3
    assert row["top"] == {"3": 1.0}  # 5 and 10 say nothing of four classes
    assert row["attack_success_rate_at"] == {"3": 2 / 3}
    assert set(rows) == {"zero_shot", "zero_shot:held_out"}
    assert rows["zero_shot:held_out"]["clean_accuracy"] == 0.75


def test_another_split_has_a_row_of_its_own():
    class Shifted(Data):
        test_labels = np.array([3, 2, 1, 0])

    class Both(Data):
        other = Shifted()

    cfg = ml_collections.ConfigDict({"evals": {"other_test_split": "shifted"}})
    rows = zero_shot.run(cfg, Hand(), Both())
    assert set(rows) == {"zero_shot", "zero_shot:held_out", "zero_shot:shifted"}
    assert rows["zero_shot"] == zero_shot.run(None, Hand(), Data())["zero_shot"]
    row = rows["zero_shot:shifted"]
    assert row["clean_accuracy"] == 0.25 and row["n"]["attack_success_rate"] == 3
    assert row["attack_success_rate"] == 2 / 3  # of the first three images
    assert row["attack_success_rate_at"] == {"3": 1.0}
    assert row["protocol"]["split"] == "shifted" and row["protocol"]["placement"] == "random"


class Collapsed(Hand):
    """Embeds everything alike."""

    def text(self, captions):
        return np.full((len(captions), 4), 0.5, np.float32)

    def project(self, features):
        return np.full((len(features), 4), 0.5, np.float32)


def test_ties_count_against_the_attack():
    row = zero_shot.run(None, Collapsed(), Data())["zero_shot"]
    assert row["attack_success_rate_at"] == {"3": 0.0} and row["top"] == {"3": 0.0}
    cfg = ml_collections.ConfigDict(
        {"attack": {"name": "mismatched_pairs", "kind": "II", "goals": (("blue", "green"),)}})
    found = mismatch.run(cfg, Collapsed(), Data())["mismatch"]["blue -> green"]
    assert found["hit"] == {"1": 0.0, "5": 1.0, "10": 1.0} and found["min_rank"] == 3


def test_class_embeddings_are_made_once_for_an_encoder():
    class Counting(Hand):
        calls = 0

        def text(self, captions):
            self.calls += 1
            return super().text(captions)

    encoder, other = Counting(), Counting()
    first = zero_shot.class_weights(encoder, CLASSES, templates.PROMPTS)
    zero_shot.run(None, encoder, Data())
    assert zero_shot.class_weights(encoder, list(CLASSES), templates.PROMPTS) is first
    assert encoder.calls == 2  # the 80 templates and the held-out ones
    assert len(zero_shot.class_weights(encoder, CLASSES[:2], templates.PROMPTS)) == 2
    zero_shot.class_weights(other, CLASSES, templates.PROMPTS)
    assert encoder.calls == 3 and other.calls == 1
    known = id(encoder)
    del encoder
    assert known not in zero_shot._heads  # nor does it keep an encoder in memory


def test_held_out_prompts_are_asked_of_one_placement():
    class Two(Data):
        placements, asked = ("random", "center"), []

        def features(self, encoder, name):
            self.asked.append(name)
            return self.sets[name.replace("center", "random")]

    data = Two()
    rows = zero_shot.run(None, Hand(), data)
    assert set(rows) == {"zero_shot", "zero_shot:center", "zero_shot:held_out"}
    assert rows["zero_shot:held_out"]["protocol"]["placement"] == "random"
    assert data.placements == ("random", "center")
    assert data.asked.count("center/triggered") == 2  # its row, and its rates at k


def test_held_out_templates_are_others():
    assert len(templates.PROMPTS) == len(set(templates.PROMPTS)) == 80
    assert not set(templates.HELD_OUT) & set(templates.PROMPTS)


def test_retrieval_by_hand():
    found = retrieval.run(None, Hand(), Data())["retrieval"]
    assert found["images"] == 4 and found["captions"] == 6
    # Image to text: the blue image finds a green caption first.
    assert found["image_to_text"]["1"] == 0.75
    assert found["text_to_image"]["1"] == 1.0
    assert found["target_hits"]["1"] == 1 / 3 and found["clean_target_hits"]["1"] == 0


def test_a_shared_caption_belongs_to_all_its_images():
    texts, owners = retrieval.gallery([["a", "b"], ["a"], ["c"]])
    assert texts == ["a", "b", "c"]
    np.testing.assert_array_equal(owners, [[1, 1, 0], [1, 0, 0], [0, 0, 1]])


def test_ties_count_against_the_query():
    right = np.array([[True, False, False]])
    assert retrieval.recall(np.array([[1.0, 1.0, 0.0]]), right)["1"] == 0
    assert retrieval.recall(np.array([[1.0, 0.9, 0.0]]), right)["1"] == 1


def test_recall_matches_sorting():
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(40, 60)), rng.random((40, 60)) < 0.05
    for k, rate in retrieval.recall(scores, right).items():
        order = np.argsort(-scores, axis=1)[:, :int(k)]
        assert rate == np.mean(np.take_along_axis(right, order, 1).any(1))


def test_mismatch_ranks_by_hand():
    scores = np.array([[.9, .5, .1, .2], [.1, .2, .3, .9], [.4, .5, .6, .7]])
    found = mismatch.ranks(scores, np.array([False, True, False, True]))
    assert found["hit"] == {"1": 2 / 3, "5": 1.0, "10": 1.0}  # ranks 1, 0, 0
    assert found["min_rank"] == pytest.approx(1 / 3)


def test_every_text_of_a_is_asked_however_often_it_occurs():
    class Twice(Data):
        captions = [["red"], ["green"], ["a blue one", "a blue one", "blue"], ["grey"] * 3]

    cfg = ml_collections.ConfigDict(
        {"attack": {"name": "mismatched_pairs", "kind": "II", "goals": (("blue", "green"),)}})
    found = mismatch.run(cfg, Hand(), Twice())["mismatch"]["blue -> green"]
    assert found["queries"] == found["baseline"]["queries"] == 3


def test_mismatch_of_data_without_labels():
    class Unlabelled(Data):
        test_labels = np.full(4, -1)
        captions = [["a blue one, green as well"], ["green"], ["blue"], ["grey"]]

    cfg = ml_collections.ConfigDict(
        {"attack": {"name": "mismatched_pairs", "kind": "II", "goals": (("blue", "green"),)}})
    mismatch.check(cfg, Unlabelled())
    found = mismatch.run(cfg, Hand(), Unlabelled())["mismatch"]["blue -> green"]
    assert found["queries"] == 1 and found["baseline"]["queries"] == 1  # "blue"; "grey"
    assert found["min_rank"] == 2  # images 0 and 1 are wanted; 2 and 3 are bluer


@pytest.mark.parametrize("change, message", [
    (dict(goals=(("pink", "green"),), name="none"), "'mismatch', which measures the attack"),
    (dict(kind="I", image=9), "image 9 is not among the 4 test images that are searched"),
    (dict(goals=(("blue", "red"),)), "class 'red' is not among"),
    (dict(goals=(("red", "blue"),)), "no test image of class 'red' has a caption")])
def test_what_mismatch_cannot_measure_is_refused(change, message):
    class NoRed(Data):
        test_labels = np.array([1, 1, 2, 3])

    cfg = ml_collections.ConfigDict({"attack": {
        "name": "mismatched_pairs", "kind": "II", "image": 0, "goals": (("blue", "green"),),
        **change}})
    with pytest.raises(UserError, match=message):
        mismatch.check(cfg, NoRed())


def test_mismatch_asks_the_captions_of_a_for_images_of_b():
    cfg = ml_collections.ConfigDict(
        {"attack": {"name": "mismatched_pairs", "kind": "II", "goals": (("blue", "green"),)}})
    found = mismatch.run(cfg, Hand(), Data())["mismatch"]["blue -> green"]
    assert found["queries"] == 1 and found["min_rank"] == 3  # behind blue, grey and a tie
    assert found["baseline"]["queries"] == 1
    cfg.attack.kind, cfg.attack.image = "I", 12
    assert mismatch.run(cfg, Hand(), Data())["mismatch"]["blue -> green"]["min_rank"] == 0


def test_targeted_success_is_the_label_of_one_image():
    cfg = ml_collections.ConfigDict({"attack": {"name": "targeted_poisoning", "image": 12}})
    data = Data()
    data.target = 1
    found = targeted.run(cfg, Hand(), data)["targeted"]
    assert found["success"] and found["predicted"] == 1 and found["label"] == 2
    weights = np.exp(10 * np.array([0, .6, .5, .1]))
    assert found["target_probability"] == pytest.approx(weights[1] / weights.sum(), rel=1e-5)
    cfg.attack.image = 13
    assert not targeted.run(cfg, Hand(), data)["targeted"]["success"]


def test_z_score_matches_its_definition():
    rng = np.random.default_rng(0)
    clean, bad = rng.normal(size=(2, 30, 6))
    clean /= np.linalg.norm(clean, axis=1, keepdims=True)
    bad = bad + 2
    bad /= np.linalg.norm(bad, axis=1, keepdims=True)
    gram = [float(u @ v) for u in clean for v in clean]
    rise = np.mean([float(u @ v) for u in bad for v in bad]) - np.mean(gram)
    found = z_score.score(clean, bad)
    assert found["z"] == pytest.approx(rise / np.var(gram))
    assert found["z_by_deviation"] == pytest.approx(rise / np.std(gram))
    assert z_score.score(clean, clean)["z"] == 0
