"""The settings that experiments share, and the parser of `file.py:arg,key=value`."""

import ml_collections

# torchvision's names and meanings; every probability and strength in [0, 1].
MOCO_VIEW = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, jitter=0.8,
                 brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2,
                 blur=0.5, blur_sigma=(0.1, 2.0), solarize=0.0)
BYOL_VIEW = {**MOCO_VIEW, "grayscale": 0.1}
# 32 px and below: no blur, as SimCLR's and SimSiam's CIFAR recipes have it.
SMALL_VIEW = {**MOCO_VIEW, "blur": 0.0}
# A digit is its outline: mirror images and strong colour changes do not keep it a digit.
DIGIT_VIEW = {**SMALL_VIEW, "flip": 0.0, "grayscale": 0.0}
# CompRess trains its student on crops and flips alone.
STUDENT_VIEW = {**MOCO_VIEW, "crop_scale": (0.08, 1.0), "jitter": 0.0, "grayscale": 0.0,
                "blur": 0.0}

# The recipes of jsrdcht/SSL-Backdoor, configs/ssl, unless a config says otherwise.
OBJECTIVES = dict(
    simclr=dict(name="simclr", temperature=0.5, hidden=128, dim=128),
    moco=dict(name="moco", temperature=0.2, momentum=0.999, queue_batches=256, hidden=512, dim=128),
    byol=dict(name="byol", tau=0.99, hidden=1024, dim=128),
    simsiam=dict(name="simsiam", layers=3, hidden=2048, dim=2048, bottleneck=512))
SGD = dict(name="sgd", lr=0.06, momentum=0.9, weight_decay=1e-4, schedule="cosine", per_epoch=True,
           warmup_steps=0, milestones=(), decay=0.2, constant_lr_modules=())
OPTIMS = dict(
    simclr={**SGD, "lr": 0.5},
    moco=SGD,
    byol={**SGD, "name": "adam", "lr": 0.002, "weight_decay": 1e-6, "schedule": "step",
          "warmup_steps": 500, "milestones": (250 / 300, 275 / 300)},
    simsiam={**SGD, "lr": 0.1, "constant_lr_modules": ("predictor",)})


def parse(arg, **defaults):
    """Splits "a,key=value" into a dict over `defaults`; bare words become True.

    Values take the type of their default. Raises ValueError on a name not in `defaults` and on a
    value of another type.
    """
    settings = dict(defaults)
    for item in filter(None, arg.split(",")):
        key, given, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown argument {key!r} after the colon of --config; allowed: "
                             f"{', '.join(sorted(defaults))}")
        kind = type(defaults[key])
        if kind is bool:
            if given and text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(f"argument {key}={text!r} after the colon of --config must be "
                                 "true or false")
            settings[key] = not given or text.lower() in ("true", "1")
        else:
            try:
                settings[key] = kind(text)
            except ValueError:
                raise ValueError(f"argument {key}={text!r} after the colon of --config must be "
                                 f"{kind.__name__}") from None
    return settings


def choose(what, name, options):
    """Picks a preset by name. Raises ValueError listing what exists."""
    if name not in options:
        raise ValueError(f"unknown {what} {name!r}; allowed: {', '.join(sorted(options))}")
    return options[name]


def attack(name, *, target, poisons, trigger_size, trigger_id=14, references=0, shadows=0,
           keep_references=False):
    """Settings of one attack; `poisons` images in all. references, shadows 0: one a poison."""
    trigger = dict(name="patch", id=trigger_id, size=trigger_size, opacity=1.0,
                   train_place="random", train_box=(0.25, 0.75),
                   test_place="random", test_box=(0.1, 0.9))
    common = dict(name=name, target=target, poisons=poisons, trigger_from="", trigger=trigger)
    pairs = dict(references=references, shadows=shadows, keep_references=keep_references)
    centre = {**trigger, "train_place": "center"}
    return choose("attack", name, dict(
        none={**common, "poisons": 0},
        ssl_backdoor={**common, "targeted": True},
        noisy_alignment={**common, **pairs, "trigger": centre, "shadow": "equal", "gap": 0.0,
                         "trigger_offset": (0.0, 0.0),
                         "layouts": ("left", "right", "top", "bottom")},
        oracle_poisoning={**common, **pairs, "trigger": centre}))


def distill(*, clean_fraction, batch_size, steps, momentum, lr, view=STUDENT_VIEW):
    """The distillation defense with CompRess's temperature (docs/papers.md, SSL-Backdoor)."""
    return dict(name="distill", clean_fraction=clean_fraction, batch_size=batch_size, queue=0,
                temperature=0.04, momentum=momentum, steps=steps, epochs=130, augment=dict(view),
                optim={**SGD, "lr": lr, "schedule": "step", "milestones": (90 / 130, 120 / 130)})


def retrain(*, clean_fraction, batch_size, steps):
    """Pretraining from scratch on the clean images that distillation would use."""
    return dict(name="retrain", clean_fraction=clean_fraction, batch_size=batch_size, steps=steps,
                epochs=0)


def evals(**changes):
    """What is measured: the test protocol first, the trigger at the centre as a further row."""
    return dict(probes=("linear_probe", "knn"), fraction=1.0, label_list="",
                placements=("random", "center"), wrong_trigger=10, batch_size=512,
                knn_k=200, knn_temperature=0.1) | changes


def config(**groups):
    """Builds the ConfigDict from plain dicts; what a config does not set has its default here."""
    defaults = dict(seed=0, control=True, victim="", downstream="", mesh=dict(data=-1, fsdp=1),
                    evals=evals(), defense=dict(name="none"))
    return ml_collections.ConfigDict(defaults | groups)


def debug(cfg):
    """Shrinks any config to seconds: 2 steps, batch 16, a tiny encoder, few rows."""
    cfg.data.limit = 200
    cfg.model.update(name="small_resnet", width=8, stages=(8, 16), dtype="float32",
                     stem_stride=1, first_stride=1)
    cfg.model.bn_groups = min(cfg.model.bn_groups, 2)
    cfg.data.image_size = min(cfg.data.image_size, 32)
    cfg.attack.trigger.size = min(cfg.attack.trigger.size, 8)
    cfg.attack.poisons = min(cfg.attack.poisons, 8)
    for name in ("references", "shadows"):
        if name in cfg.attack:
            cfg.attack[name] = min(cfg.attack[name], 8)
    for name in ("hidden", "dim", "bottleneck"):
        if name in cfg.objective:
            cfg.objective[name] = 16
    if "queue_batches" in cfg.objective:
        cfg.objective.queue_batches = 2
    cfg.train.update(steps=2, batch_size=16, log_every=1, save_every=1, eval_every=0,
                     steps_per_dispatch=1)
    cfg.evals.update(batch_size=64)
    if cfg.defense.name != "none":
        cfg.defense.update(steps=2, batch_size=16, clean_fraction=0.25)
    return cfg
