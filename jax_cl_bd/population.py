"""python -m jax_cl_bd.population --config=FILE[:args] --workdir=DIR --vary=KEY=V1,V2 [--vary=...]

Many encoders at once: runs that differ in seed and attack alone (target, number of poisons,
trigger) are trained by one compiled step, vmapped over them, on one device or over the mesh.
Choices of several --vary are crossed; each member has a folder of its own, such as
DIR/seed=0+attack.target=1, which is that of an ordinary run (its config.json has all settings).
Members of one seed share the clean twin of the first of them: those name it in control_from.

While they are trained their states lie together in DIR/together, from which the same command goes
on after any end; then each member gets its own checkpoint and metrics. Clean images are held once
and must be resident; poisons are padded to the largest member's count. The attack is not watched
during training (train.eval_every).
"""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import PartitionSpec

from jax_cl_bd import __main__ as command
from jax_cl_bd import (
    checkpoint,
    checks,
    host_memory,
    metrics,
    optim,
    parallel,
    poison,
    pretrain,
    report,
    run_folder,
    settings,
    stages,
)
from jax_cl_bd.data import feed, sources, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import training
from jax_cl_bd.train import TrainState, fit

VARY = flags.DEFINE_multi_string("vary", [], "KEY=V1,V2,...: a setting in which members differ.")
TOGETHER = "together"


@dataclasses.dataclass(frozen=True)
class Member:
    """One encoder to train: where it goes, by which config, on which data."""

    folder: epath.Path
    cfg: ml_collections.ConfigDict
    data: PoisonedSet
    per_epoch: int


def configs(cfg: ml_collections.ConfigDict,
            vary: list[str]) -> dict[str, ml_collections.ConfigDict]:
    """The config of each member, by name: all combinations of the values of `vary`.

    Raises:
        UserError: a key that members must share, or that does not exist, or a value of another
            type.
    """
    axes = []
    for word in vary:
        key, equals, values = word.partition("=")
        if not equals or not values:
            raise UserError(f"--vary={word!r} must be KEY=V1,V2,..., such as --vary=seed=0,1,2")
        if key != "seed" and not key.startswith("attack.") or key == "attack.name":
            raise UserError(f"--vary={key}: members may differ in seed and in settings of the "
                            "attack, such as attack.target; all else is one compiled step")
        axes.append([(key, _typed(cfg, key, text)) for text in values.split(",")])
    if not axes:
        raise UserError("--vary is missing; for example --vary=seed=0,1,2,3")
    found = {}
    for choice in itertools.product(*axes):
        own = ml_collections.ConfigDict(cfg.to_dict())
        own.train.eval_every = 0
        for key, value in choice:
            own.update_from_flattened_dict({key: value})
        found["+".join(f"{key}={value}" for key, value in choice)] = own.lock()
    return found


def _typed(cfg, key, text):
    """A value as text in the type that the config has for it."""
    kind = type(settings.find(cfg, key, given=f"--vary={key}"))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
    except (KeyError, ValueError):
        pass
    raise UserError(f"--vary={key}: {text!r} is not of type {kind.__name__}")


def with_controls(members: dict[str, ml_collections.ConfigDict], folder: epath.Path) -> dict:
    """Lets members of one seed share the clean twin of the first of them."""
    first, out, local = {}, {}, "://" not in str(folder)
    for name, cfg in members.items():
        own = ml_collections.ConfigDict(cfg.to_dict())
        home = first.setdefault(cfg.seed, name)
        if cfg.control and not cfg.control_from and home != name:
            own.control_from = os.path.abspath(folder / home) if local else str(folder / home)
        out[name] = own.lock()
    return out


def run(members: dict[str, ml_collections.ConfigDict], folder: epath.Path,
        chosen: list[str], *, check_only: bool = False) -> None:
    """Poisons each, pretrains all together, then measures each; what is complete is skipped. With
    `check_only` nothing but the settings is looked at."""
    chosen = [stage for stage in run_folder.STAGES if stage in chosen]
    for cfg in members.values():
        check(cfg)
        checks.check(cfg, chosen)
    members = with_controls(members, folder)
    if "pretrain" in chosen:
        check_places(members, folder)
    if check_only:
        return
    with contextlib.ExitStack() as locks:
        for name in members:
            locks.enter_context(run_folder.locked(folder / name))
        if "poison" in chosen:
            for name, cfg in members.items():
                stages.run(cfg, folder / name, ["poison"])
        if "pretrain" in chosen:
            train(members, folder)
        rest = [stage for stage in chosen if stage not in ("poison", "pretrain")]
        for name, cfg in members.items() if rest else ():
            stages.run(cfg, folder / name, rest)
    if "report" in chosen:
        report.compare([folder / name for name in members], folder / "report")
        print(f"all members: {folder / 'report' / 'index.html'}", flush=True)


