"""Uploads: only what verifies is sent, and what cannot be sent is said before a run."""

import shutil

import jax
import pytest

from easyaira import push
from easyaira.config.run import is_repo
from easyaira.distributed import mesh as meshes
from easyaira.errors import CheckFailed, ConfigError, StorageError
from easyaira.export import torch_check
from helpers import runs, tiny

REPO = "owner/name"


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return tiny.ground(
        tmp_path_factory.mktemp("push"), {"gpt2": tiny.CONFIGS["gpt2"]}, sft=tiny.sft_rows(16)
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is sent; `hub.fails` is what it raises then."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:
        sent, fails = [], None

        def whoami(self):
            return {"name": "owner"}

        def create_repo(self, repo, *, private, exist_ok):
            assert exist_ok
            Hub.sent.append((repo, private))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if Hub.fails:
                raise Hub.fails
            names = {path.name for path in folder_path.iterdir()}
            Hub.sent.append((repo_id, "model.safetensors" in names, "proof.json" in names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(
        torch_check, "compare_logits", lambda *_, **__: {"compared": False, "why": ""}
    )
    return Hub


def train(ground, out, **options):
    common = {"max_steps": 2, "optimizer.warmup_steps": 1, "export": True, "push_to_hub": REPO}
    runs.train("sft", ground / "gpt2", ground, out, **common | options)


@pytest.fixture(scope="module")
def released(ground, tmp_path_factory):
    out = tmp_path_factory.mktemp("released") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "all_devices", lambda: jax.devices()[:1])
        patch.setattr(
            torch_check, "compare_logits", lambda *_, **__: {"compared": False, "why": ""}
        )
        train(ground, out, push_to_hub="null")
    return out / "hf"


@pytest.mark.slow
def test_a_run_uploads_its_verified_release(ground, hub, tmp_path, capsys):
    train(ground, tmp_path / "run", hub_private_repo=True)
    assert hub.sent == [(REPO, True), (REPO, True, True)]
    assert f"pushed  https://huggingface.co/{REPO}" in capsys.readouterr().out


def test_the_command_uploads_a_folder(released, hub, capsys):
    push.main([str(released), "--repo", REPO])
    assert hub.sent == [(REPO, None), (REPO, True, True)]
    assert "hf_secret" not in capsys.readouterr().out


def test_a_folder_that_does_not_verify_is_not_sent(released, hub, tmp_path):
    shutil.copytree(released, tmp_path / "hf")
    config = tmp_path / "hf/config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(CheckFailed, match="not what was released: files; nothing was sent"):
        push.main([str(tmp_path / "hf"), "--repo", REPO])
    assert hub.sent == []


def test_an_upload_that_fails_says_how_to_go_on(released, hub):
    hub.fails = OSError("connection lost")
    with pytest.raises(StorageError, match=f"connection lost; then run easyaira push .* {REPO}"):
        push.main([str(released), "--repo", REPO])


@pytest.mark.parametrize(
    "variable, value, message",
    [("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set"), ("HF_TOKEN", None, "no token of the hub")],
)
def test_what_cannot_be_sent_is_said_before_the_run(
    variable, value, message, ground, hub, tmp_path, monkeypatch
):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: value)
    if value:
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        train(ground, tmp_path / "run")
    assert not (tmp_path / "run").exists() and hub.sent == []


@pytest.mark.parametrize("name", ["name", "a/b/c", "a b/c", "-a/b", "owner/", "ö/b"])
def test_a_repository_is_owner_and_name(name, ground, released, tmp_path):
    assert not is_repo(name) and is_repo(REPO)
    with pytest.raises(ConfigError, match="expected owner/name"):
        train(ground, tmp_path / "run", push_to_hub=name)
    with pytest.raises(ConfigError, match="expected owner/name"):
        push.main([str(released), f"--repo={name}"])


def test_an_upload_needs_an_export(ground, tmp_path):
    with pytest.raises(ConfigError, match="push_to_hub: uploads the export"):
        train(ground, tmp_path / "run", export=False)
