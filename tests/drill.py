"""make drill [KILLS=100] [SEED=0]: kill -9 at random moments, always resumed by the same command.

A debug-size quickstart with distillation is run once undisturbed; then it is killed again and again
at random moments of its whole length (compile, step, save, poisoning, evaluation, defense and
report), a few times in each folder, and resumed by the same command until it ends by itself. Its
plan, poisons, trigger, weights, verdicts, probe figures and metrics must then be those of the
undisturbed run to the bit, but for times and rates, and nothing may be left over.

In every other folder the first kill comes as soon as the victim, in the next such folder the
control, has two whole checkpoints, and the newer one is damaged: a file of it truncated, deleted
and with one bit flipped in turn. The command must name it, once, set it aside and go on from the
older one. Without such a damage the drill has failed.

A persistent compilation cache keeps most kills out of the compiler. Times: docs/scaling.md.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("--config=configs/quickstart.py:debug", "--config.train.steps=8",
         "--config.train.save_every=2", "--config.train.eval_every=4", "--config.defense.steps=6")
KILLS_PER_FOLDER = 5
HOWS = ("truncated", "deleted", "flipped")
TIMES = ("seconds", "images_per_second", "feed_wait", "run")  # what may differ between two runs


def start(folder: Path, cache: Path, log) -> subprocess.Popen:
    """The command, in a process group of its own."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
           "JAX_COMPILATION_CACHE_DIR": str(cache),
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen([sys.executable, "-m", "jax_cl_bd", *FLAGS, f"--workdir={folder}"],
                            cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                            process_group=0)


def finished(folder: Path, cache: Path, log) -> None:
    """Runs the command to its end."""
    status = start(folder, cache, log).wait()
    if status:
        raise SystemExit(f"the command ended with status {status}; see {log.name}")


def where(folder: Path) -> str:
    """Which stage a killed run was in."""
    for stage in ("poison", "pretrain", "control", "evaluate", "defenses/distill", "report"):
        done = folder / ("control/pretrain" if stage == "control" else stage) / "done.json"
        if not done.exists():
            return stage
    return "end"


def without_times(value):
    """JSON without what a clock decides."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict:
    """All that a run left, by file: JSON without times, of others the bytes; of checkpoints the
    arrays, since a file of orbax holds the time of its making."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name == ".lock" or "events/" in name:
            continue
        if "checkpoints/" in name:
            step = name.split("checkpoints/")[1].split("/")[0]
            found[f"{name.split('checkpoints/')[0]}checkpoints/{step}"] = None
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            found[name] = [without_times(json.loads(line)) for line in lines]
        elif name.startswith("report/"):
            found[name] = None  # says times
        else:
            found[name] = path.read_bytes()
    return found | weights(folder)


def weights(folder: Path) -> dict:
    """The last checkpoint of every encoder of a run: bytes of each array."""
    import jax
    import numpy as np

    from jax_cl_bd.models import encoder

    found = {}
    for place in ("", "control", "defenses/distill", "defenses/distill/control"):
        opened = encoder.load(folder / place)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opened.variables):
            found[f"{place}:{jax.tree_util.keystr(path)}"] = np.asarray(leaf).tobytes()
    return found


def compare(one: dict, other: dict) -> list[str]:
    """The names of what two runs left that is not the same."""
    return sorted(name for name in one.keys() | other.keys()
                  if name not in one or name not in other or one[name] != other[name])


def whole_steps(place: Path) -> list[int]:
    """The steps of the checkpoints that have their digests, ascending."""
    return sorted(int(p.parent.name) for p in (place / "checkpoints").glob("[0-9]*/digests.json")
                  if p.parent.name.isdigit())


def kill(process: subprocess.Popen) -> bool:
    """kill -9, of its worker processes too."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def kill_after(process: subprocess.Popen, seconds: float) -> bool:
    """Kills it after a time; False if it ended before."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return kill(process)


