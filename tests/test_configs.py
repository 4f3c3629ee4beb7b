"""Every experiment file: its settings are those on record, and it runs in debug mode."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from etils import epath

from jax_cl_bd import checks, load_encoder, run_folder, stages
from jax_cl_bd.data import prepare_pairs
from tests import pair_shards, tiny_cifar10

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py")
               if p.stem not in ("common", "defenses"))
# Methods are run once each, not the product: two arguments a run.
VARIANTS = {
    "quickstart": ["", "attack=ssl_backdoor,objective=moco",
                   "attack=oracle_poisoning,objective=byol,defense=retrain",
                   "attack=none,objective=simsiam,defense=none", "defense=decree",
                   "defense=density"],
    "clip_cifar10": ["", "reduced,optimized_patch", "reduced,defense=oracle_finetune"],
    "clip_scenes": ["defense=fine_tune", "defense=oracle_finetune", "defense=clean_clip",
                    "defense=norm_only", "defense=oracle_filter", "defense=density",
                    "defense=cosine_filter", "defense=decree", "defense=par",
                    "defense=supervised", "defense=bdetclip", "defense=abd",
                    "defense=invertune",
                    "defense=cleaner_clip", "defense=ubt",
                    "blended,objective=siglip", "optimized_patch",
                    "adaptive=all", "adaptive=several",
                    "mismatched,defense=retrain", "targeted", "tower=clip_resnet",
                    "tower=vit", "tower=vit,objective=siglip",
                    "objective=roclip,defense=clean_clip", "objective=safeclip,defense=fine_tune"],
    "clip_pairs": ["", "attack=blended,tower=vit_b32,objective=siglip,downstream=scenes",
                   "attack=optimized_patch,in_modality", "defense=clean_clip",
                   "defense=fine_tune"],
    "layout_law": ["case=free"],
    "cifar10": ["", "reduced,objective=moco,defense=distill", "objective=byol",
                "objective=simsiam", "reduced,objective=byol"],
    "vet_encoder": ["data=digits,split=train"],
    "vet_dataset": ["", "objective=simclr"],
    "imagenet100": ["", "attack=noisy_alignment,objective=byol", "objective=simsiam",
                    "defense=distill", "defense=retrain"],
}


def config(name, arg):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def flat(cfg):
    groups = tuple(sorted(cfg))
    settings = run_folder.settings_of(cfg, groups)
    return "".join(f"{k} = {v!r}\n" for k, v in sorted(settings.items()))


def test_every_file_is_listed():
    assert sorted(VARIANTS) == FILES


@pytest.mark.parametrize("name, arg", [(n, a) for n in VARIANTS for a in VARIANTS[n]])
def test_settings_are_those_on_record(name, arg):
    path = GOLDEN / f"{name}{'-' + arg.replace(',', '-').replace('=', '_') if arg else ''}.txt"
    text = flat(config(name, arg))
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"a default changed; UPDATE_GOLDEN=1 rewrites {path.name}"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("debug", ["", "debug,"])
def test_a_length_is_in_steps_or_in_epochs(name, debug):
    for arg in VARIANTS[name]:
        train = config(name, debug + arg).train
        assert not (train.steps and train.epochs), arg


@pytest.mark.parametrize("arg, message", [
    ("adaptive=many", r"unknown adaptive 'many' \(allowed: all, beside, several, small"),
    ("adaptive=small,fresh", "not of fresh"), ("adaptive=small,wanet", "not of wanet")])
def test_arguments_that_do_not_fit_are_refused(arg, message):
    with pytest.raises(ValueError, match=message):
        config("clip_scenes", arg)


def debug_run(cfg, folder):
    cfg.mesh.data = 1  # compiles much faster than for the 8 devices
    checks.check(cfg, list(stages.GROUPS))
    stages.run(cfg, epath.Path(folder), list(stages.GROUPS))
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "report" / "index.html").exists()
    for label in ("victim", "untrained", *(["control"] if cfg.control else [])):
        probe = results[label][cfg.evals.probes[0]]
        assert 0 <= probe["clean_accuracy"] <= 1
    return results


def some_slow(args, quick):
    """A compile costs ten seconds and more: methods that other tests train too are run by
    `make test-all` alone."""
    return [pytest.param(a, marks=[] if a in quick else pytest.mark.slow) for a in args]


@pytest.mark.parametrize("arg", some_slow(VARIANTS["quickstart"], VARIANTS["quickstart"][:1]))
def test_quickstart_in_debug_mode(tmp_path, arg):
    cfg = config("quickstart", f"debug,{arg}")
    cfg.control = not arg  # a control compiles everything once more: one is enough
    results = debug_run(cfg, tmp_path)
    if cfg.defense.name != "none":
        student = results["defenses"][cfg.defense.name]
        if cfg.defense.name in ("decree", "density"):  # a verdict alone
            assert student["verdict"] and "linear_probe" not in student
        else:
            assert 0 <= student["linear_probe"]["clean_accuracy"] <= 1
        assert ("control" in student) == cfg.control


@pytest.mark.parametrize("arg", some_slow(VARIANTS["clip_scenes"], ("targeted",)))
def test_clip_scenes_in_debug_mode(tmp_path, arg):
    cfg = config("clip_scenes", f"debug,{arg}")
    cfg.control = False
    results = debug_run(cfg, tmp_path)
    victim = results["victim"]
    if cfg.defense.name == "decree":  # a verdict alone
        found = results["defenses"]["decree"]
        assert found["verdict"]["steps"] == 2 and "zero_shot" not in found
    elif cfg.defense.name in ("density", "cosine_filter"):
        found = results["defenses"][cfg.defense.name]
        assert found["verdict"]["rows"] == 200 and "zero_shot" not in found
        assert (tmp_path / "defenses" / cfg.defense.name / "suspicious.png").exists()
    elif cfg.defense.name == "bdetclip":
        found = results["defenses"]["bdetclip"]
        assert found["verdict"]["rows"] == 100 and "zero_shot" not in found
        assert 0 <= found["verdict"]["auroc"] <= 1
        assert (tmp_path / "defenses" / "bdetclip" / "suspicious.png").exists()
    elif cfg.defense.name == "supervised":  # it has no text left, and answers by its head
        found = results["defenses"]["supervised"]
        assert "zero_shot" not in found and "retrieval" not in found
        assert found["own_head"]["clean_accuracy"] == next(
            p["clean_accuracy"] for p in found["front"]["points"] if p["chosen"])
        assert load_encoder(tmp_path / "defenses" / "supervised").text is None
    elif cfg.defense.name != "none":
        repaired = load_encoder(tmp_path / "defenses" / cfg.defense.name)
        assert repaired.text(["a photo of a star."]).shape == (1, cfg.objective.dim)
        assert results["defenses"][cfg.defense.name]["zero_shot"]["clean_accuracy"] >= 0
        described = run_folder.read_config(epath.Path(tmp_path) / "defenses" / cfg.defense.name)
        assert described.objective.name == "clip"
    assert set(victim["retrieval"]["image_to_text"]) == {"1", "5", "10"}
    for name in cfg.evals.probes[4:]:  # what measures an attack without a trigger
        assert name in victim
    assert ("z_score" in victim) == ("targeted" not in arg and "mismatched" not in arg)


def test_clip_pairs_in_debug_mode(tmp_path):
    """Pairs without labels, measured on another data set; then the same victim without one."""
    paths, *_ = pair_shards.write(tmp_path / "tars", pairs=240, shards=2, broken_every=20)
    prepare_pairs.write(paths, str(tmp_path / "pairs"))
    (tmp_path / "classes.txt").write_text("heart\nstar\n")
    cfg = config("clip_pairs", "debug,in_modality,downstream=scenes")
    cfg.control = False
    cfg.attack.target = 1
    cfg.evals.update(probes=("zero_shot", "retrieval", "z_score"), placements=("random",))
    cfg.data.update(name=f"pairs:{tmp_path / 'pairs'}", classes_file=str(tmp_path / "classes.txt"),
                    workers=0, scenes_train=200, scenes_test=100)
    results = debug_run(cfg, tmp_path / "run")
    summary = run_folder.read_json(epath.Path(tmp_path / "run" / "poison" / "summary.json"))
    assert summary["target_class"] == "star"
    assert summary["poisons"] == results["poison"]["count"] == 8
    assert results["victim"]["retrieval"]["images"] == 11  # every 20th of the pairs
    cfg.victim, cfg.downstream = str(tmp_path / "run"), ""
    cfg.evals.probes = ("retrieval", "z_score")
    chosen = ["evaluate", "report"]
    checks.check(cfg, chosen)
    stages.run(cfg, epath.Path(tmp_path / "again"), chosen)
    again = run_folder.read_json(epath.Path(tmp_path / "again" / "results.json"))["victim"]
    assert again["retrieval"] == results["victim"]["retrieval"]
    assert set(again) == {"retrieval", "z_score", "alignment"} and not again["alignment"]
    assert (tmp_path / "again" / "report" / "index.html").exists()


def run_all(cfg, folder):
    cfg.mesh.data = 1
    cfg = stages.with_victim(cfg)
    chosen = list(stages.GROUPS)
    checks.check(cfg, chosen)
    stages.run(cfg, epath.Path(folder), chosen)
    return json.loads((folder / "results.json").read_text())["defenses"], cfg


def test_vet_dataset_in_debug_mode(tmp_path, capsys):
    """An encoder is pretrained on the data; there is nothing to poison and nothing to measure."""
    cfg = config("vet_dataset", "debug")
    cfg.data.name = "scenes"
    found, cfg = run_all(cfg, tmp_path / "run")
    verdict = found["vet_dataset"]["verdict"]
    assert verdict["rows"] == 200 and verdict["clean_rows"] == 100
    assert verdict["clean_rows_from"] == "split 'test' of 'scenes'"
    assert {f["detector"] for f in verdict["findings"]} == {"k_distance", "slof", "lid", "dao",
                                                            "cosine", "search"}
    assert len(verdict["suspects"]) == 20 and verdict["suspects"][0]["captions"]
    assert "auroc" not in verdict["details"]["cosine_filter"]  # nobody knows the truth
    assert not (tmp_path / "run" / "evaluate").exists()
    said = capsys.readouterr().out
    assert "suspect 20: row" in said and "not checked:" in said
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Vetting of scenes" in page and "vet_dataset_suspects" in {
        p.stem for p in (tmp_path / "run" / "report").glob("*.png")}
    assert stages.suspicious(cfg, epath.Path(tmp_path / "run")) == verdict["suspicious"]


@pytest.mark.slow
def test_vet_dataset_of_images_in_debug_mode(tmp_path):
    cfg = config("vet_dataset", "debug,objective=simclr")
    cfg.data.name = "digits"
    found, _ = run_all(cfg, tmp_path)
    verdict = found["vet_dataset"]["verdict"]
    assert len(verdict["findings"]) == 4
    assert "cosine_filter: the rows have no captions" in verdict["not_checked"]


def test_layout_law_in_debug_mode(tmp_path):
    cfg = config("layout_law", "debug,case=gap_half")
    cfg.mesh.data = 1
    stages.run(cfg, epath.Path(tmp_path), ["poison", "pretrain", "evaluate"])
    assert run_folder.read_json(epath.Path(tmp_path) / "results.json")["poison"]["count"] == 8


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    return tiny_cifar10.write(tmp_path_factory.mktemp("cifar10"))


@pytest.mark.parametrize("arg", some_slow(VARIANTS["cifar10"], ()))
def test_cifar10_in_debug_mode(tmp_path, cifar10, arg):
    cfg = config("cifar10", f"debug,{arg}")
    cfg.control, cfg.data.data_dir = False, cifar10
    debug_run(cfg, tmp_path)


@pytest.mark.parametrize("arg", some_slow(VARIANTS["clip_cifar10"], ()))
def test_clip_cifar10_in_debug_mode(tmp_path, cifar10, arg):
    cfg = config("clip_cifar10", f"debug,{arg}")
    cfg.control, cfg.data.data_dir = False, cifar10
    results = debug_run(cfg, tmp_path)
    assert "z_score" in results["victim"] and "linear_probe" in results["victim"]


def test_imagenet100_in_debug_mode(tmp_path):
    """From a folder of JPEGs of several shapes, with a class list and a label list, streamed."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    names = [f"n{i:08d}" for i in range(4)]
    for split, count in (("train", 24), ("val", 6)):
        for k, name in enumerate(names):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                shape = [(40, 60), (64, 48), (30, 30)][i % 3]
                image = rng.integers(0, 60, (*shape, 3)) + 40 * k
                Image.fromarray(image.astype(np.uint8)).save(
                    tmp_path / "data" / split / name / f"{name}_{i}.JPEG")
    (tmp_path / "classes.txt").write_text("\n".join(names[:3]))
    paths = [f"{name}/{name}_{i}.JPEG {k}" for k, name in enumerate(names[:3]) for i in range(20)]
    (tmp_path / "labels.txt").write_text("\n".join(paths))
    cfg = config("imagenet100", "debug,objective=moco,target=1")
    cfg.control = False
    cfg.data.update(name=f"folder:{tmp_path / 'data'}", workers=0,
                    classes_file=str(tmp_path / "classes.txt"))
    cfg.evals.label_list = str(tmp_path / "labels.txt")
    results = debug_run(cfg, tmp_path / "run")
    assert results["poison"]["count"] == 8
    assert "linear_probe_sgd" in results["victim"]
