"""resolve_model: "demo", a folder, or a hub id that is already in the local cache. Never the network."""

from pathlib import Path

import pytest

from tinyvllm.errors import ModelNotFoundError
from tinyvllm.loader import resolve
from tinyvllm.loader.resolve import hub_cache_folder, resolve_model

CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache."""
    for name in CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def add_snapshot(cache, name="org--model", commit="abc123", ref=True, config=True):
    snapshot = cache / f"models--{name}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    if config:
        (snapshot / "config.json").write_text("{}")
    if ref:
        (cache / f"models--{name}" / "refs").mkdir(exist_ok=True)
        (cache / f"models--{name}" / "refs" / "main").write_text(commit)
    return snapshot


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("./demo").resolve() == resolve_model("~/demo") == tmp_path / "demo"


def test_demo_is_the_embedded_model_whatever_lies_around(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    embedded = tmp_path / "package" / "model"
    monkeypatch.setattr(resolve, "demo_model_folder", lambda: embedded)
    with pytest.raises(
        ModelNotFoundError, match=r"embedded model is not in this installation: .*package.model has no"
    ):
        resolve_model("demo")
    embedded.mkdir(parents=True)
    (embedded / "config.json").write_text("{}")
    assert resolve_model("demo") == embedded


def test_the_embedded_model_belongs_into_the_package():
    assert resolve.demo_model_folder().parts[-3:] == ("tinyvllm", "demo", "model")


def test_a_cached_hub_id_resolves_to_its_main_snapshot(cache):
    old, new = add_snapshot(cache, commit="old", ref=False), add_snapshot(cache, commit="new")
    assert resolve_model("org/model") == new != old


def test_a_hub_id_without_an_organisation(cache):
    assert add_snapshot(cache, name="gpt2") == resolve_model("gpt2")


def test_a_single_snapshot_needs_no_ref(cache):
    assert add_snapshot(cache, ref=False) == resolve_model("org/model")


def test_several_snapshots_without_a_ref_are_listed(cache):
    one, two = add_snapshot(cache, commit="one", ref=False), add_snapshot(cache, commit="two", ref=False)
    with pytest.raises(ModelNotFoundError, match="no main revision: give the path of a snapshot") as error:
        resolve_model("org/model")
    assert str(one) in str(error.value) and str(two) in str(error.value)


def test_an_incomplete_snapshot_is_named(cache):
    add_snapshot(cache, config=False)
    with pytest.raises(ModelNotFoundError, match=r"of 'org/model' is incomplete: .* has no config\.json"):
        resolve_model("org/model")


def test_a_model_that_is_nowhere_says_where_it_looked_and_how_to_get_it(cache):
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model("meta-llama/Llama-3.2-1B-Instruct")
    for part in ("no model 'meta-llama/Llama-3.2-1B-Instruct'", str(cache),
                 "`hf download meta-llama/Llama-3.2-1B-Instruct`", "`huggingface-cli download"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "a/b/c", "~/nowhere"])
def test_what_is_no_hub_id_is_a_missing_folder(cache, model):
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        resolve_model(model)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="is a file: give the folder"):
        resolve_model(tmp_path / "model.safetensors")


def test_the_cache_is_where_the_hubs_client_puts_it(monkeypatch):
    for name in CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert hub_cache_folder() == Path.home() / ".cache" / "huggingface" / "hub"
    cases = [
        ("XDG_CACHE_HOME", "/x", "/x/huggingface/hub"),
        ("HF_HOME", "/h", "/h/hub"),
        ("HUGGINGFACE_HUB_CACHE", "/old", "/old"),
        ("HF_HUB_CACHE", "/c", "/c"),
    ]  # each wins over those before it
    for name, value, expected in cases:
        monkeypatch.setenv(name, value)
        assert hub_cache_folder() == Path(expected)
