"""What programs share: --help, config files and their arguments; modules that are no program."""

import runpy
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from jax_cl_bd import __main__ as command
from jax_cl_bd import bench, command_line, compile_for, errors, export, population, report
from jax_cl_bd.data import prepare
from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts import __main__ as layouts
from jax_cl_bd.reporting import detection, layout_law
from tests.command_line import ROOT
from tests.command_line import command as start

QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def helped(main, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("module", [command, bench, population, compile_for])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_programs_with_a_config(module, word, capsys):
    said = helped(module.main, ["program", word], capsys)
    assert said.startswith(module.__doc__) and "  --config: " in said
    assert "--alsologtostderr" not in said and "quickstart, " not in said
    said = helped(module.main, ["program", f"--config={QUICKSTART}:debug", word], capsys)
    assert f"\n{QUICKSTART}:\nNoisy Alignment on UCI digits, with SimCLR" in said


@pytest.mark.parametrize("module", [report, export, prepare, layouts, detection, layout_law])
def test_help_of_programs_without_a_config(module, capsys):
    assert module.__doc__.strip() in helped(module.main, ["--help"], capsys)


@pytest.mark.parametrize("module, arguments, says", [
    (export, [], "required: --workdir, --to; python -m jax_cl_bd.export --help"),
    (export, ["--workdir=a", "--to=b", "--format=jpg"], "--format: invalid choice: 'jpg'"),
    (report, [], "required: DIR")])
def test_what_argparse_refuses_is_a_line(module, arguments, says):
    with pytest.raises(UserError, match=says) as refusal:
        module.main(arguments)
    assert "\n" not in str(refusal.value)


def test_help_of_the_program_itself_is_status_0():
    process = start("--help")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and "--[no]check_only: " in out


@pytest.mark.parametrize("module, instead", [
    ("poison", "--stages=poison"), ("pretrain", "--stages=pretrain"),
    ("evaluate", "--stages=evaluate"), ("defend", "--stages=defend"), ("preview", "poison"),
    ("train", "--stages=pretrain"), ("data.prepare_pairs", "jax_cl_bd.data.prepare pairs"),
    ("layouts.bench", "jax_cl_bd.bench layout")])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_part_of_a_program_says_which(module, instead, capsys):
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"jax_cl_bd.{module}", run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and instead in said


@pytest.mark.parametrize("text, says", [
    ("def get_config(arg=''):\n    return (", "SyntaxError: '\\(' was never closed .*line 2"),
    ("def get_config(arg=''):\n    return {}['x']", "fails in line 2: KeyError: 'x'"),
    ("import nosuchmodule\ndef get_config(): pass", "line 1: ModuleNotFoundError: .*nosuchmodule"),
    ("def get_config(): pass", "gives NoneType, not a ConfigDict"),
    ("def get_config(): return int('x')", "bad.py: invalid literal"),
    ("x = 1", "is no experiment file: it defines no get_config\\(\\) \\(allowed: .*other.py")])
def test_a_config_file_that_fails_is_a_line(tmp_path, text, says):
    (tmp_path / "bad.py").write_text(text)
    (tmp_path / "other.py").write_text("def get_config(): pass")
    with pytest.raises(UserError, match=says) as refusal:
        command_line.experiment(str(tmp_path / "bad.py"))
    assert "\n" not in str(refusal.value)


def test_only_experiment_files_are_offered(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="did you mean 'configs/quickstart.py'") as refusal:
        command_line.experiment("configs/quickstrat.py:debug")
    assert "common.py" not in str(refusal.value) and "defenses.py" not in str(refusal.value)
    with pytest.raises(UserError, match="configs/common.py is no experiment file"):
        command_line.experiment("configs/common.py")
    with pytest.raises(UserError, match="'configz/quickstart.py' does not exist"):
        command_line.experiment("configz/quickstart.py")


@pytest.mark.parametrize("place", ["the repository", "elsewhere"])
def test_a_config_file_finds_its_imports_from_any_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".", str(ROOT))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    file = tmp_path / "mine.py"
    file.write_text("from configs import quickstart\nget_config = quickstart.get_config")
    found = command_line.experiment(QUICKSTART if place == "the repository" else str(file))
    assert found.data.name == "digits" and str(ROOT) in sys.path


@pytest.mark.parametrize("file, says", [
    ("quickstart.py:atack=none", "the colon of --config, 'atack'; did you mean 'attack'"),
    ("clip_scenes.py:badnet", "'badnet'; did you mean 'badnets'"),
    ("quickstart.py:defense=distil", "unknown defense 'distil'; did you mean 'distill'"),
    ("quickstart.py:defense=zzz", r"unknown defense 'zzz' \(allowed"),
    ("quickstart.py:seed=x", "argument seed='x'"),
    ("clip_scenes.py:badnets,wanet", "several attacks")])
def test_arguments_after_the_colon(file, says):
    with pytest.raises(UserError, match=says):
        command_line.experiment(str(ROOT / "configs" / file))


@pytest.mark.parametrize("word, says", [
    ("--config.optim.ler=1", r"unknown setting in --config.optim.ler, 'ler'; did you mean 'lr'\?"),
    ("--config.opt.lr=1", "in --config.opt.lr, 'opt'; did you mean 'optim'"),
    ("--config.zzzzzz=1", r"'zzzzzz' \(allowed"), ("--noconfig.kontrol", "did you mean 'control'"),
    ("--config.seed.x=1", "'x' would be part of int 0")])
@pytest.mark.parametrize("words", [[f"--config={QUICKSTART}"], ["--config", QUICKSTART]])
def test_a_misspelt_setting_is_named_with_its_path(words, word, says):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    with pytest.raises(UserError, match=says) as refusal:
        command_line.parse(values, ["program", *words, word], "")
    assert "\n" not in str(refusal.value) and "\\" not in str(refusal.value)


def test_what_is_like_nothing_gets_no_suggestion():
    assert "mean" not in str(errors.unknown("word", "qqqq", ("none", "distill")))
    assert "did you mean 'distill'" in str(errors.unknown("word", "distil", ("none", "distill")))
