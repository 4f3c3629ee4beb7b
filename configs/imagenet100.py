"""ImageNet-100 from a folder, as Saha et al. and Noisy Alignment attack it: 650 poisons.

    python -m jax_cl_bd --workdir=runs/in100 \
        --config=configs/imagenet100.py:attack=noisy_alignment,objective=moco \
        --config.data.name=folder:/data/imagenet \
        --config.data.classes_file=imagenet100_classes.txt \
        --config.evals.label_list=10percent_filelist.txt

The folder holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; the class list has one wnid a line, and
its sorted order gives the class numbers. Label lists are those of PatchSearch
(linear_eval_files/), or any with one relative path a line; without one, a fixed share
(evals.fraction) of each class is used. Target 26 (Rottweiler) with trigger 10, one of the five
pairs that SSL-Backdoor ships: 12 with 44, 14 with 64, 16 with 75, 18 with 90.
MoCo v2 and BYOL train 200 epochs, as SSL-Backdoor's own code does; SimCLR and SimSiam, which it
does not have, 300, as in the Noisy Alignment comparison (jsrdcht/SSL-Backdoor, configs/ssl).
The defenses have a quarter of the images: distillation with CompRess's 130 epochs, batch and rates,
retraining with 12,400 steps (ours, 100 epochs of them, as in configs/cifar10.py).
For GPUs or a TPU pod; here only its debug mode has been run.
Arguments after the colon: debug, attack=noisy_alignment|ssl_backdoor|oracle_poisoning|none,
objective=simclr|moco|byol|simsiam, defense=none|distill|retrain|decree|density,
target=CLASS, trigger=ID, seed=N.
"""

from configs import common, defenses


def get_config(arg=""):
    a = common.parse(arg, debug=False, attack="ssl_backdoor", objective="moco",
                     defense="none", target=26, trigger=10, seed=0)
    objective = common.choose("objective", a["objective"], common.OBJECTIVES)
    view = common.BYOL_VIEW if a["objective"] == "byol" else common.MOCO_VIEW
    optim = common.OPTIMS[a["objective"]]
    epochs, batch_size = 300 if a["objective"] in ("simclr", "simsiam") else 200, 256
    if a["objective"] == "byol":  # SSL-Backdoor's own BYOL (byol/ of its code)
        batch_size = 512
        optim = {**optim, "milestones": (150 / 200, 175 / 200)}
    cfg = common.config(
        seed=a["seed"],
        data=dict(name="folder:data/imagenet100", data_dir="", image_size=224, train_split="train",
                  test_split="val", limit=0, feed="streamed", workers=8, skip_corrupt=False,
                  classes_file="", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        attack=common.attack(a["attack"], target=a["target"], poisons=650, trigger_size=50,
                             trigger_id=a["trigger"], references=650),
        augment=dict(view1=dict(view), view2=dict(view),
                     interpolation="bicubic" if a["objective"] == "byol" else "bilinear"),
        model=dict(name="resnet18", stem="imagenet", width=64, stem_stride=2, first_stride=1,
                   stages=(), dtype="bfloat16", bn_groups=8 if a["objective"] == "moco" else 1),
        objective=dict(objective), optim=dict(optim),
        train=dict(steps=0, epochs=epochs, batch_size=batch_size, log_every=100, save_every=1000,
                   eval_every=0, steps_per_dispatch=1),
        evals=common.evals(fraction=0.1, probes=("linear_probe", "linear_probe_sgd", "knn"),
                           wrong_trigger=11 if a["trigger"] != 11 else 12),
        defense=common.choose("defense", a["defense"], dict(
            none=dict(name="none"),
            retrain=defenses.retrain(clean_fraction=0.25, batch_size=256, steps=12_400),
            distill=defenses.distill(clean_fraction=0.25, batch_size=256, steps=0, momentum=0.999,
                                     lr=0.01),
            decree=defenses.decree(clean_fraction=0.25, steps=600),
            density=defenses.density(clean_fraction=0.25))))
    return common.debug(cfg) if a["debug"] else cfg
