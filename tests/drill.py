"""make drill [KILLS=100] [SEED=0]: kill -9 at random moments, always resumed by the same command.

A debug-size quickstart with distillation is run once undisturbed; then it is killed again and again
at random moments of its whole length (compile, step, save, poisoning, evaluation, defense and
report), a few times in each folder, and resumed by the same command until it ends by itself. Its
plan, poisons, trigger, weights, verdicts, probe figures and metrics must then be those of the
undisturbed run to the bit, but for times and rates, and nothing may be left over. In every other
folder the newest checkpoint is damaged as well, when there is an older one: a file of it truncated,
deleted or with one bit flipped.

A persistent compilation cache keeps most kills out of the compiler. Times: README.
"""

import argparse
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


def damage(folder: Path, rng: random.Random) -> str | None:
    """Harms the newest of two checkpoints; says how, or None where there are not two."""
    for place in (folder, folder / "control"):
        steps = sorted((p for p in (place / "checkpoints").glob("[0-9]*")
                        if (p / "digests.json").exists()), key=lambda p: int(p.name))
        if len(steps) < 2 or (place / "pretrain" / "done.json").exists():
            continue
        path = rng.choice(sorted(p for p in steps[-1].rglob("*") if p.is_file()
                                 and p.stat().st_size > 1))
        how = rng.choice(["truncated", "deleted", "flipped"])
        data = bytearray(path.read_bytes())
        if how == "deleted":
            path.unlink()
        elif how == "truncated":
            path.write_bytes(data[:len(data) // 2])
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        return f"{path.relative_to(folder)} {how}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=None, help="kept, to look at; default: temporary")
    args = parser.parse_args()
    rng, begun = random.Random(args.seed), time.monotonic()
    home = Path(args.folder or tempfile.mkdtemp())
    home.mkdir(parents=True, exist_ok=True)
    cache, kills, places, harmed, failed = home / "cache", 0, Counter(), [], []
    with open(home / "drill.log", "a") as log:
        finished(home / "warm", cache, log)
        shutil.rmtree(home / "warm")
        timed = time.monotonic()
        finished(home / "undisturbed", cache, log)
        length = time.monotonic() - timed
        expected = contents(home / "undisturbed")
        print(f"drill: an undisturbed run takes {length:.0f} s", flush=True)
        number = 0
        while kills < args.kills:
            number += 1
            folder = home / f"killed_{number}"
            for _ in range(min(KILLS_PER_FOLDER, args.kills - kills)):
                process = start(folder, cache, log)
                try:
                    process.wait(rng.uniform(0.2, length))
                    break  # it was done before
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                kills += 1
                places[where(folder)] += 1
                if number % 2 and (how := damage(folder, rng)):
                    harmed.append(how)
            finished(folder, cache, log)
            differs = compare(expected, contents(folder))
            left = [n for n in differs if ".partial" in n or "bad-" in n]
            differs = [n for n in differs if "bad-" not in n]  # a damaged checkpoint is kept aside
            if differs:
                failed.append(f"{folder.name}: {', '.join(differs[:5])}")
            print(f"drill: {kills} of {args.kills} kills; {folder.name} "
                  f"{'DIFFERS: ' + ', '.join(differs[:5]) if differs else 'is the same'}"
                  f"{', set aside: ' + ', '.join(left) if left else ''}", flush=True)
            if not differs:
                shutil.rmtree(folder)
    said = (home / "drill.log").read_text().count("is damaged")
    print(f"drill: {kills} kills in {time.monotonic() - begun:.0f} s, in "
          f"{', '.join(f'{k} {v}' for k, v in places.most_common())}; {len(harmed)} checkpoints "
          f"damaged, {said} lines say so; {len(failed)} folders differ")
    if harmed and not said:
        failed.append("no damaged checkpoint was named")
    if not failed and args.folder is None:
        shutil.rmtree(home)
    for line in failed:
        print(f"drill: FAILED: {line}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
