"""Is this data set poisoned? By an encoder that was trained on it.

    python -m jax_cl_bd --config=configs/vet_dataset.py --config.data.name=pairs:data/crawl \
        --config.defense.clean_data=pairs:data/own --workdir=DIR [--config.victim=FOLDER]

The train split of data.name is judged (tfds:NAME, folder:PATH, pairs:PATH, with the other fields of
data as in configs/clip_pairs.py). The encoder is that of `victim`, which must have been trained on
it, or else one that is pretrained here on all of it (at 32 px, small; the stages poison and
pretrain, with no attack). Without data.name the rows of a run of this library are judged, as it was
trained on: --config.victim=RUN. Known clean rows come from defense.clean_data, by default the test
split, which is then taken to be clean. defense.scorer names an independent image-text model for the
cosine filter.

Ends with the rows that are suspected, what was not checked, the report, and exit status 1 if more
rows are flagged than clean data would have, else 0. Arguments after the colon: debug,
objective=clip|siglip (data with captions, or --config.data.captions=templates)|simclr|moco|byol|
simsiam (images alone), seed=N. 8,000 rows at 32 px take two to four minutes on one CPU core beside
the pretraining; of the one poisoned set judged so far (4 %) it found 94 % of the poisons and no
other row, docs/results.md.
"""

from configs import cifar10, clip_scenes, common, defenses


def get_config(arg=""):
    a = common.parse(arg, debug=False, objective="clip", seed=0)
    pairs = a["objective"] in common.PAIR_OBJECTIVES
    if pairs:
        cfg = clip_scenes.get_config(f"none,objective={a['objective']},seed={a['seed']}")
    else:
        common.choose("objective", a["objective"], common.PAIR_OBJECTIVES | common.OBJECTIVES)
        cfg = cifar10.get_config(f"reduced,attack=none,objective={a['objective']},"
                                 f"seed={a['seed']}")
    cfg.data.limit = 0
    cfg.control = False
    cfg.evals.probes = ()
    cfg.train.eval_every = 0
    cfg.defense = defenses.vet_dataset()
    if a["debug"]:
        common.debug(cfg)
        cfg.defense.density.update(k=4, batch=100)
    cfg.data.name = ""
    return cfg
