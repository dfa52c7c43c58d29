"""What a model in training writes: a short greedy sample after the beginning of a held-out document."""

from itertools import zip_longest

import numpy as np

from cavelight.model.transformer import Transformer
from cavelight.run.generate import TokenStream, begin
from cavelight.spec.events import Sampled
from cavelight.train.prepare import Prepared

PROMPT = 48  # tokens of the document that are given


class Sampler:
    """Samples of `tokens` tokens, always after the same prompt: the beginning of the longest held-out document.

    The drafts of all MTP modules are tried at every token, so their acceptance is the same on every machine; the text
    is that of the plain model.
    """

    def __init__(self, model: Transformer, data: Prepared, tokens: int) -> None:
        self.model, self.tokenizer = model, data.tokenizer
        self.tokens = min(tokens, model.config.max_position_embeddings // 2)
        starts_M1 = np.asarray(data.held.starts_M1)
        longest = int(np.argmax(np.diff(starts_M1)))
        room = min(PROMPT, model.config.max_position_embeddings - self.tokens - 1)
        first = int(starts_M1[longest]) + 1  # behind the token that begins the document
        document = data.held.tokens_N[first : min(first + room, int(starts_M1[longest + 1]) - 1)]
        self.prompt = [int(token) for token in document]

    def sample(self, step: int) -> Sampled:
        """After `step` steps. Acceptance is by depth, 0 where nothing was proposed."""
        modules = self.model.config.num_nextn_predict_layers
        prompt = begin(self.model.config) + self.prompt
        stream = TokenStream(self.model, prompt, max_new_tokens=self.tokens, drafts=modules)
        text, stats = self.tokenizer.decode(list(stream)), stream.stats
        counted = zip_longest(stats.accepted, stats.proposed, range(modules), fillvalue=0)
        acceptance = tuple(accepted / max(proposed, 1) for accepted, proposed, _ in counted)
        return Sampled(step, self.tokenizer.decode(self.prompt), text, acceptance)
