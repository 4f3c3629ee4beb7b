"""Examples for the report: test images, what an image-text model says of them, what it retrieves.

Chosen by rule, not by looks: images of other classes than the target, evenly spread over the test
images in the order of their classes; an attack on one image has that image first. Queries name the
target class, then what the attack aims at beside it, then evenly spread classes; data without
labels, whose one known class is the target, is asked for captions of the example images instead.
"""

import numpy as np

from jax_cl_bd.data import templates
from jax_cl_bd.evals import retrieval, zero_shot

IMAGES, BEST, QUERIES, NEAREST = 8, 3, 3, 5
QUERY = "a photo of a {}."


def choose(cfg, data) -> np.ndarray:
    """Places of the example images in the test set, int64 [up to 8]."""
    others = np.flatnonzero(~data.of_target)
    others = others[np.argsort(data.test_labels[others], kind="stable")]
    spread = others[np.linspace(0, len(others) - 1, min(IMAGES, len(others))).astype(int)]
    own = _aimed_at(cfg, data)
    return np.concatenate([own, spread[~np.isin(spread, own)]])[:IMAGES]


def queried(cfg, data) -> list[int]:
    """The classes that the text queries name, the target first; up to 3."""
    names, chosen = [str(name) for name in data.classes], [data.target]
    aims = [names.index(str(first)) for first, _ in cfg.attack.get("goals", ()) if first in names]
    chosen += [c for c in dict.fromkeys(aims) if c != data.target]
    rest = [c for c in range(len(names)) if c not in chosen]
    count = min(max(QUERIES - len(chosen), 0), len(rest))
    return chosen[:QUERIES] + [rest[(i + 1) * len(rest) // (count + 1)] for i in range(count)]


def find(cfg, encoder, data) -> dict:
    """What the encoder says and retrieves, ready for JSON.

    Returns:
        {"classes", "target", "aimed" (whether the attack is on one image, which is then the first),
        "images": [{"at", "row", "label", "clean", "triggered"}], "queries": [{"text", "clean",
        "mixed"}]}. "at" is a place in the test set. "clean" and
        "triggered" of an image have "classes" and "captions", the three of largest cosine as
        [class or text, cosine]; those of a query are its five nearest images {"at", "label",
        "triggered", "cosine"}, "mixed" where the gallery also has every triggered image of a class
        other than the target. Without a trigger there is neither "triggered" nor "mixed".
    """
    places, several = choose(cfg, data), len(data.classes) > 1
    head = zero_shot.class_weights(encoder, data.classes, templates.PROMPTS)
    z = {"clean": encoder.project(data.features(encoder, "test"))}
    if data.placements:
        z["triggered"] = encoder.project(
            data.features(encoder, f"{data.placements[0]}/triggered"))
    texts, z_text = [], None
    captions = (data.own or data).captions  # those of the run's own test images
    if captions is not None:
        texts = retrieval.gallery(captions)[0]
        z_text = encoder.text(texts)

    images = []
    for at in places:
        image = {"at": int(at), "row": int(data.test_rows[at]), "label": _label(data, at)}
        for kind, rows in z.items():
            scores = head @ rows[at] if several else head[:0] @ rows[at]
            image[kind] = {"classes": _best(scores, range(len(head))),
                           "captions": _best(z_text @ rows[at], texts) if texts else []}
        images.append(image)
    return {"classes": [str(name) for name in data.classes], "target": int(data.target),
            "aimed": len(_aimed_at(cfg, data)) > 0, "images": images,
            "queries": _queries(cfg, encoder, data, z, places)}


def pixels(found: dict, data) -> dict[str, np.ndarray]:
    """The images that `find` names: "clean" and "triggered" uint8 [n, S, S, 3], and where each is
    in the test set, "clean_at" and "triggered_at" int64 [n]."""
    wanted = {"clean": set(), "triggered": set()}
    for image in found["images"]:
        for kind in wanted.keys() & image.keys():
            wanted[kind].add(image["at"])
    for query in found["queries"]:
        for image in query["clean"] + query.get("mixed", []):
            wanted["triggered" if image["triggered"] else "clean"].add(image["at"])
    sets = {"clean": "test"}
    if data.placements:
        sets["triggered"] = f"{data.placements[0]}/triggered"
    out = {}
    for kind, name in sets.items():
        places = np.array(sorted(wanted[kind]), np.int64)
        out |= {f"{kind}_at": places, kind: _pick(data.blocks[name](), places)}
    return out


def _aimed_at(cfg, data):
    """The place of the one image that an attack is on, if it is: int64 [0 or 1]."""
    # Of mismatched pairs only those of kind I are about one image.
    if "image" in cfg.attack and cfg.attack.get("kind", "I") == "I" and not cfg.downstream:
        return np.flatnonzero(data.test_rows == cfg.attack.image)
    return np.zeros(0, np.int64)


def _label(data, at):
    """The class of a test image; without labels, the target's if its captions say so, else -1."""
    return int(data.target if data.of_target[at] else data.test_labels[at])


def _best(scores, names):
    return [[names[i], round(float(scores[i]), 4)]
            for i in np.argsort(-scores, kind="stable")[:BEST]]


def _queries(cfg, encoder, data, z, places):
    texts = [templates.fill(QUERY, str(data.classes[c])) for c in queried(cfg, data)]
    if data.captions is not None:
        texts += [data.captions[at][0] for at in places if data.captions[at]]
    texts = texts[:QUERIES]
    clean, others = np.arange(len(data.test_labels)), np.zeros(0, int)
    gallery = z["clean"]
    if "triggered" in z:
        others = np.flatnonzero(~data.of_target)
        gallery = np.concatenate([z["clean"], z["triggered"][others]])
    at = np.concatenate([clean, others])

    def nearest(scores):
        return [{"at": int(at[i]), "label": _label(data, at[i]),
                 "triggered": bool(i >= len(clean)), "cosine": round(float(scores[i]), 4)}
                for i in np.argsort(-scores, kind="stable")[:NEAREST]]

    out = []
    for text, scores in zip(texts, encoder.text(texts) @ gallery.T):
        query = {"text": text, "clean": nearest(scores[:len(clean)])}
        out.append(query | ({"mixed": nearest(scores)} if len(others) else {}))
    return out


def _pick(blocks, places):
    """Rows of a set that is given block by block; no more than one block is held."""
    picked, start = [], 0
    for block in blocks:
        here = places[(places >= start) & (places < start + len(block))] - start
        picked.append(block[here])
        start += len(block)
        empty = block[:0]
    return np.concatenate([*picked, empty])
