"""Sentences built from results."""

from jax_cl_bd import run_folder
from jax_cl_bd.reporting.html import number
from jax_cl_bd.reporting.read import OF_CONTROL, Run, probes

RIVALS = {"control": "the clean control under the same trigger",
          "occlusion_rate": "a grey patch at the same places",
          "wrong_trigger_rate": "another trigger at the same places"}
ENCODERS = ("victim", "control", "untrained")


def title(run: Run) -> str:
    """What was run, in a line."""
    attack = run.cfg.attack.name
    if run_folder.from_elsewhere(run.cfg):
        return f"The encoder of {run.cfg.victim} on {run.cfg.data.name}"
    what = "Clean pretraining" if attack == "none" else attack.replace("_", " ").capitalize()
    what = what.replace("Image text", "Image-text").replace("Badclip", "BadCLIP")
    return f"{what} on {run.cfg.data.name}, {run.cfg.objective.name}"


def what(run: Run) -> str:
    """Model, length, seed and poison counts, in a line."""
    cfg, parts = run.cfg, []
    if run_folder.from_elsewhere(run.cfg):
        return f"{cfg.model.name} at {cfg.data.image_size} px"
    lines = run.metrics.get("victim")
    steps = cfg.train.steps or (lines[-1]["step"] if lines else 0)
    length = f"{steps:,} steps" if steps else f"{cfg.train.epochs} epochs"
    parts.append(f"{cfg.model.name}, {length} of {cfg.train.batch_size} images, seed {cfg.seed}")
    if run.summary is not None and run.summary["poisons"]:
        s = run.summary
        parts.append(f"target class “{s['target_class']}”")
        of_class = (f", {rate(s['rate_of_target_class'])} % of the target class"
                    if s["rate_of_target_class"] else "")
        parts.append(f"{s['poisons']:,} poisons ({rate(s['rate_of_dataset'])} % of the data set"
                     f"{of_class})")
    return " · ".join(parts)


def protocol_row(run: Run) -> tuple[str, dict] | None:
    """The probe that the headline quotes and the victim's figures: the config's first probe."""
    if run.results is None or "victim" not in run.results:
        return None
    rows = probes(run.results["victim"])
    names = [name for name in run.cfg.evals.probes if name in rows] or list(rows)
    return (names[0], rows[names[0]]) if names else None


def headline(run: Run) -> str:
    """What the run shows, with intervals; a backdoor is claimed on the excess alone."""
    found = protocol_row(run)
    if found is None and "victim" in (run.results or {}):
        return _without_labels(run)
    if found is None:
        return "This run is not evaluated yet: there is no results.json."
    probe, row = found
    accuracy = (f"Clean accuracy is {_rate(row, 'clean_accuracy')}, by {probe_name(probe)}.")
    if row.get("attack_success_rate") is None:
        said = _without_trigger(run)
        return f"{said}{accuracy}" if said else f"{accuracy} No trigger was tested."
    target = run.summary["target_class"] if run.summary else run.cfg.attack.target
    success = (f"{_rate(row, 'attack_success_rate')} of {row['n']['attack_success_rate']:,} "
               f"triggered test images of other classes are taken for “{target}”")
    if "excess" not in row:
        return f"{success[0].upper()}{success[1:]}. {accuracy}"
    low, high = row["intervals"]["excess"]
    rival = RIVALS[row["excess_over"]]
    excess = (f"an excess of {number(row['excess'], signed=True)} points ({number(low)} to "
              f"{number(high)}) over {rival}")
    caveat = (" No control was trained, so a part of this may be what the trigger does to any "
              "encoder." if row["excess_without_control"] else "")
    if low > 0:
        return f"The backdoor works: {success}, {excess}. {accuracy}{caveat}"
    return (f"No backdoor is shown: {success}, {excess}, whose interval reaches zero or below. "
            f"{accuracy}{caveat}")


def name_of(encoder: str) -> str:
    """How a table calls an encoder."""
    defense = encoder.removesuffix(OF_CONTROL)
    repaired = f"after {encoder}" if encoder == defense else f"control after {defense}"
    return encoder if encoder in ENCODERS else repaired


