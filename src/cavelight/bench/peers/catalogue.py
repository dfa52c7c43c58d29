"""All peers by name: how the program of each is found, and how it is opened."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from cavelight.bench.peers import llama_cpp, vllm
from cavelight.bench.peers.gguf import check_package
from cavelight.bench.peers.subject import Subject
from cavelight.bench.peers.transformers import Transformers
from cavelight.bench.sweep import Peer
from cavelight.errors import UserError

Opener = Callable[[Subject], AbstractContextManager[Peer]]  # raises UserError where a model cannot be compared


def _transformers(given: Path | None) -> Opener:
    if given is not None:
        raise UserError(
            "transformers runs in this process", got=f"--peer {given}", do="leave --peer out: it is for other peers"
        )
    return lambda subject: nullcontext(Transformers(subject.folder(), subject.config, subject.dtype))


def _llama_cpp(given: Path | None) -> Opener:
    program = llama_cpp.find(given)
    check_package()
    return lambda subject: nullcontext(llama_cpp.LlamaCpp(subject, program))


def _vllm(given: Path | None) -> Opener:
    program = vllm.find(given)
    return lambda subject: vllm.Vllm(subject, program)


# From what was given as its program, if anything; each raises UserError where it is not.
PEERS: dict[str, Callable[[Path | None], Opener]] = {
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
}


def named(name: str, program: Path | None = None) -> Opener:
    """How a peer is opened; its program is looked for now. Raises UserError for a name or a program that is not."""
    if name not in PEERS:
        raise UserError("There is no such peer", got=name, do=f"write --against with one of {', '.join(PEERS)}")
    return PEERS[name](program)
