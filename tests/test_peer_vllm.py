"""`bench --against vllm`: steps counted as they are told, and a vLLM that computes another model found out.

A module written here stands in for vLLM, in a child like the true one's; CAVELIGHT_VLLM names a python that has vLLM.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from cavelight.bench import cases as bench_cases
from cavelight.bench.cases import Case
from cavelight.bench.peers import vllm
from cavelight.bench.peers.subject import Subject
from cavelight.bench.peers.vllm import Vllm
from cavelight.errors import UserError
from cavelight.model.transformer import Transformer
from cavelight.spec.presets import preset
from cavelight.weights.snapshot import write_checkpoint

from .reference.tiny import tiny
from .run_models import random_model

PYTHON = Path(sys.executable)
# The engine takes 8 prompt tokens a step, of one sequence after another, and a token of each that is past its prompt;
# log probabilities are those that the test wrote down for it.
FAKE = """
import json, time
from types import SimpleNamespace as Some

__version__ = "9.9"


class SamplingParams(Some):
    pass


class Engine:
    vllm_config = Some(scheduler_config=Some(max_num_seqs=4, max_num_batched_tokens=8))

    def __init__(self):
        self.left = {}

    def add_request(self, name, prompt, params):
        ids = prompt["prompt_token_ids"]
        self.left[name] = Some(prompt=len(ids), ids=ids, params=params, new=[])

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        ready = [item for item in self.left.items() if item[1].prompt <= 0]
        for name, request in self.left.items():
            if request.prompt > 0:
                time.sleep(0.02)
                request.prompt -= 8
                ready += [(name, request)] if request.prompt <= 0 else []
                break
        time.sleep(0.002)
        return [self.told(name, request) for name, request in ready]

    def told(self, name, request):
        request.new.append(0)
        if len(request.new) == request.params.max_tokens:
            del self.left[name]
        logs = json.load(open("logs.json")) if name == "likelihoods" else []
        shown = [None, *({token: Some(logprob=log)} for token, log in zip(request.ids[1:], logs))]
        return Some(request_id=name, outputs=[Some(token_ids=list(request.new))], prompt_logprobs=shown)


class LLM:
    def __init__(self, **asked):
        json.dump(asked, open("asked.json", "w"))
        print("words of its own on stdout")
        self.llm_engine = Engine()
"""


@pytest.fixture
def model() -> Transformer:
    return random_model(preset("nano"))


@pytest.fixture
def subject(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(bench_cases, "SECONDS", 0.2)
    (tmp_path / "vllm.py").write_text(FAKE)
    ids = torch.randint(512, (vllm.SHOWN,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = model.logits(ids).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    (tmp_path / "logs.json").write_text(json.dumps(logs.tolist()))
    return Subject(model, None, tmp_path)


def test_steps_are_counted_after_the_prompts(subject: Subject) -> None:
    with Vllm(subject, PYTHON) as peer:
        assert peer.version == "9.9"
        decoding = peer.measure(Case("decoding", 40, batch=3)).seconds
        assert len(decoding) == vllm.GENERATED and max(decoding) < 0.02 and min(decoding) >= 0.002
        late = peer.measure(Case("decoding", 80, batch=4)).seconds  # the first one decodes 30 steps before the last
        assert len(late) == vllm.GENERATED and max(late) < 0.02
        short, long = (peer.measure(Case("prompt", 0, tokens)).seconds for tokens in (16, 100))
        assert len(short) >= 5 and min(short) >= 0.04 and len(long) == 1 and long[0] >= 0.26
        assert peer.measure(Case("decoding", 0)).seconds
    assert peer.child.returncode is not None
    asked = json.loads((subject.scratch / "asked.json").read_text())
    assert asked["dtype"] == "float32" and asked["max_model_len"] == 512 and not asked["enable_prefix_caching"]
    assert Path(asked["model"], "config.json").exists()


def test_it_takes_what_fits(subject: Subject) -> None:
    with Vllm(subject, PYTHON) as peer:
        assert not peer.takes(Case("decoding", 400, batch=4))  # 8 tokens a step: the first would decode 400 meanwhile
        peer.budget = 2048
        assert peer.takes(Case("decoding", 400, batch=4)) and peer.takes(Case("prompt", 0, 400))
        for case in (Case("decoding", 500), Case("decoding", 8, batch=5), Case("verifying", 8, 5)):
            assert not peer.takes(case), case
        peer.room = 1000
        assert not peer.takes(Case("decoding", 400, batch=4))


def test_another_model_is_found_out(subject: Subject) -> None:
    logs = json.loads((subject.scratch / "logs.json").read_text())
    (subject.scratch / "logs.json").write_text(json.dumps(logs[::-1]))
    with pytest.raises(UserError, match="does not compute this model as we do"):
        Vllm(subject, PYTHON)


@pytest.mark.parametrize(
    "line", ["hello", "[]", "7", '{"version": "1"}', '{"version": 1, "sequences": 1, "budget": 1}']
)
def test_other_programs_are_told(subject: Subject, line: str) -> None:
    (subject.scratch / "other").write_text(f"#!/bin/sh\nprintf '%s\\377\\n' '{line}'; read more\n")
    (subject.scratch / "other").chmod(0o755)
    with pytest.raises(UserError, match="does not answer as it should"):
        Vllm(subject, subject.scratch / "other")


def test_no_child_is_left_where_the_model_cannot_be_written(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where Ctrl-C comes meanwhile."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cavelight.bench.peers.subject.write_checkpoint", interrupted)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("begun too early"))
    with pytest.raises(KeyboardInterrupt):
        Vllm(subject, PYTHON)


@pytest.mark.parametrize("fails", ["raise RuntimeError('Head dimension 24')", "import sys; sys.exit('an error: 24')"])
def test_why_it_failed_is_told(subject: Subject, fails: str) -> None:
    (subject.scratch / "vllm.py").write_text(fails)
    with pytest.raises(UserError, match=r"vLLM failed. Got: .*24 \(exit status 1\)"):
        Vllm(subject, PYTHON)


def test_the_true_one_computes_the_same_model(tmp_path: Path) -> None:
    given = os.environ.get("CAVELIGHT_VLLM")
    if not given:
        pytest.skip("CAVELIGHT_VLLM does not name a python that has vLLM")
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "hidden_size": 128}
    model = random_model(tiny(**sizes, n_group=4, topk_group=2))
    write_checkpoint(model, tmp_path / "model", shift_biases=True)
    with Vllm(Subject(model, tmp_path / "model", tmp_path), vllm.find(Path(given))) as peer:
        assert min(peer.measure(Case("decoding", 16, batch=2)).seconds) > 0
        assert min(peer.measure(Case("prompt", 0, 16)).seconds) > 0
