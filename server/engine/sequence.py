"""A request under way: its tokens, its pages and how far it is computed. With logit arithmetic, several streams."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import torch

from weft.adapters.forms import Prompt
from weft.server.engine.blocks import activated_key, block_key
from weft.server.engine.pending import is_pending
from weft.server.engine.request import COMPOSED, EngineRequest, TokenLogprobs


@dataclass(frozen=True)
class Mix:
    """How the logits of a request's streams become one distribution.

    Attributes:
        width: tokens that all its models know; no others come.
        top_p: nucleus of the leader's own distribution outside of which no token comes; None: all may.
    """

    width: int
    top_p: float | None


@dataclass(eq=False)
class Sequence:
    """The mutable state of one request; with logit arithmetic, of one of its streams.

    Such a request is its *leader*, the stream it would be without, and one *follower* for each term. All have the same
    output, each its own prompt, adapter and pages. Queues and running rows are lists of leaders.

    Attributes:
        request: what was asked. Of a follower: what a request for this stream alone would be.
        lane: which model it runs on, as the scheduler counts them; 0: the main one.
        weight: what its logits count.
        mix: of a leader with logit arithmetic; None: its own logits are sampled from.
        leader: of a follower. followers: of a leader.
        logits: ``[vocab]`` after the newest token, kept from when they are computed until all streams have theirs.
        adapter: identity of what it runs with: the request's adapter, a variant of it or a composition; None: the base.
        parents: the registered adapters which that is made of.
        activation: the first token that the adapter works on.
        tokens: prompt and output so far. The last may be placeholders of tokens that are under way (``pending``): one,
            or two while a step is launched before the one in front of it has landed.
        computed: leading tokens whose keys and values are in the pages.
        blocks: pages in order; they hold at least ``computed`` tokens.
        keys: content keys of the leading full blocks of ``tokens``, as far as they were needed.
        root: key the first block descends from.
        active_root: of an adapter that works from ``activation`` on, with ``root`` the base's; else None.
        slot: device slot of its adapter; -1: the base.
        prompt: what its adapter puts in front of it: keys and values that count before token 0 in its pages. Of a
            variant that is still to be made, another of the same length.
        prompt_blocks: pages of that prompt, while running.
        copy: page whose head is the tail of that prompt, and the sequence's own page to copy it to before it runs.
        embeddings: ``[len(tokens), hidden]`` of virtual tokens, in place of what the token ids stand for.
        max_len: tokens of prompt and output at most.
        final: of a leader: no step must compute any more of it. It ended, or its last token is under way.
        whole_prompt: its prompt is computed in one pass, because its adapter's gates are means over it.
        seed: of its random numbers.
        prompt_logprobs: filled as the prompt is computed, if asked for; None again once they were handed over. With
            logit arithmetic they are the leader's, and of the sum.
        arrival: position in the order of acceptance.
        accepted, first_run: times on ``time.monotonic``'s clock, in seconds; the latter None until it has run.

    Invariant: ``computed < len(tokens)`` between steps; at least the newest token is still to be computed. Only a
    stream that keeps its logits is computed to the end.
    """

    request: EngineRequest
    root: bytes
    max_len: int
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    final: bool = False
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    slot: int = -1
    adapter: str | None = None
    parents: tuple[str, ...] = ()
    activation: int = 0
    active_root: bytes | None = None
    prompt: Prompt | None = None
    prompt_blocks: list[int] = field(default_factory=list)
    copy: tuple[int, int] | None = None
    embeddings: torch.Tensor | None = None
    whole_prompt: bool = False
    seed: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    arrival: int = 0
    accepted: float = field(default_factory=time.monotonic)
    first_run: float | None = None
    lane: int = 0
    weight: float = 1.0
    mix: Mix | None = None
    leader: Sequence | None = None
    followers: list[Sequence] = field(default_factory=list)
    logits: torch.Tensor | None = None

    @classmethod
    def start(cls, request: EngineRequest, root: bytes, max_len: int, prompt: Prompt | None = None) -> Sequence:
        params = request.params
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            logprobs = [None] * len(request.prompt_token_ids)
        tokens = list(request.prompt_token_ids)
        return cls(
            request,
            root,
            max_len,
            tokens,
            adapter=request.adapter,
            prompt=prompt,
            seed=seed,
            prompt_logprobs=logprobs,
        )

    @property
    def streams(self) -> list[Sequence]:
        """Of a leader: itself and its followers."""
        return [self, *self.followers]

    @property
    def owner(self) -> Sequence:
        """The leader, which may be itself."""
        return self.leader or self

    @property
    def abreast(self) -> list[Sequence]:
        """Of a leader: its streams, if their prompts advance together; none otherwise.

        Prompts that log-probabilities are asked of do, so that the logits that make up one distribution are never
        there in different steps: to keep them would take a vocabulary for each token.
        """
        return self.streams if self.mix is not None and self.scored else []

    @property
    def parts(self) -> list[list[Sequence]]:
        """Of a leader: its streams, those together that advance together."""
        together = self.abreast
        return [together] if together else [[stream] for stream in self.streams]

    @property
    def scored(self) -> bool:
        """The logits of its whole prompt are wanted; not any more once its first token is under way."""
        owner = self.owner
        return owner.prompt_logprobs is not None and owner.output_len == 0

    @property
    def uncut(self) -> bool:
        """Its prompt is computed in one pass, for its own sake or that of a stream it goes abreast with."""
        return self.whole_prompt or any(stream.whole_prompt for stream in self.owner.abreast)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def known(self) -> int:
        """Leading tokens that are no placeholders."""
        return len(self.tokens) - sum(map(is_pending, self.tokens[-2:]))

    @property
    def offset(self) -> int:
        """Keys and values in front of token 0."""
        return self.prompt.length if self.prompt else 0

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding, 0 while partners are awaited."""
        return len(self.tokens) - self.computed

    @property
    def queue_seconds(self) -> float | None:
        """From acceptance to the first step it took part in."""
        return None if self.first_run is None else self.first_run - self.accepted

    @property
    def name(self) -> str:
        """Under which its traffic is accounted."""
        if self.request.composition is not None:
            return self.request.adapter_name or COMPOSED
        return self.request.adapter_name or self.request.adapter or ""

    def slots(self, start: int, stop: int) -> list[int]:
        """The slot of each of the tokens ``[start, stop)``."""
        before = min(max(self.activation - start, 0), stop - start)
        return [-1] * before + [self.slot] * (stop - start - before)

    def spans(self, start: int, stop: int) -> list[int]:
        """How the tokens ``[start, stop)`` are cut for the gates: the prompt is one span, each later token another."""
        prompt = max(self.prompt_len - start, 0)
        assert not prompt or (start == 0 and stop >= prompt), "a prompt that gates are means over was cut"
        return [prompt] * (prompt > 0) + [1] * (stop - start - prompt)

    def pages(self, block_size: int, tokens: int) -> int:
        """Pages that the first ``tokens`` tokens and what stands in front of them take."""
        return -(-(self.offset + tokens) // block_size)

    def full_block_keys(self, block_size: int, tokens: int) -> list[bytes]:
        """Keys of the full pages that hold some of the first ``tokens`` tokens, which are known.

        A page that begins with the adapter's prompt is told apart by the root, which the adapter's version is part of.
        Pages that end before an activation are the base's; the others depend on where it is.
        """
        shared = self.offset // block_size
        count = (self.offset + tokens) // block_size - shared
        while len(self.keys) < count:
            start = (shared + len(self.keys)) * block_size - self.offset
            parent = self.keys[-1] if self.keys else self.root
            if self.active_root is not None and start <= self.activation < start + block_size:
                parent = activated_key(parent, self.active_root, self.activation)
            self.keys.append(block_key(parent, self.tokens[max(0, start) : start + block_size]))
        return self.keys[:count]
