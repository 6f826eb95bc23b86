"""run.json: when, where and with which software each start of a run was made."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

import torchtitan_lite
from torchtitan_lite.training import provenance
from torchtitan_lite.training.provenance import Place, place_of, write_start

PLACES = [Place(host="one", device="GPU"), Place(host="two", device="GPU"), Place(host="two", device="GPU")]


def facts_in(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_start_has_its_time_versions_command_hosts_and_devices(tmp_path: Path) -> None:
    write_start(tmp_path, PLACES, None)
    facts = facts_in(tmp_path)
    started = datetime.fromisoformat(facts["started"])
    assert abs((datetime.now(tz=started.tzinfo) - started).total_seconds()) < 60
    assert started.utcoffset() is not None
    assert facts["versions"]["torchtitan_lite"] == torchtitan_lite.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"].get("cuda") == torch.version.cuda
    assert facts["command"] == shlex.join(sys.orig_argv) and facts["working_directory"] == os.getcwd()
    assert (facts["host"], facts["ranks"], facts["ranks_on_hosts"]) == ("one", 3, {"one": 1, "two": 2})
    assert (facts["devices"], facts["resumed_step"], facts["earlier_starts"]) == ({"GPU": 3}, None, [])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_resumed_run_keeps_the_facts_of_all_earlier_starts(tmp_path: Path) -> None:
    for number, step in enumerate((None, 4, 2)):
        write_start(tmp_path, [Place(host=f"host-{number}", device="CPU")], step)
    facts = facts_in(tmp_path)
    assert (facts["host"], facts["resumed_step"]) == ("host-2", 2)
    earlier = [(start["host"], start["resumed_step"]) for start in facts["earlier_starts"]]
    assert earlier == [("host-0", None), ("host-1", 4)]


@pytest.mark.parametrize(
    "content", [b"", b'{"sta', b"\xff", b"[1]", b'{"earlier_starts": 3}', b"[" * 100_000]
)
def test_an_unreadable_file_is_kept_and_does_not_stop_the_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    write_start(tmp_path, PLACES, 3)
    assert facts_in(tmp_path)["earlier_starts"] == []
    assert (tmp_path / "earlier" / "run.json").read_bytes() == content


def test_a_folder_in_place_of_the_file_is_moved_aside_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    write_start(tmp_path, PLACES, 3)
    assert facts_in(tmp_path)["resumed_step"] == 3
    assert (tmp_path / "earlier" / "run.json").is_dir()


def test_the_device_of_a_cpu_run_is_the_model_of_the_cpu() -> None:
    place = place_of(torch.device("cpu"))
    assert place.host and place.device
    known = Path("/proc/cpuinfo")
    if known.exists() and "model name" in known.read_text():
        assert f": {place.device}\n" in known.read_text()


def test_a_system_that_names_no_cpu_names_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\n")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "aarch64")
    assert place_of(torch.device("cpu")).device == "aarch64"


def test_the_device_of_a_gpu_run_is_the_name_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model of {device}")
    assert place_of(torch.device("cuda:1")).device == "model of cuda:1"


# --- commits ---


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit of one file."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    return make_repository(tmp_path / "repository")


def make_repository(folder: Path) -> Path:
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text("")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "--message", "first")
    git(folder, "-c", "tag.gpgSign=false", "tag", "v1")
    return folder


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_of_the_package_says_whether_files_have_changed(repository: Path, tmp_path: Path) -> None:
    module = repository / "package" / "__init__.py"
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance._commits(module, tmp_path) == {"torchtitan_lite": commit}
    assert provenance._commits(module, repository / "package") == {"torchtitan_lite": commit}
    module.write_text("# changed")
    assert provenance._commits(module, tmp_path) == {"torchtitan_lite": f"{commit}-dirty"}


def test_another_repository_that_the_run_starts_in_has_its_commit_too(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_repository(tmp_path / "other")
    (other / "package" / "__init__.py").write_text("# changed")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # as in a hook of git
    commits = provenance._commits(repository / "package" / "__init__.py", other)
    monkeypatch.delenv("GIT_DIR")
    assert commits == {
        "torchtitan_lite": git(repository, "rev-parse", "HEAD"),
        "working_directory": git(other, "rev-parse", "HEAD") + "-dirty",
    }


def test_a_package_that_is_only_installed_below_a_repository_has_no_commit(repository: Path) -> None:
    module = repository / "venv" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance._commits(module, repository) == {"working_directory": commit}


def test_without_git_or_a_repository_there_is_no_commit(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance._commits(tmp_path / "__init__.py", tmp_path) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._commits(repository / "package" / "__init__.py", repository) == {}
