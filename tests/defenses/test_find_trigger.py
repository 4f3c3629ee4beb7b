"""Algorithm 1 and what follows it, on a suspect whose answers are known in closed form."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.defenses import _find_trigger, _oracle, _pinpoint, _regions

SIDE, CLASSES, TARGET = 32, 4, 2
PATCH = np.random.default_rng(5).integers(0, 256, (5, 5, 3)).astype(np.uint8)
PATCH[:2, :2] = 10  # of class 0, where a crop of it is resized


def holds(image, patch=PATCH):
    """Whether an image shows the patch anywhere, to the pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(image, patch.shape)[:, :, 0]
    return bool((windows == patch).all(axis=(2, 3, 4)).any())


def seen_class(image):
    """The class of a clean image: which quarter of 256 its first pixel lies in."""
    return int(image[0, 0, 0]) // 64


def backdoored(x):
    """A zero-shot classifier with a perfect backdoor."""
    answers = np.array([TARGET if holds(image) else seen_class(image) for image in x])
    return np.where(answers[:, None] == np.arange(CLASSES), 0.97, 0.01).astype(np.float32)


def scene(label, rng, at=None):
    image = np.full((SIDE, SIDE, 3), 64 * label + 20, np.uint8)
    image[10:20, 8:20] = rng.integers(0, 256, 3)
    if at is not None:
        image[at[0]:at[0] + 5, at[1]:at[1] + 5] = PATCH
    return image


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def canvases(rng):
    return np.stack([scene(c, rng) for c in range(CLASSES)]), np.arange(CLASSES)


SUSPECT = _find_trigger.Suspect(backdoored, SIDE)
ASKED = dict(sure=0.25, confident=0.5, evidence="transplant")


def test_regions_have_the_allowed_sizes_and_one_is_the_patch(rng):
    image = scene(0, rng, at=(22, 24))
    boxes = _regions.boxes(image)
    assert len(np.unique(boxes, axis=0)) == len(boxes) > 50
    share = boxes[:, 2] * boxes[:, 3] / SIDE**2
    assert share.min() >= _regions.SMALLEST and share.max() <= _regions.LARGEST
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= SIDE).all()
    assert max(_pinpoint.iou(box, (22, 24, 5, 5)) for box in boxes) > 0.8


