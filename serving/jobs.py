"""From the checked values of a request to Jobs for the scheduler."""

from inference import sampling
from inference.scheduling import BeamJob, Job
from serving.formats import Problem
from serving.parameters import temperature_of
from utils import ids_without_token

MAX_JOBS = 1024  # texts that one request may ask for


def make_jobs(service, values, encoded, n_new, n_candidates, deliver):
    """A Job for each text that a request asks for: n for each prompt. The i-th of the n has seed + i."""
    tokenizer, model = service.tokenizer, service.model
    words = [space + word.strip() for word in values.bad_words for space in ("", " ")]
    cold = temperature_of(values) == 0 or values.use_beam_search
    params = sampling.SamplingParams(
        *((0.0, 0, 1.0) if cold else (temperature_of(values), values.top_k, max(values.top_p, 1e-6))),
        values.repetition_penalty, values.min_tokens, tuple(tuple(tokenizer.encode(word)) for word in words),
        model.end_ids, 0.0 if cold else values.min_p, banned=ids_without_token(tokenizer, model.n_vocab, model.end_ids),
    )  # fmt: skip
    if values.use_beam_search and (values.best_of or values.n) > 1:
        settings = {"length_penalty": values.length_penalty, "end_ids": model.end_ids, "params": params}
        beams = values.best_of or values.n
        return [
            BeamJob(tokenizer, ids, n_new, beams, deliver=deliver, n_results=values.n, **settings) for ids in encoded
        ]
    needs_prompt = n_candidates is not None and getattr(values, "echo", False)
    settings = {"end_ids": model.end_ids, "stop": values.stop, "n_candidates": n_candidates, "deliver": deliver}
    seeds = [None if values.seed is None else values.seed % 2**64 + i for i in range(values.n)]
    return [
        Job(tokenizer, ids, n_new, params, seed=seed, needs_prompt_logits=needs_prompt, **settings)
        for ids in encoded
        for seed in seeds
    ]


def check_prompts(service, values, encoded, n_new, chat):
    """Raises Problem for a prompt that the model cannot take."""
    name, n_vocab = "messages" if chat else "prompt", service.model.n_vocab
    if len(encoded) * values.n > MAX_JOBS:
        raise Problem(400, f"{len(encoded)} prompts times n {values.n} are more than {MAX_JOBS} texts", "n")
    beams = values.use_beam_search and (values.best_of or values.n)
    if beams > (n_slots := service.scheduler.batch.n_slots):
        raise Problem(400, f"{beams} beams are more than the {n_slots} slots of this server", "best_of")
    if values.min_tokens > n_new:
        raise Problem(400, f"min_tokens {values.min_tokens} is more than max_tokens {n_new}", "min_tokens")
    for ids in encoded:
        if bad := [i for i in ids if not 0 <= i < n_vocab]:
            raise Problem(400, f"token id {bad[0]} is not below {n_vocab}, the size of the vocabulary", name)
        if len(ids) + n_new > service.n_tokens:
            message = f"this model's maximum context length is {service.n_tokens} tokens; you requested {len(ids)} of "
            message += f"the prompt + {n_new} new = {len(ids) + n_new}: shorten the prompt or lower max_tokens"
            raise Problem(400, message, name, "context_length_exceeded")