def check(cfg: ml_collections.ConfigDict) -> None:
    """Refuses what members cannot share. Raises UserError."""
    for name in ("victim", "init_from"):
        if cfg[name]:
            raise UserError(f"{name}={cfg[name]!r} is of single runs; members begin with weights "
                            "drawn from their seeds")
    if cfg.data.feed != "resident":
        raise UserError("data.feed=streamed gives each run images of its own; a population holds "
                        "them once: --config.data.feed=resident")
    if not cfg.train.steps:
        raise UserError("train.steps=0 lets epochs say how long members train, which differ in "
                        "length where other rows are poisoned; set --config.train.steps and "
                        "--config.train.epochs=0")
    if cfg.train.chunks != 1:
        raise UserError(f"train.chunks={cfg.train.chunks} is of single runs; members share a step")
    if training.looks_at_all(cfg) or "epoch_steps" in cfg.objective:
        raise UserError(f"objective {cfg.objective.name!r} looks at all data, or counts the epochs "
                        "of its own, and is of single runs")


def check_places(members: dict[str, ml_collections.ConfigDict], folder: epath.Path) -> None:
    """Refuses members that devices cannot share, and folders that were made with other settings.
    Raises UserError."""
    twins = sum(bool(cfg.control and not cfg.control_from and cfg.attack.poisons)
                for cfg in members.values())
    size = parallel.make_mesh(next(iter(members.values())).mesh).size
    if (len(members) + twins) % size:
        raise UserError(f"{len(members)} victims and {twins} controls cannot be shared equally by "
                        f"{size} devices; choose --config.mesh.data to divide them")
    for name, cfg in members.items():
        run_folder.check_settings(folder / name / "pretrain", _settings(cfg))


def train(members: dict[str, ml_collections.ConfigDict], folder: epath.Path) -> None:
    """Trains the victims, and the twins that are asked for, that are not complete.

    Those that were begun together are trained together to the end, also where some of them have
    been given their checkpoints already.
    """
    place, every = folder / TOGETHER, _members(members, folder)
    begun = _begun(place)
    todo = [m for m in every if (_name(m, folder) in begun if begun
                                 else not run_folder.is_done(m.folder / "pretrain"))]
    if begun and len(todo) < len(begun):
        missing = sorted(set(begun) - {_name(m, folder) for m in todo})
        raise UserError(f"{place} was begun with further members, {', '.join(missing)}; vary what "
                        "was varied then, or remove that folder")
    if not todo:
        print("pretrain: complete", flush=True)
        return
    run_folder.begin(place, {"members": [_name(m, folder) for m in todo]})
    for m in todo:
        run_folder.write_config(m.folder, m.cfg)
        run_folder.begin(m.folder / "pretrain", _settings(m.cfg))
    cfg, steps = todo[0].cfg, todo[0].cfg.train.steps
    mesh = parallel.make_mesh(cfg.mesh)
    batches = Feed.of(todo)
    step, init = step_of(cfg, steps, [m.per_epoch for m in todo])
    keys = jnp.stack([training.first_key(m.cfg) for m in todo])
    shardings = jax.tree.map(lambda _: parallel.rows(mesh), jax.eval_shape(init, keys))
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=shardings)(keys)
    cfg_train = cfg.train.copy_and_resolve_references()
    with cfg_train.unlocked():
        cfg_train.batch_size = cfg.train.batch_size * len(todo)
    state = fit(step, state, shardings, batches, folder=place, steps=steps, cfg_train=cfg_train,
                mesh=mesh, label=f"pretrain {len(todo)} encoders",
                members=[_name(m, folder) for m in todo])
    for i, m in enumerate(todo):
        if not run_folder.is_done(m.folder / "pretrain"):
            _leave(m, i, jax.tree.map(lambda x: x[i], state), steps, place)
    place.rmtree()


def _begun(place: epath.Path) -> list[str] | None:
    """The members that were begun together and are not all complete. What else lies in `place` is
    the rest of a removal that was interrupted, and is removed."""
    mark = place / "settings.json"
    begun = run_folder.read_json(mark)["members"] if mark.exists() else []
    if not all(run_folder.is_done(place.parent / name / "pretrain") for name in begun):
        return begun
    if place.exists():
        place.rmtree()
    return None


def _name(member, folder):
    return str(member.folder.relative_to(folder))


def step_of(cfg, steps: int, per_epoch: list[int]) -> tuple[Callable, Callable]:
    """The step of all members and init(keys); `per_epoch`: steps of an epoch of each."""
    optim.make(cfg.optim, steps, min(per_epoch))  # checks
    lengths = jnp.asarray(per_epoch)

    def one(state, data, batch, length):
        return training.make_step(cfg, optim.build(cfg.optim, steps, length), steps)(
            state, data, batch)

    def step(state, data, batch):
        data_axes = {"clean": None, "poison": 0, "pair": 0}
        members = jax.vmap(one, in_axes=(0, data_axes, 0, 0))
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size > 1:  # a device trains its own members and asks no other
            own, whole = PartitionSpec(parallel.row_axes(mesh)), PartitionSpec()
            shares = {name: whole if axis is None else own for name, axis in data_axes.items()}
            members = jax.shard_map(members, in_specs=(own, shares, own, own), out_specs=own,
                                    check_vma=False)
        new, values = members(state, data, batch, lengths)
        own = {f"{i}/{name}": v[i] for name, v in values.items() for i in range(len(per_epoch))}
        return new, own | {"loss": values["loss"].mean()}

    return step, jax.vmap(training.make_init(cfg, optim.build(cfg.optim, steps, per_epoch[0])))


