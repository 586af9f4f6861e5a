"""Names of models on the Hugging Face hub, which may stand wherever a folder of weights does, and pushing to it.

A name is org/name or org/name@revision, where a revision is a branch, a tag or a commit. A folder of that name wins.
What is downloaded lies in the hub's own cache (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN count as for every
tool of the hub), in a folder whose name is the commit. Nothing is downloaded that could hold code or pickles.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_llave.errors import CheckpointError, ConfigError, import_optional, one_line

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_GIVEN = re.compile(rf"({_NAME})(?:@([^\s@]+))?")
_PINNED = re.compile(rf"{_NAME}@[0-9a-f]{{40}}")
_SNAPSHOT = re.compile(r"models--((?:(?!--).)+)--([^/]+)/snapshots/([0-9a-f]{40})")
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md")
"""Files that are downloaded: weights, configurations, tokenizers, the card."""
PUSHED = (*FILES, ".gitattributes")
"""Files that are pushed; a folder that holds others is refused."""
_VOCABULARIES = ("vocab.json", "tokenizer.json", "added_tokens.json")
_PATH = re.compile(r'"(/[^"/\n]+/[^"\n]*)"')
INSTALL = "pip install huggingface_hub (the extra hub)"


def local_folder(path: str | Path) -> Path:
    """Return a folder as it is, and of the name of a model the folder that holds it, which is downloaded if need be.

    A text that is neither comes back as it is; whoever reads the folder says that it does not exist. On each node, the
    first rank downloads while the others wait.

    Raises:
        CheckpointError: the name is no folder, and not a model that can be downloaded or is in the cache; or the
            package huggingface_hub is not installed.
    """
    given = _GIVEN.fullmatch(str(path))
    if given is None or os.path.exists(path):
        return Path(path)
    what = f"{path} does not exist; name a checkpoint, an output directory or a Hugging Face folder"
    needs = f"{what}; models of the hub need"
    huggingface_hub = import_optional("huggingface_hub", needs, INSTALL, error=CheckpointError)
    name, revision = given[1], given[2]
    try:
        with _alone(name):
            return Path(_download(huggingface_hub, name, revision))
    except (OSError, ValueError) as error:  # all errors of huggingface_hub are of these kinds
        raise CheckpointError(f"{path} does not exist here, and {_reason(error, name, revision)}") from error


def _download(huggingface_hub: Any, name: str, revision: str | None) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError  # the package alone has no attribute `errors` yet

    options = {"revision": revision, "allow_patterns": list(FILES), "ignore_patterns": ["*/*"]}
    if os.environ.get("LOCAL_RANK", "0") != "0" and _is_listed(name):
        with suppress(LocalEntryNotFoundError):
            return huggingface_hub.snapshot_download(name, local_files_only=True, **options)
    return huggingface_hub.snapshot_download(name, **options)


def _is_listed(name: str) -> bool:
    """Whether the cache has lists of the model's files, from which huggingface_hub sees what is missing of it."""
    return any((_cache() / _folder_name(name) / "trees").glob("*.json"))


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder_name(name: str) -> str:
    return f"models--{name.replace('/', '--')}"


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Let the ranks of a node, and nodes that share a cache with locks, download a model one after the other."""
    path = _cache() / ".locks" / _folder_name(name) / "megatron_llave.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError:  # a cache that cannot be written, into which nothing is downloaded
        yield
        return
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """Why a model cannot be had, and what would help."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        return f"{page} is gated: accept its terms there, and log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no branch, tag or commit {revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{page} is no model, or a private one that needs `hf auth login` or HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        where = f"{name}{f' at {revision}' if revision else ''} is not complete in the cache {constants.HF_HUB_CACHE}"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"as a model of the hub, {where}, and {why}"
    return f"as a model of the hub it cannot be downloaded: {one_line(error)}"


def name_of(folder: str | Path) -> str | None:
    """Return org/name@commit of a folder in the hub's cache; None for any other folder."""
    found = _SNAPSHOT.search(Path(folder).as_posix())
    if found is None:
        return None
    try:
        is_cached = Path(folder).resolve().is_relative_to(_cache().resolve())
    except ImportError:
        return None
    return f"{found[1]}/{found[2]}@{found[3]}" if is_cached else None


def is_pinned(text: str) -> bool:
    """Whether a text is org/name@commit, which names the same weights on every machine."""
    return _PINNED.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether a text would be taken for a model of the hub: it has the form of a name, and there is no such folder."""
    return _GIVEN.fullmatch(text) is not None and not os.path.exists(text)


class Destination:
    """A model on the hub that a folder is pushed to."""

    def __init__(self, given: str, public: bool = False) -> None:
        """Check the name and who pushes, before there is anything to push.

        Args:
            given: org/name, or org/name@branch; a branch that does not exist is made.
            public: whether a repository that does not exist yet is public; otherwise only its owner sees it.

        Raises:
            ConfigError: the name is not of this form, nobody is logged in, the hub is out of reach, or the package
                huggingface_hub is not installed.
        """
        parts = _GIVEN.fullmatch(given)
        if parts is None:
            raise ConfigError(f"--push {given} must be org/name or org/name@branch, a model on the Hugging Face hub")
        huggingface_hub = import_optional("huggingface_hub", "--push needs", INSTALL)
        self.name, self.revision, self.public, self.api = parts[1], parts[2], public, huggingface_hub.HfApi()
        try:
            self.user = self.api.whoami()["name"]
        except (OSError, ValueError) as error:
            why = f"{self.api.endpoint} does not say who you are ({one_line(error)})"
            raise ConfigError(f"--push {given}: {why}; log in with `hf auth login` or HF_TOKEN") from error

    def push(self, folder: str | Path, message: str) -> str:
        """Push the files of a folder as one commit; returns its URL. A failure leaves the branch as it was.

        Raises:
            ConfigError: the folder holds something else than a model's files, or the hub refuses.
        """
        files = sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if not path.is_dir())
        other = [file for file in files if not any(file.match(pattern) for pattern in PUSHED)]
        if other:
            raise ConfigError(f"--push {self.name}: {folder}/{other[0]} is not a file of a model; nothing was pushed")
        for file in files:
            text = "" if file.name in _VOCABULARIES or file.suffix != ".json" else (Path(folder) / file).read_text()
            path = _PATH.search(text)
            if path is not None:
                what = f"{folder}/{file} tells a path of this machine, {path[1]}"
                raise ConfigError(f"--push {self.name}: {what}; correct it; nothing was pushed")
        try:
            self.api.create_repo(self.name, private=not self.public, exist_ok=True)
            if self.revision is not None:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            done = self.api.upload_folder(
                repo_id=self.name, folder_path=folder, revision=self.revision, commit_message=message
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"--push {self.name} as {self.user}: {one_line(error)}; {folder} is complete") from error
        return str(done.commit_url)