def kill_at_two_checkpoints(process: subprocess.Popen, place: Path) -> bool:
    """Kills it once two checkpoints are whole; False if it ended before."""
    while process.poll() is None:
        if len(whole_steps(place)) > 1:
            return kill(process)
        time.sleep(0.01)
    return False


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was done to a checkpoint, and to which step the run must fall back."""

    place: Path
    step: int
    older: int
    what: str

    def faults(self, log: str) -> list[str]:
        """What is wrong with how the command took it, by what it printed and left."""
        folder, lines = self.place / "checkpoints", log.splitlines()
        said = [i for i, line in enumerate(lines)
                if line.startswith(f"checkpoint {folder / str(self.step)} is damaged (")
                and line.endswith(f"falling back to the one before, this one is renamed to "
                                  f"bad-{self.step}")]
        if len(said) != 1:
            return [f"{len(said)} lines name what was damaged, {self.what}"]
        found = [] if (folder / f"bad-{self.step}").exists() else [f"no bad-{self.step} is kept"]
        whose = "control" if self.place.name == "control" else "victim"
        on = f"pretrain {whose}: going on from step "
        if next((x for x in lines[said[0]:] if x.startswith(on)), "") != f"{on}{self.older}":
            found.append(f"{whose} did not go on from step {self.older}")
        return found


def damage(place: Path, how: str, rng: random.Random) -> Damage | None:
    """Harms the newest of two whole checkpoints; None where there are not two."""
    if len(steps := whole_steps(place)) < 2:
        return None
    path = rng.choice(sorted(p for p in (place / "checkpoints" / str(steps[-1])).rglob("*")
                             if p.is_file() and p.stat().st_size > 1))
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:len(data) // 2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return Damage(place, steps[-1], steps[-2], f"{path.relative_to(place)} {how}")


def disturb(folder: Path, cache: Path, kills: int, length: float, harm: tuple[Path, str] | None,
            rng: random.Random) -> tuple[list[str], Damage | None]:
    """Kills the command up to so often, each time at another moment, then lets it end.

    Args:
        harm: the place whose newest checkpoint is damaged at the first kill, and how.
    Returns:
        The stages it was killed in, and the damage.
    """
    places, harmed = [], None
    with open(f"{folder}.log", "w") as log:
        while len(places) < kills:
            process, harming = start(folder, cache, log), harm and not harmed
            if not (kill_at_two_checkpoints(process, harm[0]) if harming
                    else kill_after(process, rng.uniform(0.2, length))):
                break  # it was done before
            places.append(where(folder))
            if harming:
                harmed = damage(*harm, rng)
        finished(folder, cache, log)
    return places, harmed


def drill(folder: Path, cache: Path, kills: int, length: float, harm: tuple[Path, str] | None,
          rng: random.Random, expected: dict) -> tuple[list[str], list[str]]:
    """Kills and resumes in one folder, says what came out, and removes it if all is well.

    Returns:
        The stages it was killed in, and what is wrong.
    """
    places, found = disturb(folder, cache, kills, length, harm, rng)
    log = Path(f"{folder}.log")
    faults = found.faults(log.read_text()) if found else ["no damage was done"] * bool(harm)
    differs = compare(expected, contents(folder))
    aside = [name for name in differs if ".partial" in name or "bad-" in name]
    if differs := [name for name in differs if "bad-" not in name]:  # those are kept on purpose
        faults.append(f"differs: {', '.join(differs[:5])}")
    print(f"drill: {folder.name}, {len(places)} kills: "
          f"{'FAILED: ' + '; '.join(faults) if faults else 'is the same'}"
          f"{', damaged: ' + found.what if found else ''}"
          f"{', set aside: ' + ', '.join(aside) if aside else ''}", flush=True)
    if not faults:
        shutil.rmtree(folder)
        log.unlink()
    return places, [f"{folder.name}: {fault}" for fault in faults]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=None, help="kept, to look at; default: temporary")
    args = parser.parse_args()
    rng, begun = random.Random(args.seed), time.monotonic()
    home = Path(args.folder or tempfile.mkdtemp()).absolute()
    home.mkdir(parents=True, exist_ok=True)
    cache, places, damages, failed = home / "cache", Counter(), 0, []
    with open(home / "drill.log", "a") as log:
        finished(home / "warm", cache, log)
        shutil.rmtree(home / "warm")
        timed = time.monotonic()
        finished(home / "undisturbed", cache, log)
    length, expected = time.monotonic() - timed, contents(home / "undisturbed")
    print(f"drill: an undisturbed run takes {length:.0f} s", flush=True)
    for number in itertools.count():
        if (left := args.kills - places.total()) <= 0:
            break
        folder, harm = home / f"killed_{number + 1}", None
        if number % 2 == 0:
            harm = (folder / "control" if number % 4 else folder, HOWS[number // 2 % len(HOWS)])
            damages += 1
        stages, faults = drill(folder, cache, min(KILLS_PER_FOLDER, left), length, harm, rng,
                               expected)
        places.update(stages)
        failed += faults
    print(f"drill: {places.total()} kills in {time.monotonic() - begun:.0f} s, in "
          f"{', '.join(f'{k} {v}' for k, v in places.most_common())}; {damages} folders with a "
          f"damaged checkpoint; {len(failed)} faults")
    if not failed and args.folder is None:
        shutil.rmtree(home)
    for line in failed:
        print(f"drill: FAILED: {line}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
