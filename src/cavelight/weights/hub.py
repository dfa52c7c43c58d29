"""Checkpoints by name: a folder that is here, or "owner/name" on the Hugging Face hub, fetched into its usual cache."""

import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from cavelight.disk import clear_disk_errors
from cavelight.errors import UserError
from cavelight.spec.events import Event, Note, Phase
from cavelight.weights.headers import abbreviated

# Weights, configuration, tokenizer and chat template, no code; only what lies at the top.
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "*token*.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.jinja",
    "LICENSE*",
]
UNWANTED = ["*/*"]
NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*))?")
LOOK = 0.25  # seconds between two looks at how far a download is


def local_folder(
    source: str | Path, revision: str | None = None, on_event: Callable[[Event], None] = lambda event: None
) -> Path:
    """The folder of a checkpoint: `source` itself if it is one, else what the hub has as "owner/name[@revision]".

    revision: a branch, tag or commit, "main" unless given. It is resolved to a commit before anything is fetched, and
    a Note names that commit. Files that were fetched before are not fetched again, and a connection that breaks off is
    taken up where it broke. Where the hub cannot be reached or refuses, a complete copy fetched before will do.

    Raises UserError where there is neither such a folder nor such a repository, where it is gated or its weights are
    not safetensors, when the network fails and when the disk is full.
    """
    folder = Path(os.path.expanduser(source))  # as os.path, unlike pathlib, does not raise for odd paths
    if os.path.isdir(folder):
        if revision is not None:
            raise UserError(f"{folder} is a folder, which has no revisions", got=revision, do="leave the revision out")
        return folder
    named = NAME.fullmatch(str(source))
    if named is None or os.path.lexists(folder):
        raise UserError(
            f"There is no folder {abbreviated([str(source)])}",
            got="a file" if os.path.lexists(folder) else "",
            why="a checkpoint is a folder with config.json and *.safetensors",
            do="give the path of one, or the name of one on the Hugging Face hub, as owner/name or owner/name@revision",
        )
    if revision and named["revision"]:
        raise UserError(f"{source} names a revision already", got=f"{revision} besides", do="leave one of them out")
    return _fetch(named["name"], revision or named["revision"] or "main", on_event)


def _fetch(name: str, revision: str, on_event: Callable[[Event], None]) -> Path:
    """The folder in the hub's cache that holds a repository's checkpoint, fetched as far as it was not there yet."""
    from huggingface_hub import HfApi, snapshot_download  # slow to import, and needed for names alone
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    # The common base of every failure on the way there is httpx's, or httpx2's: it depends on the hub client's version.
    HTTPError = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    what: dict[str, Any] = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {revision}", do="give a branch, a tag or a commit, or leave the revision out"
        ) from error
    except (HTTPError, OSError) as error:
        unreachable = f"The Hugging Face hub cannot be reached for {name}, and there is no folder of that name here"
        told = _told(error, name, unreachable)
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True, **what))
        except LocalEntryNotFoundError:
            raise told from error
        on_event(Note(f"{told.what}; taking the copy of commit {folder.name} that was fetched before"))
        return folder
    on_event(Note(f"{name}@{revision} is commit {info.sha}"))
    cache = Path(HF_HUB_CACHE)
    bar = _bytes_bar(_missing_bytes(info, cache))
    try:
        with clear_disk_errors(cache), ThreadPoolExecutor(1) as pool:
            task = pool.submit(lambda: snapshot_download(name, revision=revision, tqdm_class=bar, **what))
            folder = Path(_watched(task, bar, f"fetching {name}", on_event))
    except (HTTPError, OSError) as error:
        raise _told(error, name, f"Fetching {name} broke off") from error
    if folder.name != info.sha:
        on_event(Note(f"{name}@{revision} changed just now; this is commit {folder.name}"))
    return folder


def _missing_bytes(info: Any, cache: Path) -> int:
    """How much has to be fetched of a repository that huggingface_hub's ModelInfo describes."""
    from huggingface_hub import try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = [file for file in sizes if "/" not in file and any(fnmatch(file, pattern) for pattern in WANTED)]
    if not any(file.endswith(".safetensors") for file in wanted) or "config.json" not in wanted:
        raise UserError(
            f"{info.id} holds no checkpoint that can be read",
            got=abbreviated(sorted(sizes)) or "no files",
            why="a checkpoint is config.json and *.safetensors",
            do="choose a repository with the original weights",
        )
    cached = (try_to_load_from_cache(info.id, file, cache_dir=cache, revision=info.sha) for file in wanted)
    missing = sum(sizes[file] for file, path in zip(wanted, cached, strict=True) if not isinstance(path, str))
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise UserError(
            f"{info.id} does not fit on the disk",
            got=f"{missing / 1e9:,.1f} GB to fetch, {free / 1e9:,.1f} GB free in {cache}",
            do="free some space, or let HF_HOME name a folder on a larger disk",
        )
    return missing


def _bytes_bar(total: int) -> Any:
    """A class of progress bars that draw nothing and add up what all of them were told of bytes.

    Some versions of the hub's client report each byte twice, as received and as written, on a bar for each: `done` is
    the larger of the two. Once `stop` is set, whoever reports is stopped.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class BytesBar(tqdm):
        wanted = total
        done = 0
        stop = threading.Event()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = kwargs.get("unit") == "B"
            init: Any = super().__init__  # bears no annotations
            init(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.stop.is_set():
                raise InterruptedError("stopped")
            self.n += n or 0
            if self.counts:
                type(self).done = max(type(self).done, int(self.n))

    return BytesBar


def _watched(task: Future[str], bar: Any, title: str, on_event: Callable[[Event], None]) -> str:
    """The result of a download, with its progress reported from this thread; Ctrl-C here stops it there."""
    try:
        while wait([task], LOOK).not_done:
            on_event(Phase(title, min(bar.done, bar.wanted), bar.wanted, "B"))
        result = task.result()
    except BaseException:
        bar.stop.set()
        raise
    on_event(Phase(title, bar.wanted, bar.wanted, "B"))
    return result


def _told(error: BaseException, name: str, broken: str) -> UserError:
    """A failure of the hub's client as a sentence: `broken`, where it is the network's and not the hub's."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    got = f"{type(error).__name__}: {(str(error).splitlines() or ['no more is known'])[0]}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{name} is open only to those who accepted its terms",
            do=f"accept them on its page on the Hugging Face hub, then {login}",
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"There is neither a folder {name} here nor a model {name} on the Hugging Face hub",
            do=f"check the name; if the model is private, {login}",
        )
    if status:
        return UserError(f"The Hugging Face hub refuses {name}", got=got, do=f"try later, or {login}")
    return UserError(
        broken,
        got=got,
        do="check the network, the proxy, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again: "
        "files that are complete are not fetched twice",
    )
