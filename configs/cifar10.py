"""CIFAR-10 (through TFDS) under Noisy Alignment, SSL-Backdoor or no attack.

    TFDS_DATA_DIR=DIR python -m jax_cl_bd --config=configs/cifar10.py:objective=moco \
        --workdir=runs/cifar10_moco

Full size: ResNet-18 with the CIFAR stem, 50,000 images, 300 epochs of batch 256 (BYOL 128), the
recipes of jsrdcht/SSL-Backdoor (configs/ssl) without blur, 2,500 poisons (5 %), 1,200 references,
target airplane, trigger 14 at 8 px. For one GPU. `reduced` is the same attack on 10,000 images with
a small ResNet, 500 poisons and 2,000 steps of 256, for a CPU with 2 cores; it is no published
recipe, docs/papers.md ("Objectives") has the differences.
Arguments after the colon: reduced, debug, keep_references, target=CLASS, trigger=ID, seed=N,
attack=noisy_alignment|ssl_backdoor|oracle_poisoning|none, objective=simclr|moco|byol|simsiam,
defense=none|distill|retrain|decree|density.
docs/results.md has what came out.
"""

from configs import common, defenses

# On 2,000 steps the queue and the target network must move faster than on 58,500.
REDUCED = dict(simclr={}, moco=dict(queue_batches=16, momentum=0.99, hidden=128),
               byol=dict(hidden=512), simsiam=dict(layers=2, hidden=512, dim=512, bottleneck=128))


def get_config(arg=""):
    a = common.parse(arg, debug=False, reduced=False, attack="noisy_alignment", objective="simclr",
                     defense="none", keep_references=False, target=0, trigger=14, seed=0)
    share = 0.2 if a["reduced"] else 1.0
    objective = common.choose("objective", a["objective"], common.OBJECTIVES)
    optim = common.OPTIMS[a["objective"]]
    view, interpolation, batch_size = common.SMALL_VIEW, "bilinear", 256
    if a["objective"] == "byol" and not a["reduced"]:
        view, interpolation, batch_size = {**common.BYOL_VIEW, "blur": 0.0}, "bicubic", 128
    cfg = common.config(
        seed=a["seed"],
        data=dict(name="tfds:cifar10", data_dir="", image_size=32, train_split="train",
                  test_split="test", limit=0, feed="resident", workers=0, skip_corrupt=False,
                  classes_file="", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        attack=common.attack(a["attack"], target=a["target"], poisons=round(2500 * share),
                             trigger_size=8, trigger_id=a["trigger"],
                             references=round(1200 * share),
                             keep_references=a["keep_references"]),
        augment=dict(view1=dict(view), view2=dict(view), interpolation=interpolation),
        model=dict(name="resnet18", stem="cifar", width=64, stem_stride=1, first_stride=1,
                   stages=(), dtype="bfloat16", bn_groups=8 if a["objective"] == "moco" else 1),
        objective=dict(objective), optim=dict(optim),
        evals=common.evals(wrong_trigger=10 if a["trigger"] != 10 else 11),
        train=dict(steps=0, epochs=300, batch_size=batch_size, log_every=100, save_every=1000,
                   eval_every=5000, steps_per_dispatch=1),
        defense=common.choose("defense", a["defense"], dict(
            none=dict(name="none"),
            retrain=defenses.retrain(clean_fraction=0.25, batch_size=256, steps=5000),
            distill=defenses.distill(clean_fraction=0.25, batch_size=256, steps=0, momentum=0.999,
                                   lr=0.01),
            decree=defenses.decree(clean_fraction=0.25, steps=600),
            density=defenses.density(clean_fraction=0.25))))
    if a["reduced"]:
        cfg.data.limit = 10_000
        cfg.model.update(name="small_resnet", width=32, stem_stride=2, first_stride=2,
                         stages=(64, 128), dtype="float32")
        cfg.objective.update(REDUCED[a["objective"]])
        cfg.optim.update(per_epoch=False, warmup_steps=100)
        cfg.train.update(steps=2000, epochs=0, log_every=25, save_every=125, eval_every=500)
        if a["defense"] in ("distill", "retrain"):
            cfg.defense.update(steps=1000, batch_size=128)
        if a["defense"] == "distill":
            cfg.defense.update(momentum=0.99)
            cfg.defense.optim.lr = 0.05
    return common.debug(cfg) if a["debug"] else cfg
