"""vLLM's side of a measurement: a script for the interpreter that has vLLM, which needs nothing of this package.

The first line of stdin says what to open, every other one is a case; each is answered by a line of JSON. Where seconds
are those of steps, the engine is stepped by hand: what it does before the first token is not mixed with what follows.
"""

import json
import os
import random
import sys
import time
from typing import Any

WARM = 2  # steps and prompts that are not counted


class Engine:
    """vLLM on a checkpoint, stepped by hand."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import vllm  # type: ignore[import-not-found, unused-ignore]

        self.vllm, self.count, self.vocabulary = vllm, 0, asked["vocabulary"]
        # Without a prefix cache: random prompts would seldom meet, but a warm one must not be found again.
        llm = vllm.LLM(
            model=asked["model"],
            dtype=asked["dtype"],
            max_model_len=asked["context"],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
        self.engine = llm.llm_engine
        limits = self.engine.vllm_config.scheduler_config
        self.sequences, self.budget = int(limits.max_num_seqs), int(limits.max_num_batched_tokens)

    def steps(self, prompt: int, batch: int, new: int) -> list[tuple[float, int]]:
        """Of each step until all are done: its seconds, and how many sequences got a token that was not their first."""
        params = self.vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for _ in range(batch):
            ids = random.choices(range(self.vocabulary), k=prompt)
            self.engine.add_request(str(self.count), {"prompt_token_ids": ids}, params)
            self.count += 1
        seen, found = dict[str, int](), list[tuple[float, int]]()
        while self.engine.has_unfinished_requests():
            began = time.perf_counter()
            outputs = self.engine.step()
            seconds, further = time.perf_counter() - began, 0
            for output in outputs:
                length = len(output.outputs[0].token_ids)
                further += output.request_id in seen and length > seen[output.request_id]
                seen[output.request_id] = length
            found.append((seconds, further))
        return found

    def likelihoods(self, ids: list[int]) -> list[float]:
        """The log probability of each token but the first."""
        params = self.vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        self.engine.add_request("likelihoods", {"prompt_token_ids": ids}, params)
        outputs: list[Any] = []
        while self.engine.has_unfinished_requests():
            outputs += self.engine.step()
        told = outputs[-1].prompt_logprobs
        return [float(some[token].logprob) for token, some in zip(ids[1:], told[1:], strict=True)]

    def prompt(self, tokens: int, least: int, most: int, seconds: float) -> list[float]:
        """Seconds of whole prompts, until they have their first token; of a long one, once."""
        found: list[float] = []
        warm = 0
        while True:
            took = sum(step for step, _ in self.steps(tokens, 1, 1))
            if warm < (1 if took > seconds else WARM):
                warm += 1
                continue
            found.append(took)
            if took > seconds or len(found) >= most or (len(found) >= least and sum(found) >= seconds):
                return found

    def decoding(self, depth: int, batch: int, steps: int, new: int) -> list[float]:
        """Seconds of steps in which every sequence got a token, of `new`; what follows nothing follows one token."""
        found = [step for step, further in self.steps(max(1, depth), batch, new) if further == batch]
        return found[WARM:][:steps]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM writes to stdout as well
    engine = Engine(json.loads(sys.stdin.readline()))
    print(
        json.dumps({"version": engine.vllm.__version__, "sequences": engine.sequences, "budget": engine.budget}),
        file=answers,
    )
    for line in sys.stdin:
        case = json.loads(line)
        found = getattr(engine, case.pop("kind"))(**case)
        print(json.dumps({"found": found}), file=answers)


if __name__ == "__main__":
    main()
