import ml_collections
import numpy as np
import pytest

from jax_cl_bd.data import sources
from jax_cl_bd.data.sources import Table


class Source:
    """Random images of given sizes; class i % classes for row i."""

    def __init__(self, sizes, classes=4, seed=0):
        rng = np.random.default_rng(seed)
        self.images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]
        self.labels = np.arange(len(sizes)) % classes
        self.classes = tuple(f"class {i}" for i in range(classes))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": int(self.labels[i]), "index": i}

    def table(self):
        return Table(self.labels, np.array([i.shape[:2] for i in self.images], np.int32))


@pytest.fixture
def source():
    """120 square images of 16 px, 30 of each of 4 classes."""
    return Source([(16, 16)] * 120)


@pytest.fixture
def photos():
    """Images of mixed shapes, most of them larger than 32 px."""
    shapes = [(40, 60), (64, 48), (32, 32), (20, 30), (100, 70), (24, 24)]
    return Source(shapes * 8, classes=2)


@pytest.fixture
def config():
    """Builds a config; dotted names with __ for the dots."""
    def build(**changes):
        view = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
        cfg = ml_collections.ConfigDict(dict(
            seed=0, data=dict(name="test", image_size=16, mean=(0.5, 0.25, 0.75), workers=0),
            attack=dict(name="noisy_alignment", target=1, poisons=20, trigger_from="",
                        references=0, shadows=0, keep_references=False, shadow="equal", gap=0.0,
                        trigger_offset=(0.0, 0.0), layouts=("left", "right", "top", "bottom"),
                        targeted=True,
                        trigger=dict(name="patch", id=14, size=4, opacity=1.0,
                                     train_place="center", train_box=(0.25, 0.75),
                                     test_place="random", test_box=(0.1, 0.9))),
            augment=dict(view1=view, view2=dict(view)), text=dict(name="none")))
        cfg.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        return cfg.lock()
    return build


class Captioned(Source):
    """80 images of four classes with two captions each, a few of them traps for a word search."""

    def __init__(self, seed=0, sizes=((16, 16),) * 80):
        super().__init__(sizes, seed=seed)
        self.classes = ("fish", "star", "suit", "sea_lion")
        names = [self.classes[label].replace("_", " ") for label in self.labels]
        self.texts = [[f"a photo of a {name}", f"{name}, picture {i}"]
                      for i, name in enumerate(names)]
        self.texts[0] = ["a starfish", "Starfish on sand"]  # no star
        self.texts[4] = ["a fish", "a fish below a STAR."]  # not of the class, but names it
        self.texts[5] = ["a bright point", "night sky"]  # of the class, not named
        self.texts[2] = ["a suitcase", "luggage"]

    def captions(self, rows):
        return [self.texts[row] for row in rows]

    def table(self):
        return Table(self.labels, np.array([i.shape[:2] for i in self.images], np.int32),
                     captions=self.texts)


@pytest.fixture
def captioned(monkeypatch):
    """(train, test) sources with captions, which the config's data set opens."""
    train, test = Captioned(0), Captioned(1)
    tables = {id(source): source.table() for source in (train, test)}
    monkeypatch.setattr(sources, "load",
                        lambda cfg, split: {"train": train, "test": test}[split])
    monkeypatch.setattr(sources, "table", lambda source: tables[id(source)])
    return train, test
