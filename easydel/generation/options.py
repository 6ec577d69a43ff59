"""What `generate` is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class GenerationOptions:
    """Resolved options; where transformers has one of the name, it means the same.

    Attributes:
        max_new_tokens: most tokens to add.
        min_new_tokens: end-of-text tokens are suppressed before as many are added.
        max_time: seconds after which no further token is begun; `None`: no limit.
        do_sample: draw tokens; otherwise take the likeliest.
        temperature: scores are divided by it (sampling, as the next seven).
        top_k: keep the k likeliest tokens; `None`: all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it; `None`: all.
        min_p: keep tokens at least so many times as likely as the likeliest; `None`: all.
        typical_p: keep the tokens nearest to the expected information until their probability reaches it; 1: all.
        epsilon_cutoff: keep tokens of at least this probability; 0: all.
        eta_cutoff: likewise, the less certain the distribution the lower; 0: all.
        repetition_penalty: scores of tokens that occurred are divided by it (negative ones multiplied); 1: off.
        encoder_repetition_penalty: the inverse for tokens of what is answered to; 1: off.
        frequency_penalty: subtracted for each time a token occurs in the answer (OpenAI's meaning); 0: off.
        presence_penalty: subtracted if it occurs in the answer at all; 0: off.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0: off.
        encoder_no_repeat_ngram_size: none of what is answered to occurs in the answer; 0: off.
        bad_words_ids: sequences of tokens that are not written.
        sequence_bias: sequences of tokens and what is added to the score of the token that would complete each.
        suppress_tokens: never written.
        begin_suppress_tokens: not written at the beginning.
        forced_bos_token_id: written after a prompt of one token.
        forced_eos_token_id: one of them is written as the last of `max_new_tokens`.
        exponential_decay_length_penalty: after `start` tokens the end becomes likelier by `factor` a token.
        remove_invalid_values: replace nan and infinities.
        renormalize_logits: scores are logarithms of probabilities again in the end.
        num_beams: width of beam search; 1: none.
        length_penalty: a beam's score is divided by its length to this power.
        early_stopping: beam search ends at `num_beams` answers (`True`), when better ones are unlikely (`False`) or
            impossible (`"never"`).
        num_return_sequences: answers for each prompt.
        stop_strings: a row ends after the token in which one of them is completed.
        tokenizer: of transformers, for `stop_strings`.
        logits_processor: own functions `(input_ids, scores) -> scores`.
        stopping_criteria: own functions `(input_ids, scores) -> bool [rows]`.
        output_scores: keep the processed scores of each step.
        output_logits: keep the logits of each step.
        eos_token_ids: a row ends after one of them.
        pad_token_id: fills a row after its end.
        seed: of the random draws.
        cache_dtype: `"int8"`: keys and values are kept so; `None`: in the model's dtype.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    min_new_tokens: int = 0
    max_time: float | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    logits_processor: tuple[Callable[..., Any], ...] = ()
    stopping_criteria: tuple[Callable[..., Any], ...] = ()
    output_scores: bool = False
    output_logits: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    seed: int = 0
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (*self._ranges(), *self._combinations()):
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _ranges(self) -> tuple[tuple[str, bool, str], ...]:
        decay = self.exponential_decay_length_penalty
        return (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, f"in [0, {self.max_new_tokens}]"),
            ("max_time", self.max_time is None or self.max_time > 0, "positive"),
            ("temperature", self.temperature > 0, "positive (use do_sample=False for greedy search)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("typical_p", 0 < self.typical_p <= 1, "in (0, 1]"),
            ("epsilon_cutoff", 0 <= self.epsilon_cutoff < 1, "in [0, 1)"),
            ("eta_cutoff", 0 <= self.eta_cutoff < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("encoder_repetition_penalty", self.encoder_repetition_penalty > 0, "positive"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0 (0 is off)"),
            ("encoder_no_repeat_ngram_size", self.encoder_no_repeat_ngram_size >= 0, "at least 0 (0 is off)"),
            ("exponential_decay_length_penalty", decay is None or decay[1] > 0, "(start, factor) with a factor > 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("stop_strings", all(self.stop_strings), "strings that are not empty"),
        )

    def _combinations(self) -> tuple[tuple[str, bool, str], ...]:
        most = self.num_beams if self.num_beams > 1 else None if self.do_sample else 1
        suppressed, last = set(self.suppress_tokens), set(self.forced_eos_token_id)
        all_forced = self.forced_bos_token_id in suppressed or (bool(last) and last <= suppressed)
        return (
            (
                "num_return_sequences",
                most is None or self.num_return_sequences <= most,
                f"at most {most} with num_beams={self.num_beams} and do_sample={self.do_sample}",
            ),
            (
                "exponential_decay_length_penalty",
                self.exponential_decay_length_penalty is None or bool(self.eos_token_ids),
                "used with an eos_token_id",
            ),
            ("stop_strings", not self.stop_strings or self.tokenizer is not None, "given with tokenizer="),
            ("suppress_tokens", not all_forced, "free of forced_bos_token_id and of some forced_eos_token_id"),
        )
