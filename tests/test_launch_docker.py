"""launch/docker.sh: what it prints, and what it does with a made-up docker."""

import os
import shutil

import pytest

from tests.launching import FLAG, ROOT, dry, launch, program

ASKED = ("docker.sh", "configs/a.py", "runs/a b", FLAG)


def options(words):
    """Of docker run: {name: values}, what has no value left out."""
    found = {}
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        if given:
            found.setdefault(name, []).append(value)
    return found


def test_docker_runs_the_program_on_the_run_folder_alone():
    build, words = dry(*ASKED, JAX_COMPILATION_CACHE_DIR="")
    assert build == ["docker", "build", "-f", "launch/Dockerfile", "-t", "jax_cl_bd:cpu",
                     "launch/.."]
    assert words[:3] == ["docker", "run", "--rm"]
    at = words.index("jax_cl_bd:cpu")  # whose entry point is the program
    assert words[at + 1:] == ["--config=configs/a.py", "--workdir=runs/a b", FLAG]
    found = options(words[:at])
    assert found.pop("volume") == [f"{ROOT}/runs/a b:/app/runs/a b"]
    assert found == {"stop-timeout": ["120"], "shm-size": ["8g"], "env": ["HOME=/tmp"],
                     "user": [f"{os.getuid()}:{os.getgid()}"]}
    assert not (ROOT / "runs" / "a b").exists()


def test_docker_shares_data_gpus_and_the_compilation_cache(tmp_path):
    (tmp_path / "data").mkdir()
    build, words = dry(*ASKED, GPUS="all", TFDS_DATA_DIR=f"{tmp_path}/data", MOUNTS="docs:tests",
                       JAX_COMPILATION_CACHE_DIR="/cache", CUDA_VISIBLE_DEVICES="2,3",
                       SHM_SIZE="1g", IMAGE="mine")
    assert "--build-arg=EXTRA=gpu" in build and "mine" in build and "mine" in words
    found = options(words)
    assert found["gpus"] == ["all"] and found["shm-size"] == ["1g"]
    assert found["volume"][1:] == ["/cache:/cache", f"{tmp_path}/data:{tmp_path}/data:ro",
                                   f"{ROOT}/docs:/app/docs:ro", f"{ROOT}/tests:/app/tests:ro"]
    assert {"JAX_COMPILATION_CACHE_DIR=/cache", f"TFDS_DATA_DIR={tmp_path}/data",
            "JAX_PLATFORMS=cuda", "CUDA_VISIBLE_DEVICES=2,3",
            "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true"} <= set(found["env"])


def test_docker_shares_no_bucket():
    _, words = dry("docker.sh", "configs/a.py", "gs://b/a", JAX_COMPILATION_CACHE_DIR="gs://b/c")
    assert "volume" not in options(words)
    assert "JAX_COMPILATION_CACHE_DIR=gs://b/c" in options(words)["env"]


@pytest.mark.parametrize("there, environment, built, status", [
    (1, {}, False, 7), (0, {}, True, 7), (1, {"BUILD": "1"}, True, 7),
    (0, {"BROKEN": "1"}, True, 1)])
def test_docker_makes_an_image_that_is_missing(tmp_path, there, environment, built, status):
    program(tmp_path / "bin", "docker", f"""echo "$*" >>{tmp_path}/calls
case $1 in
  image) [ {there} = 1 ] ;;
  build) [ -z "${{BROKEN:-}}" ] ;;
  run) exit 7 ;;
esac""")
    done = launch("docker.sh", "configs/a.py", tmp_path / "run", path=tmp_path / "bin",
                  JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/cache", **environment)
    kinds = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert done.returncode == status, done.stderr
    assert ("build" in kinds) == built and ("run" in kinds) == (status == 7)
    assert (tmp_path / "run").is_dir() and (tmp_path / "cache").is_dir()
    assert done.stdout.splitlines()[-1].startswith("docker run" if status == 7 else "docker build")


def test_without_docker_it_says_so(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = launch("docker.sh", "configs/a.py", tmp_path / "run", PATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (2, "error: docker is not installed here\n")
    assert not (tmp_path / "run").exists()
