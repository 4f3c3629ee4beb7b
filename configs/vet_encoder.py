"""Is this encoder backdoored? For those who have no plan, no target and no attack at hand.

    python -m jax_cl_bd --config=configs/vet_encoder.py:data=tfds:cifar10 --workdir=DIR \
        --config.victim=FOLDER --config.defense.clean_encoders="('A', 'B')"

FOLDER: a Hugging Face CLIP or SigLIP folder, a ResNet's model.safetensors, a run folder of this
library, or its control/ or defenses/<name>/. `data`: clean images of your own, labelled if the
label search is to run (scenes|tfds:NAME|folder:PATH|pairs:PATH), their split `split`; none of it
is trained on. Scenes are drawn at 32 to 64 px alone. Known clean encoders of the same architecture
calibrate the thresholds: with n of them no false alarm rate below 1 / (n + 1) is certain (what is
below rests on a normal law), and without any no rate is known. Their scores are kept in DIR, or in
--config.defense.calibration=FOLDER, where the vetting of another suspect finds them.

Ends with what each detector found, what was not checked, the report, and exit status 1 if anything
is suspicious, else 0. Arguments after the colon: debug, data=SOURCE, split=NAME (default test),
seed=N. Both detectors took 19 to 83 s a suspect at 32 px on one CPU core, and 455 s the first time,
with ten clean encoders. DECREE alone told 19 of 20 backdoored encoders of scenes
from clean ones, docs/results.md.
"""

from configs import clip_scenes, common, defenses


def get_config(arg=""):
    a = common.parse(arg, debug=False, data="scenes", split="test", seed=0)
    # Model, text and objective come from the victim's folder; these are there to be replaced.
    cfg = clip_scenes.get_config(f"none,seed={a['seed']}")
    cfg.data.update(name=a["data"], train_split=a["split"], test_split=a["split"])
    cfg.control = False
    cfg.evals.probes = ()
    cfg.train.eval_every = 0
    cfg.defense = defenses.vet_encoder(steps=600)
    return common.debug(cfg) if a["debug"] else cfg