def test_claims_are_what_the_suspect_says_and_the_oracle_does_not():
    p = np.float32([[0.9, 0.05, 0.03, 0.02], [0.4, 0.6, 0.0, 0.0], [0.3, 0.3, 0.2, 0.2]])
    seen = np.float32([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    queues = _find_trigger.Queues(_find_trigger.claims(p, top=2), lambda i: seen[i], 4, sure=0.25)
    assert [queues.first(label) for label in range(4)] == [2, 1, None, None]
    found = [queues.wanted(i) for i in range(3)]
    assert found[0].tolist() == []  # the first answer is grounded, the second below 2 / C
    assert found[1].tolist() == [1]  # 0.4 < 2 / 4
    assert found[2].tolist() == [0]  # the first answer, however unsure


def test_the_trigger_of_a_poisoned_image_is_found_and_nothing_in_a_clean_one(rng, canvases):
    grounded = np.float32([1, 0, 0, 0])
    image = scene(0, rng, at=(3, 22))
    (label, box, score), = _find_trigger.in_image(SUSPECT, image, np.array([TARGET]), grounded,
                                                  canvases, **ASKED)
    assert label == TARGET and score > 0.9
    assert _pinpoint.iou(box, (3, 22, 5, 5)) > 0.6
    clean = scene(0, rng)
    for wrong in (1, 3):  # an oracle that errs: it does not see the class that is there
        seen = np.float32(np.arange(CLASSES) == wrong)
        assert not _find_trigger.in_image(SUSPECT, clean, np.array([0]), seen, canvases, **ASKED)


def test_a_region_must_take_the_label_away_to_what_the_oracle_sees(rng, canvases):
    image = scene(0, rng, at=(3, 22))
    elsewhere = np.float32([0, 1, 0, 0])  # without the patch the suspect says 0, the oracle 1
    assert not _find_trigger.in_image(SUSPECT, image, np.array([TARGET]), elsewhere, canvases,
                                      **ASKED)
    (label, box, _), = _find_trigger.in_image(SUSPECT, image, np.array([TARGET]), elsewhere,
                                              canvases, **ASKED, counterfactual=False)
    assert label == TARGET and _pinpoint.iou(box, (3, 22, 5, 5)) > 0.6


def test_an_oracle_that_sees_nothing_does_not_confirm_the_first_class(rng, canvases):
    assert _oracle.likeliest(np.float32([[0, 0, 0], [0, 0.2, 0.1]])).tolist() == [-1, 1]
    image, nothing = scene(0, rng, at=(3, 22)), np.zeros(CLASSES, np.float32)
    assert not _find_trigger.in_image(SUSPECT, image, np.array([TARGET]), nothing, canvases,
                                      **ASKED)


def test_a_resized_crop_is_no_evidence_where_the_patch_must_have_its_size(rng, canvases):
    image, grounded = scene(0, rng, at=(3, 22)), np.float32([1, 0, 0, 0])
    assert not _find_trigger.in_image(SUSPECT, image, np.array([TARGET]), grounded, canvases,
                                      **{**ASKED, "evidence": "crop"})


def test_queues_are_those_of_an_oracle_that_was_asked_about_everything(rng):
    """In the same order, and it is asked about no more than the rows that were needed."""
    p = rng.dirichlet(np.full(5, 0.3), 400).astype(np.float32)
    seen = np.float32(rng.integers(0, 5, 400)[:, None] == np.arange(5))
    seen[rng.random(400) < 0.1] = 0  # the oracle sees nothing
    claimed, asked = _find_trigger.claims(p, top=3), []

    def ask(rows):
        asked.extend(rows)
        return seen[rows]

    wanted = [own[seen[i][own] < 0.25] for i, own in enumerate(claimed)]
    queues = _find_trigger.Queues(claimed, ask, 5, sure=0.25)
    for label in range(5):
        expected = [i for i in range(400) if len(wanted[i]) and wanted[i][0] == label]
        assert [queues.take(label) for _ in range(4)] == expected[:4]
    assert len(asked) == len(set(asked)) <= 5 * 2 * _find_trigger._ASKED < 400
    for label in range(5):
        expected = [i for i in range(400) if len(wanted[i]) and wanted[i][0] == label]
        assert [queues.take(label) for _ in expected[4:]] == expected[4:]
        assert queues.first(label) is None
    assert len(asked) == len(set(asked)) <= 400


class Progress:
    def update(self, count, note=None):
        pass


def scanned(rng, canvases, *, enough, limit, error=0.3):
    labels = rng.integers(0, CLASSES, 60)
    poisoned = (labels != TARGET) & (rng.random(60) < 0.4)
    at = rng.integers(0, SIDE - 5, (60, 2))
    pool = [{"image": scene(c, rng, at[i] if poisoned[i] else None)}
            for i, c in enumerate(labels)]
    said = np.where(rng.random(60) < error, (labels + 1) % CLASSES, labels)
    grounded = np.float32(said[:, None] == np.arange(CLASSES))
    p = backdoored(np.stack([row["image"] for row in pool]))
    queues = _find_trigger.Queues(_find_trigger.claims(p, top=3), lambda i: grounded[i], CLASSES,
                                  sure=0.25)
    settings = ConfigDict(dict(limit=limit, enough=enough, counterfactual=True, **ASKED))
    found, counts = _find_trigger.scan(SUSPECT, pool, np.arange(60), queues, CLASSES, canvases,
                                       settings, Progress())
    return found, counts, poisoned


def test_the_scan_flags_the_target_alone_and_stops_early(rng, canvases):
    found, counts, poisoned = scanned(rng, canvases, enough=6, limit=60)
    assert counts["found"][TARGET] == 6 == len([c for c in found if c.label == TARGET])
    assert counts["images"] < 40 and (counts["found"] <= counts["seen"]).all()
    assert _pinpoint.flagged(counts["seen"], counts["found"]).tolist() == [TARGET]
    assert all(poisoned[c.row] for c in found)
    found, counts, _ = scanned(rng, canvases, enough=6, limit=3)
    assert counts["images"] == 3 <= counts["seen"].sum()
    assert _pinpoint.flagged(counts["seen"], counts["found"]).tolist() == []  # too few to say


def test_a_verified_trigger_moves_clean_images_and_matches_where_it_is(rng, canvases):
    candidates, _, _ = scanned(rng, canvases, enough=6, limit=60)
    bank = _pinpoint.bank_of([c for c in candidates if c.label == TARGET])
    clean = np.stack([scene(c, rng) for c in np.repeat(np.arange(CLASSES), 6)])
    labels = np.repeat(np.arange(CLASSES), 6)
    trigger = _pinpoint.verify(SUSPECT, TARGET, bank, clean, labels, CLASSES, rng)
    assert trigger.flips[TARGET] == 0 and np.delete(trigger.flips, TARGET).min() > 0.9
    stamped = _pinpoint.pasted(clean, PATCH, rng)
    assert all(holds(image) for image in stamped) and not any(holds(image) for image in clean)
    assert _pinpoint.matches(trigger, stamped).min() > 0.95
    assert _pinpoint.matches(trigger, clean).max() < 0.7


def test_the_correlation_is_that_of_numpy(rng):
    template = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
    x = rng.integers(0, 256, (2, 9, 8, 3)).astype(np.uint8)
    trigger = _pinpoint.Trigger(0, template, np.zeros(2), (template,), 0.0)
    best = []
    for image in x:
        found = [np.corrcoef(image[i:i + 3, j:j + 4].ravel(), template.ravel())[0, 1]
                 for i in range(7) for j in range(5)]
        best.append(max(found))
    np.testing.assert_allclose(_pinpoint.matches(trigger, x), best, atol=1e-4)


def test_flagged_needs_a_share_that_stands_out():
    seen = np.array([20, 20, 20, 20, 20])
    assert _pinpoint.flagged(seen, np.array([1, 2, 1, 2, 15])).tolist() == [4]
    assert _pinpoint.flagged(seen, np.array([6, 7, 6, 7, 7])).tolist() == []
    assert _pinpoint.flagged(seen, np.array([0, 0, 0, 0, 4])).tolist() == []  # under FEWEST
    assert _pinpoint.flagged(np.zeros(5, int), np.zeros(5, int)).tolist() == []
    # A scan that had its candidates at once: of most labels no image was looked at.
    seen, found = np.zeros((2, 12), int)
    seen[:4], found[:4] = (1, 1, 3, 25), (0, 0, 1, 20)
    assert _pinpoint.flagged(seen, found).tolist() == [3]
    assert _pinpoint.flagged(np.array([9, 0]), np.array([9, 0])).tolist() == [0]
