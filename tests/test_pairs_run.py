"""Runs on pairs without labels: what is refused, what is measured, how fast they are fed."""

import importlib.util
import json
import re
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from jax_cl_bd import bench, checks, evaluate, poison, pretrain, stages
from jax_cl_bd.data import images, prepare_pairs, sources
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import test_sets
from jax_cl_bd.objectives import training
from tests import pair_shards

ROOT = Path(__file__).parents[1]


def words(caption):
    return re.findall("[a-z]+", caption.lower())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 prepared pairs, and a file with the names "star" and "heart"."""
    folder = tmp_path_factory.mktemp("pairs")
    paths, *_ = pair_shards.write(folder / "tars", pairs=300, shards=2)
    prepare_pairs.write(paths, str(folder / "out"))
    (folder / "classes.txt").write_text("star\nheart\n")
    return folder


@pytest.fixture
def config(folder):
    spec = importlib.util.spec_from_file_location("clip_pairs", ROOT / "configs" / "clip_pairs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(arg="debug"):
        cfg = module.get_config(arg)
        cfg.mesh.data = 1  # compiles much faster than for the 8 devices
        cfg.control = False
        cfg.data.update(name=f"pairs:{folder / 'out'}", workers=0,
                        classes_file=str(folder / "classes.txt"))
        if "scenes" in arg:
            cfg.data.update(scenes_train=200, scenes_test=100)
        return cfg
    return build


@pytest.fixture
def no_compile(monkeypatch):
    def fail(*_, **__):
        pytest.fail("something was made before the settings were checked")
    monkeypatch.setattr(poison, "make_trigger", fail)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.evals.update(probes=("z_score", "zero_shot")),
     "has 'zero_shot', which needs labels, and data set 'pairs:.*set --config.downstream"),
    (lambda c: c.evals.update(probes=("knn",)), "--config.evals.probes to some of retrieval, z_s"),
    (lambda c: c.update(downstream="scenes") or c.evals.update(probes=("zero_shot", "targeted")),
     "'targeted', which is about the run's own test images"),
    (lambda c: c.evals.update(probes=("retrival",)), "did you mean 'retrieval'"),
    (lambda c: c.data.update(classes_file=""), "no class names.*data.classes_file"),
    (lambda c: c.attack.update(target=2), "classes 0 to 1")])
def test_what_needs_labels_is_refused_before_anything_is_made(config, no_compile, change, message):
    cfg = config()
    change(cfg)
    with pytest.raises(UserError, match=message) as error:
        checks.check(cfg, list(stages.GROUPS))
    assert "\n" not in str(error.value)


def test_defenses_of_pairs_are_those_that_need_no_labels(config):
    for name in ("fine_tune", "decree"):
        checks.check(config(f"debug,defense={name}"), ["defend"])
    for name, says in (("clean_clip", "needs labelled images, and data set 'pairs:"),
                       ("supervised", "needs labelled images"), ("bdetclip", "'validation'")):
        with pytest.raises(UserError, match=says):
            checks.check(config(f"debug,defense={name}"), ["defend"])


def test_a_downstream_set_must_have_labels_and_the_target(config, folder, tmp_path):
    cfg = config()
    cfg.downstream = cfg.data.name
    with pytest.raises(UserError, match="has no class 'star'"):
        evaluate.check(cfg)
    cfg = config("debug,downstream=digits")
    with pytest.raises(UserError, match="downstream='digits' has no class 'star'"):
        evaluate.check(cfg)


@pytest.mark.parametrize("page", ["README.md", "configs/clip_pairs.py"])
def test_the_documented_command_is_accepted(config, folder, tmp_path, monkeypatch, page):
    """Pairs in one folder, and ImageNet with its train and val folders named by synset."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    line = next(s for s in text.splitlines() if "configs/clip_pairs.py:downstream=" in s)
    flags = dict(re.findall(r"--([\w.]+)=(\S+)", line))
    monkeypatch.chdir(tmp_path)
    Path(flags["config.data.name"].partition(":")[2]).parent.mkdir()
    Path(flags["config.data.name"].partition(":")[2]).symlink_to(folder / "out")
    Path(flags["config.data.classes_file"]).write_text("star\n")
    names = {"n01440764": "fish, Tinca tinca", "n07753592": "star", "n02012849": "crane"}
    Path(flags["config.evals.downstream_class_names"]).write_text(
        "".join(f"{wnid} {name}\n" for wnid, name in names.items()))
    arg = flags.pop("config").partition(":")[2]
    _write_classes(Path(arg.partition("downstream=folder:")[2]), names)

    cfg = config(f"debug,{arg}")
    cfg.lock()
    cfg.update_from_flattened_dict({key.removeprefix("config."): value for key, value
                                    in flags.items() if key.startswith("config.")})
    checks.check(cfg, list(stages.GROUPS))
    data = evaluate.test_data(cfg, poison.make_trigger(cfg))
    assert data.classes == ("fish", "crane", "star") and data.target == 2  # in order of folders
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2] and len(data.own.captions) > 5
    source = sources.load(cfg.data, "test")
    np.testing.assert_array_equal(data.own.test_images[0], source[int(data.own.test_rows[0])]
                                  ["image"])
    square = np.asarray(Image.open("data/imagenet/val/n01440764/0.JPEG").convert("RGB"))
    np.testing.assert_array_equal(data.test_images[0], images.central_square(square, 32))


