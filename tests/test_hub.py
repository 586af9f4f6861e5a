"""Names of models on the hub in place of folders, against a double of the hub and against a cache without a network."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from golden_model import ONEVISION, byte_tokenizer
from hub_double import TOKEN, Hub, Repository, running_hub
from run_ranks import run_ranks

from megatron_llave import hub as ours
from megatron_llave.checkpoint.pretrained import find_pretrained
from megatron_llave.checkpoint.resume import starting_from, with_former_init
from megatron_llave.commands import convert, evaluate
from megatron_llave.config.load import load_config, save_config
from megatron_llave.config.redact import config_without_paths, own_name
from megatron_llave.config.schema import RunConfig
from megatron_llave.convert.training_record import training_record
from megatron_llave.embedding.embedder import load_model
from megatron_llave.errors import CheckpointError, ConfigError
from megatron_llave.models.hf.model_card import base_model
from megatron_llave.models.hf.peft_files import find_weights

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with the golden model as org/tiny, and what it must not send beside it."""
    with running_hub() as double:
        monkeypatch.setattr(constants, "ENDPOINT", double.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", double.url + template)
        files = {name: (ONEVISION / name).read_bytes() for name in ("config.json", "model.safetensors")}
        refused = ("pytorch_model.bin", "modeling_tiny.py", "onnx/model.safetensors", "x.npz", "training_args.pt")
        double.repositories["org/tiny"] = Repository()
        double.repositories["org/tiny"].commit({**files, **dict.fromkeys(refused, b"refused")})
        yield double


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache in the hub's layout with the golden model as org/tiny, and no network; the model's commit."""
    commit = "a" * 40
    folder = cache / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ONEVISION / name, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return commit


def test_a_name_is_downloaded_once_and_without_code_or_pickles(hub: Hub, cache: Path):
    found = find_pretrained("org/tiny")
    commit = hub.repositories["org/tiny"].branches["main"]
    assert found.folder == cache / "models--org--tiny" / "snapshots" / commit
    assert sorted(path.name for path in found.folder.rglob("*")) == ["config.json", "model.safetensors"]
    assert ours.name_of(found.folder) == f"org/tiny@{commit}" == found.place and ours.is_pinned(found.place)
    downloads = [request for request in hub.asked if request.startswith("GET") and "resolve" in request]
    assert len(downloads) == 2
    hub.asked.clear()
    assert find_pretrained(f"org/tiny@{commit}").folder == found.folder
    assert not [request for request in hub.asked if request.startswith("GET") and "resolve" in request]


def test_a_branch_a_commit_and_what_is_newest_are_told_apart(hub: Hub):
    repository = hub.repositories["org/tiny"]
    first = repository.branches["main"]
    tuned = repository.commit({"config.json": (ONEVISION / "config.json").read_bytes()}, "tuned")
    assert ours.local_folder("org/tiny@tuned").name == tuned != first == ours.local_folder("org/tiny").name
    repository.commit({"README.md": b"new"})
    assert ours.local_folder("org/tiny").name == repository.branches["main"] != first
    assert ours.local_folder(f"org/tiny@{first}").name == first


def test_other_ranks_of_a_node_take_what_the_first_has_downloaded(hub: Hub, monkeypatch):
    # A new process, which has imported nothing but the package, finds no attribute `errors` in it.
    monkeypatch.delattr("huggingface_hub.errors")
    folder = ours.local_folder("org/tiny")
    hub.asked.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ours.local_folder("org/tiny") == folder and hub.asked == []
    hub.repositories["org/other"] = hub.repositories["org/tiny"]
    assert ours.local_folder("org/other").name == folder.name and hub.asked  # the first had not been here


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", r"org/none does not exist here, and http://\S+/org/none is no model, or a private one"),
        ("org/gated", r"org/gated does not exist here, and http://\S+/org/gated is gated: accept its terms there"),
        ("org/tiny@v9", r"org/tiny@v9 does not exist here, and \S+ has no branch, tag or commit v9"),
        ("a/b/c", "a/b/c does not exist; name a checkpoint"),
        ("none", "none does not exist; name a checkpoint"),
        ("/org/none", "/org/none does not exist; name a checkpoint"),
    ],
)
def test_what_is_no_model_is_one_line(hub: Hub, name: str, message: str):
    hub.repositories["org/gated"] = Repository(gated=True)
    with pytest.raises(CheckpointError, match=f"^{message}"):
        find_pretrained(name)


def test_without_a_network_the_cache_counts(offline: str, cache: Path):
    assert find_pretrained("org/tiny").place == find_pretrained(f"org/tiny@{offline}").place == f"org/tiny@{offline}"
    for name, where in (("org/other", "org/other"), ("org/tiny@v2", "org/tiny at v2")):
        message = f"^{name} does not exist here, and as a model of the hub, {where} is not complete in the cache"
        with pytest.raises(CheckpointError, match=f"{message} {cache}, and HF_HUB_OFFLINE is set"):
            find_pretrained(name)


def test_an_unreachable_hub_and_a_missing_package_are_one_line(cache: Path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"is not complete in the cache \S+, and http://127.0.0.1:9 cannot be"):
        find_pretrained("org/tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match=r"org/tiny does not exist; .*need huggingface_hub: pip install huggingface_hub"
    ):
        find_pretrained("org/tiny")
    with pytest.raises(ConfigError, match="--push needs huggingface_hub: pip install huggingface_hub"):
        ours.Destination("org/tiny")


def test_a_folder_wins_over_a_name_and_other_folders_have_none(offline: str, tmp_path: Path):
    shutil.copytree(ONEVISION, "org/tiny")
    assert find_pretrained("org/tiny").folder == Path("org/tiny") and not ours.is_name("org/tiny")
    elsewhere = tmp_path / "models--org--tiny" / "snapshots" / offline
    shutil.copytree(ONEVISION, elsewhere)
    assert ours.name_of(elsewhere) is None and ours.name_of("org/tiny") is None


def test_commands_take_names(groups, offline: str, tmp_path: Path, capsys, monkeypatch):
    model = load_model("org/tiny", [f"data.tokenizer={byte_tokenizer(tmp_path)}"])
    assert model.source.place == f"org/tiny@{offline}"
    for words in (["inspect", "org/tiny"], ["import", "--from", "org/tiny@main", "--to", "ckpt"]):
        monkeypatch.setattr(convert.process_groups, "destroy_distributed", lambda: None)  # the test goes on with them
        with pytest.raises(SystemExit) as ended:
            convert.main(words)
        assert ended.value.code == 0, capsys.readouterr().err
    assert load_config("ckpt/config.yaml").checkpoint.init == f"org/tiny@{offline}"
    said = training_record(Path("ckpt"), load_config("ckpt/config.yaml"))
    assert f"the conversion started from. They are those of org/tiny@{offline}.\n" in said
    assert find_pretrained("org/tiny").as_base(None).source == f"org/tiny@{offline}"
    with pytest.raises(SystemExit):
        evaluate.main(["prepared", "--checkpoint", "org/tiny", "--data", "x"])
    assert "org/tiny is a model of the hub: --out names the report's folder" in capsys.readouterr().err


def test_an_adapters_base_may_be_on_the_hub(offline: str, tmp_path: Path):
    for revision in ({}, {"revision": offline}, {"revision": None}):
        values = {"base_model_name_or_path": "org/tiny", **revision}
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        folder, adapter = find_weights(tmp_path, None)
        assert folder.name == offline and adapter == tmp_path
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/none"}')
    with pytest.raises(CheckpointError, match="^org/none does not exist here"):
        find_weights(tmp_path, None)


def test_a_run_notes_the_commit_and_keeps_it(offline: str, tmp_path: Path, monkeypatch):
    tokenizer = byte_tokenizer(tmp_path)
    given = RunConfig()
    given.data.tokenizer, given.checkpoint.init = str(tokenizer), "org/tiny"
    given.train.output, given.train.steps, given.data.path = str(tmp_path / "run"), 1, "data"
    begun = starting_from(find_pretrained("org/tiny"), given)
    assert begun.checkpoint.init == f"org/tiny@{offline}"
    assert own_name(begun.checkpoint.init) == begun.checkpoint.init
    run = f"checkpoint: {{init: {begun.checkpoint.init}}}"
    assert base_model(None, "Qwen", run) == "org/tiny" and base_model(None, "Qwen", "checkpoint: {init: a/b}") is None
    assert config_without_paths({"init": f"/x/org/tiny@{offline}"}) == {"init": f"tiny@{offline}"}
    (tmp_path / "run").mkdir()
    save_config(begun, tmp_path / "run" / "config.yaml")
    assert with_former_init(given) is given  # a new run
    for init, expected in (
        ("org/tiny", begun.checkpoint.init),
        ("org/tiny@main", begun.checkpoint.init),
        ("org/other", "org/other"),
        (f"org/tiny@{'b' * 40}", f"org/tiny@{'b' * 40}"),
        (str(ONEVISION), str(ONEVISION)),
    ):
        given.checkpoint.resume, given.checkpoint.init = "auto", init
        assert with_former_init(given).checkpoint.init == expected
    given.checkpoint.resume, given.checkpoint.init = None, "org/tiny"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert with_former_init(given).checkpoint.init == begun.checkpoint.init


@pytest.mark.slow
def test_two_ranks_train_from_a_name(hub: Hub, cache: Path, openmoji_data: Path, tmp_path: Path, monkeypatch):
    """The files are downloaded once, and a resumed run keeps the commit that it began from."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    config, run, commit = tmp_path / "run.yaml", tmp_path / "run", hub.repositories["org/tiny"].branches["main"]
    config.write_text("train: {steps: 2, global_batch_size: 4}\nlog: {histogram_interval: 0}\n")
    paths = [f"data.path={openmoji_data}", f"data.tokenizer={byte_tokenizer(tmp_path)}", f"train.output={run}"]
    for overrides in (["train.steps=2"], ["train.steps=3", "checkpoint.resume=auto"]):
        script = Path(__file__).parent / "distributed" / "check_hub.py"
        run_ranks(2, script, "--config", str(config), "checkpoint.init=org/tiny", *paths, *overrides)
        assert load_config(run / "config.yaml").checkpoint.init == f"org/tiny@{commit}"
        downloads = [request for request in hub.asked if request.startswith("GET") and "resolve" in request]
        assert len(downloads) == 2
        hub.repositories["org/tiny"].commit({"README.md": b"new"})
    assert (run / "checkpoints" / "step-0000003").is_dir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ONEVISION / name, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def test_a_folder_is_pushed_as_one_private_commit_and_found_by_its_name(hub: Hub, folder: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = ours.Destination("me/new").push(folder, "Exported")
    repository = hub.repositories["me/new"]
    assert repository.private and url == f"{hub.url}/me/new/commit/{repository.branches['main']}"
    assert repository.messages == ["", "Exported"]
    pushed = repository.commits[repository.branches["main"]]
    names = ["config.json", "model.safetensors", "README.md", "1_Pooling/config.json"]
    assert {name: pushed[name] for name in names} == {name: (folder / name).read_bytes() for name in names}
    assert find_pretrained("me/new").fingerprint() == find_pretrained(folder).fingerprint()
    ours.Destination("me/new@tuned").push(folder, "Again")
    assert set(repository.branches) == {"main", "tuned"} and repository.branches["main"] in url
    ours.Destination("me/open", public=True).push(folder, "Exported")
    assert not hub.repositories["me/open"].private


def test_nothing_is_pushed_that_is_not_to_be(hub: Hub, folder: Path, monkeypatch):
    with pytest.raises(ConfigError, match="--push me/new: .*log in with `hf auth login` or HF_TOKEN"):
        ours.Destination("me/new")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="--push new must be org/name"):
        ours.Destination("new")
    destination = ours.Destination("me/new")
    (folder / "optimizer.pt").touch()
    with pytest.raises(ConfigError, match="optimizer.pt is not a file of a model; nothing was pushed"):
        destination.push(folder, "x")
    (folder / "optimizer.pt").unlink()
    (folder / "tokenizer_config.json").write_text('{"name_or_path": "/home/me/models/x"}')
    with pytest.raises(ConfigError, match="tokenizer_config.json tells a path of this machine, /home/me/models/x;"):
        destination.push(folder, "x")
    assert "me/new" not in hub.repositories
    (folder / "tokenizer_config.json").unlink()
    hub.refuses_commits = True
    with pytest.raises(ConfigError, match="--push me/new as tester: .*the hub refuses this commit.* is complete"):
        destination.push(folder, "x")
    assert list(hub.repositories["me/new"].commits) == list(hub.repositories["me/new"].branches.values())
