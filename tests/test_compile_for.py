"""Steps compiled for TPUs that are not there: arguments, collectives, what is said of them."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import clip_scenes, imagenet100, quickstart
from jax_cl_bd import bench, compile_for, hlo, parallel
from jax_cl_bd.errors import UserError

TEXT = '''HloModule jit_f

%wide.body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %hop = f32[4,8]{1,0} collective-permute(%x), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
}

%below (q: (s32[], f32[2])) -> pred[] {
  %number.7 = s32[]{:T(128)} constant(5), metadata={op_name="while"}
  %at = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%at, %number.7), direction=LT
}

%scanned (q: (s32[], f32[2])) -> (s32[], f32[2]) {
  %step = f32[2]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
}

%all-reduce-scatter (input: bf16[512,256]) -> bf16[128,256] {
  %all-reduce.4 = bf16[512,256]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=7, \
replica_groups={{0,1,2,3}}, to_apply=%add
}

%fused.1 (b: f32[1,8]) -> (f32[1,8], f32[8,8]) {
  %spread.1 = f32[8,8]{1,0} all-gather(%b), channel_id=9, dimensions={0}
  ROOT %started = (f32[1,8], f32[8,8]) custom-call(%spread.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (b: f32[1,8]) -> (f32[1,8], f32[8,8]) {
  %spread.2 = f32[8,8]{1,0} all-gather(%b), channel_id=9, dimensions={0}
}

%fused.3 (b: f32[1,8]) -> f32[8,8] {
  %spread.3 = f32[8,8]{1,0} all-gather(%b), channel_id=9, dimensions={0}
  ROOT %ended = f32[8,8] custom-call(%spread.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %while.1 = (s32[], f32[4,8]{1,0}) while(%t), condition=%cond, body=%wide.body, \
backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}
  %while.2 = (s32[], f32[2]{0}) while(%u), condition=%below, body=%scanned
  %fusion = bf16[128,256]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  %ag = (f32[4,8]{1,0}, f32[16,8]{1,0:T(8,128)}) all-gather-start(%a), \
replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(f)/dot_general"}
  %s1 = (f32[1,8], f32[8,8]) fusion(%b), kind=kCustom, calls=%fused.1
  %s2 = (f32[1,8], f32[8,8]) fusion(%b, %s1), kind=kCustom, calls=%async_collective_fusion.2
  %s3 = f32[8,8] fusion(%b, %s2), kind=kCustom, calls=%fused.3
  %within = f32[8,8]{1,0} all-gather(%a), replica_groups=mesh['axis_0'=2,'axis_1'=4], \
device_ids=([4,2]T(1,0)) {'axis_0'}, dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%ag)
  ROOT %r = f32[4,8]{1,0} all-reduce(%a), \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, to_apply=%add
}

%never (a: f32[4,8]) -> f32[4,8] {
  %unused = f32[4,8]{1,0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
}
'''


def test_collectives_of_a_program():
    found = {c.name: c for c in hlo.collectives(TEXT, 8)}
    assert sorted(found) == ["ag", "all-reduce.4", "hop", "r", "spread.1", "step",
                             "within"]
    hop, scatter, gather, reduce = (found[n] for n in ("hop", "all-reduce.4", "ag", "r"))
    assert (hop.kind, hop.times, hop.sent_bytes) == ("collective-permute", 7, 7 * 4 * 8 * 4)
    assert (found["step"].times, found["step"].sent_bytes) == (5, 5 * 2 * 4)
    assert found["within"].group == 2
    assert (scatter.kind, scatter.group) == ("reduce-scatter", 4)
    assert scatter.sent_bytes == 512 * 256 * 2 * 3 / 4
    assert (gather.kind, gather.group, gather.result_bytes) == ("all-gather", 4, 16 * 8 * 4)
    assert gather.sent_bytes == 16 * 8 * 4 * 3 / 4 and gather.source == "jit(f)/dot_general"
    assert (reduce.group, reduce.sent_bytes) == (8, 2 * 4 * 8 * 4 * 7 / 8)


def test_collectives_of_a_step_that_was_compiled():
    """The similarities of rows cut over 8 devices: one all-gather of them, one sum."""
    mesh = parallel.make_mesh(ConfigDict({"data": 8, "fsdp": 1}))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=parallel.rows(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: jax.nn.logsumexp(x @ x.T, axis=1).mean()).lower(x).compile()
    found = {c.kind: c for c in hlo.collectives(compiled.as_text(), 8)}
    assert sorted(found) == ["all-gather", "all-reduce"]
    assert found["all-gather"].sent_bytes == 64 * 16 * 4 * 7 / 8
    assert found["all-reduce"].sent_bytes == 2 * 4 * 7 / 8


@pytest.mark.parametrize("cfg, feed", [
    (quickstart.get_config("debug"), "resident"),
    (clip_scenes.get_config("badnets,debug"), "streamed"),
    (clip_scenes.get_config("badnets,objective=roclip,debug"), "resident")])
def test_arguments_are_those_of_a_real_feed(cfg, feed, monkeypatch):
    monkeypatch.setattr(bench, "born_sharded", lambda *_: (None, None))
    cfg.data.feed, cfg.data.workers = feed, 0
    _, made, *_ = bench._setup(cfg)
    batches = made.batches(0)
    real = (made.data, next(batches))
    batches.close()
    rows = len(made.data["pair"]) - cfg.attack.poisons
    if cfg.text.name != "none":  # of scenes, which a config does not count
        cfg.data.captions_per_row = made.data["poison"]["tokens"].shape[1]
    shapes = jax.tree.map(lambda a: (a.shape, np.asarray(a).dtype.name), real)
    assert compile_for.feed_shapes(cfg, rows) == shapes


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr(compile_for, "topology_devices", lambda name: jax.devices())


def test_a_step_is_compiled_and_described(eight):
    cfg = quickstart.get_config("debug")
    found = compile_for.compile_for(cfg, "v5e:2x4", 200)
    json.dumps(found)
    assert found["devices"] == 8 and found["fits"] and found["memory_bytes"] > 0
    assert found["collectives"]["all-reduce"]["count"] > 0 and not found["replicated"]
    parts = found["predicted_parts"]
    assert found["predicted_step_seconds"] == pytest.approx(
        max(parts["compute"], parts["memory"]) + parts["links"])
    said = compile_for.text(found)
    assert said.startswith("v5e:2x4: 8 chips, global batch 16, compiled in")
    assert "fits: " in said and "predicted, not measured:" in said


@pytest.mark.slow
def test_what_does_not_fit_and_what_is_held_whole_is_said(eight, monkeypatch):
    monkeypatch.setitem(compile_for.CHIPS, "v5e", (197e12, 1e3, 819e9, 200e9))
    monkeypatch.setattr(compile_for, "LARGE", 1e5)
    cfg = quickstart.get_config("debug")
    found = compile_for.compile_for(cfg, "v5e:2x4", 2000)
    assert not found["fits"] and "DOES NOT FIT" in compile_for.text(found)
    assert found["replicated"] == {"data['clean']['image']": 2000 * cfg.data.image_size**2 * 3}
    assert "every chip holds all of data['clean']['image']" in compile_for.text(found)


def test_what_the_compiler_refuses_for_its_memory_does_not_fit():
    error = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 20.27G exceeds 15.75G.\nmore")
    found = {"topology": "v5e:2x4", "devices": 8, "batch_size": 16, "fits": False,
             "refused": compile_for._sentence(error), "replicated": {"data['x']": 2e8}}
    assert compile_for.text(found).splitlines() == [
        "v5e:2x4: 8 chips, global batch 16",
        "DOES NOT FIT: the compiler says: Ran out of memory on HBM, 20.27G exceeds 15.75G.",
        "warning: every chip holds all of data['x'], 200 MB"]


def test_a_refusal_for_memory_is_an_answer_and_others_are_errors(eight, monkeypatch):
    def refuse(kind):
        def compile(self, *args, **kwargs):
            raise jax.errors.JaxRuntimeError(f"{kind}: Ran out of memory on HBM.")
        monkeypatch.setattr(jax.stages.Lowered, "compile", compile)

    refuse("RESOURCE_EXHAUSTED")
    found = compile_for.compile_for(quickstart.get_config("debug"), "v5e:2x4", 200)
    assert not found["fits"] and found["refused"] == "Ran out of memory on HBM."
    refuse("INTERNAL")
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_for.compile_for(quickstart.get_config("debug"), "v5e:2x4", 200)


@pytest.mark.parametrize("config, topology, message", [
    (None, "v5e:2x2", "--config is missing"), (1, None, "--topology is missing")])
def test_missing_flags_are_named(config, topology, message, monkeypatch):
    monkeypatch.setattr(compile_for, "FLAGS", lambda argv: argv)
    monkeypatch.setattr(compile_for, "CONFIG", SimpleNamespace(value=config))
    monkeypatch.setattr(compile_for, "TOPOLOGY", SimpleNamespace(value=topology))
    with pytest.raises(UserError, match=message):
        compile_for.main(["compile_for"])


def test_an_unknown_chip_is_refused():
    with pytest.raises(UserError, match="unknown chip 'v5'.*did you mean 'v5"):
        compile_for.topology_devices("v5:2x2")


def test_a_batch_that_chips_cannot_share_is_refused(eight):
    cfg = imagenet100.get_config("debug")
    cfg.train.batch_size = 12
    with pytest.raises(UserError, match="must be a positive multiple of the 8 devices"):
        compile_for.compile_for(cfg, "v5e:2x4", 200)


@pytest.mark.slow
def test_libtpu_compiles_for_chips_that_are_not_there():
    pytest.importorskip("libtpu")
    found = compile_for.compile_for(quickstart.get_config("debug"), "v5e:2x2", 200)
    assert found["devices"] == 4 and found["fits"]