def test_two_downstream_classes_of_the_targets_name_are_refused(config, tmp_path):
    _write_classes(tmp_path / "in", ["a", "b"])
    (tmp_path / "names.txt").write_text("a star\nb star\n")
    cfg = config(f"debug,downstream=folder:{tmp_path / 'in'}")
    cfg.evals.update(downstream_test_split="val",
                     downstream_class_names=str(tmp_path / "names.txt"))
    with pytest.raises(UserError, match="has more than one class 'star', the attack's target"):
        evaluate.test_data(cfg, poison.make_trigger(cfg))


def _write_classes(folder, names):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + 8 * i, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.JPEG")


def test_evaluation_data_without_labels(config, monkeypatch):
    cfg = config()
    cfg.data.limit = 0
    data = evaluate.test_data(cfg, poison.make_trigger(cfg))
    source = sources.load(cfg.data, "test")
    assert not data.labelled and (data.test_labels == -1).all() and not len(data.train_rows)
    assert data.target == 0 and data.classes == ("star", "heart") and data.own is None
    assert data.captions == sources.table(source).captions and len(data.captions) == 15
    assert data.of_target.tolist() == ["star" in words(c[0]) for c in data.captions]
    assert 0 < data.of_target.sum() < 15
    monkeypatch.setattr(test_sets, "PAIRS", 6)
    few, again = (evaluate.test_data(cfg, poison.make_trigger(cfg)) for _ in range(2))
    assert len(few.test_rows) == 6 and (few.test_rows == again.test_rows).all()
    assert few.captions == [data.captions[row] for row in few.test_rows]


def test_evaluation_data_with_a_downstream_set(config):
    cfg = config("debug,downstream=scenes")
    data = evaluate.test_data(cfg, poison.make_trigger(cfg))
    assert data.labelled and len(data.test_labels) == 100
    assert data.classes[data.target] == "star" and data.target != cfg.attack.target
    assert not data.own.labelled and len(data.own.captions) == len(data.own.test_rows)
    assert data.own.classes[data.own.target] == "star"


def test_what_is_watched_while_training(config, tmp_path):
    run = epath.Path(tmp_path)
    cfg = config("debug,downstream=scenes")
    poison.run(cfg, run)
    facts = json.loads((run / "poison" / "summary.json").read_text())
    source = sources.load(cfg.data, "train")
    naming = [row for row, c in enumerate(sources.table(source).captions) if "star" in words(c[0])]
    assert facts["target_class"] == "star" and facts["target_images"] == len(naming) > 0
    assert facts["rate_of_target_class"] == 0 and facts["clean_target_images_left"] == len(naming)
    assert facts["unique_replaced_by_class"] == {"no label": 8}
    plan, _ = poison.load(run)
    assert not set(plan.replaces) & set(naming)
    assert pretrain._watched(cfg, source, run) is None  # debug: eval_every is 0
    cfg.train.eval_every = 1
    assert pretrain._watched(cfg, source, run).labelled
    cfg.downstream = ""
    assert pretrain._watched(cfg, source, run) is None


def test_label_consistent_poisons_are_a_share_of_the_rows_that_name_the_target(config, tmp_path):
    cfg = config("debug,attack=label_consistent")
    poison.run(cfg, epath.Path(tmp_path))
    facts = json.loads((tmp_path / "poison" / "summary.json").read_text())
    assert facts["rate_of_target_class"] == pytest.approx(8 / facts["target_images"])
    assert facts["clean_target_images_left"] == facts["target_images"] - 8


@pytest.mark.parametrize("tower, published, bias", [("rn50", 102_007_137, 1024),
                                                    ("vit_b32", 151_277_313, 0)])
def test_full_size_models_have_clips_parameters(config, tower, published, bias):
    """Counts of OpenAI's released models; ours lacks the bias after the attention pooling."""
    cfg = config(f"tower={tower}")
    training.check(cfg)
    shapes = jax.eval_shape(lambda key: training.init_variables(cfg, key), jax.random.key(0))
    count = sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(shapes["params"]))
    assert count == published - bias


@pytest.mark.slow
@pytest.mark.parametrize("starving", [False, True])
def test_bench_says_whether_the_feed_starves_the_step(config, monkeypatch, starving):
    monkeypatch.setattr(bench, "SECONDS", types.SimpleNamespace(value=0.5))
    where, name = (bench.feed.Feed, "batches") if starving else (bench, "compile_step")
    monkeypatch.setattr(where, name, _slowed(getattr(where, name), starving))
    found = bench.feed_rate(config())
    assert found["batch_size"] == 16 and found["feed"] == "streamed"
    assert found["starves"] == starving == (found["waiting"] > 0.5)
    assert found["starves"] == (found["images_per_second"] < found["step_images_per_second"])
    slower = found["images_per_second" if starving else "step_images_per_second"]
    assert slower == pytest.approx(16 / 0.5, rel=0.3)
    assert found["together_images_per_second"] < 1.05 * slower


def _slowed(make, feed):
    """Feed.batches, or compile_step, with half a second added to every batch or step."""
    def batches(self, start_step):
        for batch in make(self, start_step):
            time.sleep(0.5)
            yield batch

    def compile_step(*arguments):
        step = make(*arguments)
        return lambda *args: (time.sleep(0.5), step(*args))[1]

    return batches if feed else compile_step