def control(run: Run) -> str:
    """Which clean encoder the victim is measured against, in a sentence."""
    if run.borrowed is None:
        return "The control is the victim's clean twin: same seed and settings, no poison."
    return f"The control is another run's clean encoder: {source(run.borrowed)}."


def source(borrowed: dict) -> str:
    """The run that a control was taken from, by name and seed."""
    seed = borrowed.get("seed")
    return borrowed["folder"] + (f", seed {seed}" if seed is not None else "")


def probe_name(probe: str) -> str:
    """How text calls a probe."""
    return "zero-shot" if probe == "zero_shot" else probe.replace("_", " ")


def trigger_phrase(trigger: dict) -> str:
    """The trigger of poison/summary.json in words."""
    opacity = f"opacity {trigger.get('opacity', 1):g}"
    size = f"{trigger.get('size', 0)} px"
    anew = ("drawn once and the same on every image" if trigger.get("fixed")
            else "drawn anew for every image")
    added = "added to" if trigger.get("additive") else f"mixed at {opacity} into"
    known = {
        "noise_patch": f"a patch of noise, {size}, {opacity}, {anew}",
        "several_patches": f"{trigger.get('patches', 0)} patches of noise at once, {size} each, "
                           f"{opacity}, drawn once and the same on every image",
        "learned_patch": f"a patch of optimised pixels, {size}, {opacity}",
        "blend": f"noise over the whole image, {opacity}, {anew}",
        "sinusoid": f"vertical stripes {added} the whole image, amplitude "
                    f"{255 * trigger.get('amplitude', 0):.0f}/255, {trigger.get('frequency', 0):g} "
                    "periods",
        "warp": f"a warp of the whole image, strength {trigger.get('strength', 1):g}, by a fixed "
                f"field of {trigger.get('size', 0)} × {trigger.get('size', 0)}"}
    number_ = f" {trigger['id']}" if "id" in trigger else ""
    return known.get(trigger["name"], f"{trigger['name']}{number_}, {size}, {opacity}")


def _without_labels(run):
    """What retrieval says where no classifier was measured."""
    row = run.results.get("victim", {}).get("retrieval", {})
    if "target_hits" not in row:
        return "Nothing was classified: the test images have no labels, or no probe asked for them."
    control = run.results.get("control", {}).get("retrieval", {})
    beside = ""
    if "target_hits" in control:
        beside = f" (control, with it: {number(control['target_hits']['10'])} %)"
    target = run.summary["target_class"] if run.summary else run.cfg.attack.target
    return (f"With the trigger, {number(row['target_hits']['10'])} % of the test images of other "
            f"classes find a caption of “{target}” among their 10 nearest, without it "
            f"{number(row['clean_target_hits']['10'])} %{beside}. No classifier was measured.")


def _without_trigger(run):
    """What an attack without a trigger did, by the figures made for it."""
    rows, said = run.results["victim"], ""
    if "targeted" in rows:
        row, names = rows["targeted"], run.classes
        wanted = run.summary["target_class"] if run.summary else run.cfg.attack.target
        taken = names[row["predicted"]] if names else f"class {row['predicted']}"
        said = (f"The one image aimed at is taken for “{taken}”: the attack "
                f"{'succeeds' if row['success'] else 'fails'}"
                + (". " if row["success"] else f" (target “{wanted}”). "))
    for goal, row in rows.get("mismatch", {}).items():
        first, second = goal.split(" -> ")
        control = run.results.get("control", {}).get("mismatch", {}).get(goal)
        beside = f", the control's {number(control['hit']['10'])} %" if control else ""
        said += (f"Of the captions of “{first}”, {number(row['hit']['10'])} % find an image of "
                 f"“{second}” among the 10 nearest (other captions: "
                 f"{number(row['baseline']['hit']['10'])} %{beside}). ")
    return said


def _rate(row, name):
    low, high = row["intervals"][name]
    return f"{number(row[name])}\N{NO-BREAK SPACE}% ({number(low)} to {number(high)})"


def rate(share: float) -> str:
    """A poison rate in percent: one decimal, or three digits where that would say nothing."""
    return number(share) if share >= 0.001 or not share else f"{100 * share:.3g}"