@dataclasses.dataclass(frozen=True)
class Feed:
    """The feeds of all members, for train.fit: batches {"index": int32 [members, B]}."""

    data: dict
    feeds: list

    @classmethod
    def of(cls, members: list[Member]) -> "Feed":
        """Clean images once; poisons and pairs stacked, padded to the largest count and side."""
        clean, feeds = None, []
        for m in members:
            feeds.append(feed.make(m.cfg, m.data, clean=clean))
            clean = feeds[-1].data["clean"]
        rows = [made.data["poison"] for made in feeds]
        most = max(len(r["image"]) for r in rows)
        side = max(r["image"].shape[1] for r in rows)
        names = max(rows, key=lambda r: len(r["image"])).keys()
        poisons = {name: np.stack([_padded(r, name, most, side, rows) for r in rows])
                   for name in names}
        n = len(members[0].data.source)
        pairs = [np.concatenate([m.data.pair, np.arange(len(m.data.pair), n + most)])
                 for m in members]
        return cls({"clean": clean, "poison": poisons, "pair": np.stack(pairs).astype(np.int32)},
                   feeds)

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches of all members from `start_step` on, without end; close() it."""
        with contextlib.ExitStack() as stack:
            each = [stack.enter_context(contextlib.closing(f.batches(start_step)))
                    for f in self.feeds]
            while True:
                yield {"index": np.stack([next(batches)["index"] for batches in each])}


def _padded(row, name, most, side, rows):
    """A member's poisons with `most` rows, and images with `side` pixels."""
    like = next((r[name] for r in rows if len(r[name])), row[name])
    value = row[name] if len(row[name]) else np.zeros((0, *like.shape[1:]), like.dtype)
    pad = [(0, most - len(value))] + [(0, 0)] * (value.ndim - 1)
    if name == "image":
        pad[1] = pad[2] = (0, side - value.shape[1])
    return np.pad(value, pad)


def _members(configs_of, folder) -> list[Member]:
    """Victims, and twins of those that have their own, in order; all of one source."""
    source, found = None, []
    for name, cfg in configs_of.items():
        source = source or sources.load(cfg.data, "train")
        plan, rows = poison.load(folder / name)
        captions = texts.load(cfg, folder / name, source)
        victim = PoisonedSet(source, plan, rows, captions)
        _, per_epoch = pretrain.total_steps(cfg, len(victim.kept))
        found.append(Member(folder / name, cfg, victim, per_epoch))
        if cfg.control and not cfg.control_from and len(plan):
            found.append(Member(folder / name / "control", cfg,
                                PoisonedSet(source, texts=captions), per_epoch))
    return found


def _settings(cfg):
    return run_folder.settings_of(cfg, run_folder.PRETRAIN_GROUPS)


def _leave(member: Member, i: int, state: TrainState, steps: int, together: epath.Path) -> None:
    """Gives a member its checkpoint and its lines of metrics, and marks it complete."""
    found = checkpoint.newest_good_step(member.folder / "checkpoints", rename=True)
    with checkpoint.open_manager(member.folder / "checkpoints") as manager:
        if found != steps:
            checkpoint.save(manager, steps, state)
    start = f"train/{i}/"
    with contextlib.closing(metrics.Writer(member.folder, -1)) as writer:
        for line in metrics.read_lines(together / "metrics.jsonl"):
            writer.write(line["step"], {f"train/{k.removeprefix(start)}": v
                                        for k, v in line.items() if k.startswith(start)})
    run_folder.finish(member.folder / "pretrain", _settings(member.cfg), step=steps)


def main(argv: list[str]) -> None:
    """Reads the flags, then runs what is not complete."""
    command.parse_flags(argv, __doc__)
    for flag in (command.FORCE, command.COORDINATOR, command.PROCESSES, command.PROCESS_ID):
        if flag.value is not None:
            raise UserError(f"--{flag.name} is of single runs; a population has one process, and "
                            "is made anew in another --workdir")
    host_memory.keep_pages()
    if jax.default_backend() == "cpu":
        print("warning: on a CPU encoders with convolutions train several times slower together "
              "than one after another (docs/results.md, Speed); launch/sweep.sh does the latter",
              file=sys.stderr)
    folder = epath.Path(command.WORKDIR.value)
    with settings.asked_of(command.CONFIG.value):
        run(configs(command.CONFIG.value, VARY.value), folder, command.ONLY.value,
            check_only=command.CHECK_ONLY.value)


if __name__ == "__main__":
    command.run_main(main, sys.argv)
